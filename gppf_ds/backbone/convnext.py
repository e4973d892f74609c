"""ConvNeXts, v1 and v2, as lego layers: the stem and every block (19 layers for ConvNeXt-T)."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

from torch import Tensor, nn

from gppf_ds.backbone.blocks import Block, Family, Tap
from gppf_ds.errors import UserError


class Idle(nn.Module):
    """A module whose parameters belong to the unit but act behind the features only."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        """``x`` itself."""
        return x


def split(model: Any) -> list[Block]:
    """The blocks of a timm ConvNeXt, in order; a stage's downsampling belongs to the unit of its first block.

    Every tap is the output of its stage as timm's ``features_only`` hands it out, so mmseg's TIMMBackbone gives the
    same maps; H and W are floored at every downsampling.

    timm's classifier normalises after global pooling: that norm (``head.norm``) acts on no map, and timm's
    ``forward_features`` does without it. It belongs to the last block's unit, so that a path has all that
    ``timm.create_model`` loads, but it has no part in the forward pass, gets no gradient, and leaves as it was loaded.
    With ``head_norm_first=True`` (timm's ``_hnf`` models) the norm comes before pooling: ``forward_features`` ends with
    it, and so does the last tap.

    Raises:
        UserError: a stage has no blocks.
    """
    if not all(len(stage.blocks) for stage in model.stages):
        raise UserError(
            f"backbone.name {model.pretrained_cfg.get('architecture')!r} has a stage without blocks: let depths be at "
            "least 1 everywhere."
        )
    blocks = [Block("Stem", {"": "stem."}, model.stem)]
    for number, (stage, info) in enumerate(zip(model.stages, model.feature_info, strict=True)):
        for index, module in enumerate(stage.blocks):
            parts = OrderedDict(downsample=stage.downsample, block=module) if index == 0 else OrderedDict(block=module)
            names = {"downsample.": f"stages.{number}.downsample.", "block.": f"stages.{number}.blocks.{index}."}
            blocks.append(Block(f"ConvNeXt{number + 1}.{index}", names, nn.Sequential(parts)))
        blocks[-1].tap = Tap(info["num_chs"], info["reduction"])
    last = blocks[-1]
    last.module.add_module("norm", model.norm_pre)
    last.module.add_module("head", Idle(model.head))
    last.names = {**last.names, "norm.": "norm_pre.", "head.module.": "head."}
    return blocks


FAMILY = Family(split)
