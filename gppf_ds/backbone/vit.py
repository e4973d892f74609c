"""Vision Transformers as lego layers: the embedding and every block (13 layers for ViT-B)."""

from __future__ import annotations

from collections import OrderedDict
from copy import copy
from functools import partial
from typing import Any

from timm.layers import PatchEmbed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from gppf_ds.backbone.blocks import Block, Family, Tap
from gppf_ds.errors import UserError

HEAD_PARTS = ("attn_pool", "fc_norm", "head")
"""What timm runs behind the features; the heads of the tasks stand in its place."""


class Embedding(nn.Module):
    """Images (B, 3, H, W) -> tokens (B, N, C): timm's own model without its blocks and its final norm.

    So patches, class and register tokens, position embedding and ``norm_pre`` are computed by timm's code.
    """

    def __init__(self, model: VisionTransformer) -> None:
        super().__init__()
        self.model = copy(model)
        # A table of submodules of its own: the given model stays whole.
        self.model._modules = {**model._modules, "blocks": nn.Sequential(), "norm": nn.Identity()}

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, prefix tokens + patches, C)."""
        return self.model.forward_features(images)


def split(model: Any) -> list[Block]:
    """The blocks of a timm VisionTransformer, in order; the final norm belongs to the last block's unit.

    Between layers tokens flow, (B, N, C). The only feature map is that of the last layer; dense heads make a pyramid
    of it (:mod:`gppf_ds.tasks.pyramid`).

    Raises:
        UserError: the model is of another class, has no plain square patches, drops patches, or has parameters behind
            its features, which no unit would own.
    """
    if obstacle := _obstacle(model):
        raise UserError(f"backbone.name {model.pretrained_cfg.get('architecture')!r} {obstacle}")
    patch = model.patch_embed.patch_size[0]
    blocks = [Block("Embed", {"model.": ""}, Embedding(model))]
    blocks += [Block(f"Block{i}", {"": f"blocks.{i}."}, module) for i, module in enumerate(model.blocks)]
    last = blocks[-1]
    last.names = {"block.": last.names[""], "norm.": "norm."}
    last.module = nn.Sequential(OrderedDict(block=last.module, norm=model.norm))
    last.tap = Tap(model.embed_dim, patch, partial(_as_map, patch=patch, prefix=model.num_prefix_tokens))
    return blocks


def _as_map(x: Tensor, image_size: tuple[int, int], patch: int, prefix: int) -> Tensor:
    """(B, prefix + h w, C) -> (B, C, h, w) with h = ceil(H / patch): images are padded to whole patches."""
    height, width = (-(-side // patch) for side in image_size)
    return x[:, prefix:].unflatten(1, (height, width)).permute(0, 3, 1, 2).contiguous()


def _obstacle(model: Any) -> str | None:
    """Why the model does not come apart, and what to do about it."""
    if type(model) is not VisionTransformer:
        return f"is a {type(model).__name__}: choose a plain Vision Transformer (timm's class VisionTransformer)."
    if type(model.patch_embed) is not PatchEmbed:
        return f"makes its patches by {type(model.patch_embed).__name__}: choose one that cuts plain patches."
    if len(set(model.patch_embed.patch_size)) > 1:
        return f"has patches of {model.patch_embed.patch_size} pixels: set patch_size to one number."
    if not isinstance(model.patch_drop, nn.Identity):
        return "leaves out patches in training, so that there is no feature map: remove patch_drop_rate."
    for name in HEAD_PARTS:
        part = getattr(model, name)
        if part is not None and any(True for _ in part.parameters()):
            return f"has parameters behind its features ({name}): remove global_pool and fc_norm from backbone.options."
    return None


# Without a pooling of timm's own every model ends with its final norm, whatever its classifier would have pooled.
FAMILY = Family(split, {"dynamic_img_size": True, "dynamic_img_pad": True, "global_pool": "", "fc_norm": False})
