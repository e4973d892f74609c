"""ResNets as lego layers: the stem and every residual block (17 layers for ResNet-50, GPPF figure 11)."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

from torch import nn

from gppf_ds.backbone.blocks import Block, Family, Tap
from gppf_ds.backbone.deformable import deformable
from gppf_ds.errors import UserError


def split(model: Any) -> list[Block]:
    """The blocks of a timm ResNet, in order.

    The strided block with its projection shortcut is one unit. Max-pooling has no parameters and stays outside the
    units, so that the stem's own stride-2 map can be tapped (the depth head wants it).

    Raises:
        UserError: the stem pools with a convolution, whose parameters would belong to no unit.
    """
    if any(True for _ in model.maxpool.parameters()):
        raise UserError(
            f"backbone.name {model.pretrained_cfg.get('architecture')!r} pools its stem with a convolution "
            "(replace_stem_pool), which no unit would own: choose a ResNet with a max-pooled stem."
        )
    stem = nn.Sequential(OrderedDict(conv1=model.conv1, bn1=model.bn1, act1=model.act1))
    blocks = [Block("Stem", {"": ""}, stem, Tap(model.feature_info[0]["num_chs"], 2))]
    before = model.maxpool
    for number, info in enumerate(model.feature_info[1:], start=1):
        stage = getattr(model, f"layer{number}")
        for index, module in enumerate(stage):
            tap = Tap(info["num_chs"], info["reduction"]) if index == len(stage) - 1 else None
            block = Block(f"Res{number + 1}.{index}", {"": f"layer{number}.{index}."}, module, tap)
            if before is not None:
                block.before, before = before, None
            blocks.append(block)
    return blocks


FAMILY = Family(split, variants={"deformable": deformable}, channels_last=True)
