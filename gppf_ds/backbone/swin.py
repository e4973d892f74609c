"""Swin transformers, v1 and v2, as lego layers: the patch embedding and every block (13 layers for Swin-T)."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from gppf_ds.backbone.blocks import Block, Family, Tap
from gppf_ds.errors import UserError


class Unit(nn.Module):
    """timm's block; the first one of a stage behind its patch merging, the last one of all before the final norm.

    timm shifts the windows of every second block (Swin, section 3.2), but not where the map of an image of ``img_size``
    is a single window: the last stage of a published model at its published size. It decides so once, for all sizes.
    Here the windows of a larger image's map are shifted all the same, as the authors' detectors, mmdet and mmseg do.
    Hence a unit computes what stock timm computes as long as the images are no larger than ``img_size``, and for larger
    ones what timm computes with ``always_partition=True`` (where ``img_size`` leaves no room for the whole window, as
    in the last stage of ``swinv2_*_window16_256``, the window stays as small as it is there).

    Args:
        downsample: patch merging, or the identity.
        block: of the stage.
        norm: the final norm of the model, or the identity.
    """

    def __init__(self, downsample: nn.Module, block: Any, norm: nn.Module) -> None:
        super().__init__()
        self.downsample = downsample
        self.block = block
        self.norm = norm
        self.shift = tuple(block.shift_size)
        shifts = any(block.target_shift_size)
        self.full_shift = tuple(side // 2 if shifts else 0 for side in block.window_size)
        self.pads_first = False
        """See :func:`pad_first`."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C), behind patch merging (B, ceil(H / 2), ceil(W / 2), C')."""
        x = self.downsample(x)
        self.choose_shift(x.shape[1], x.shape[2])
        return self.norm(self.block(x))

    def choose_shift(self, height: int, width: int) -> None:
        """Tells the block how far to shift its windows over a map of this size."""
        self.block.shift_size = self.shift if self._fits(height, width) else self.full_shift

    def _fits(self, height: int, width: int) -> bool:
        """Whether timm's choice of the shift, made for an image of ``img_size``, holds for this map."""
        rows, columns = self.block.input_resolution
        if self.pads_first:
            return (height, width) == (rows, columns)
        return height <= rows and width <= columns


def split(model: Any) -> list[Block]:
    """The blocks of a timm SwinTransformer or SwinTransformerV2, in order.

    Between layers maps flow as (B, H, W, C). Patch merging belongs to the unit of the first block of its stage, the
    final norm to that of the last block. The tap of the last stage is that norm's output. The finer ones are layer
    norms without parameters of their stages' outputs: mmdet's and mmseg's Swin has a norm there, and with weight 1 and
    bias 0 it hands out the same numbers.

    Images whose sides are no multiple of the patch are padded at the right and at the bottom with zeros (stock timm
    refuses them), so every map has ceil(H / stride) rows.

    Raises:
        UserError: the model takes images of one size only, has patches that are not square, or a stage without blocks.
    """
    if obstacle := _obstacle(model):
        raise UserError(f"backbone.name {model.pretrained_cfg.get('architecture')!r} {obstacle}")
    model.patch_embed.dynamic_img_pad = True
    blocks = [Block("Embed", {"": "patch_embed."}, model.patch_embed)]
    for number, (stage, info) in enumerate(zip(model.layers, model.feature_info, strict=True)):
        for index, module in enumerate(stage.blocks):
            unit = Unit(stage.downsample if index == 0 else nn.Identity(), module, nn.Identity())
            names = {"downsample.": f"layers.{number}.downsample.", "block.": f"layers.{number}.blocks.{index}."}
            blocks.append(Block(f"Swin{number + 1}.{index}", names, unit))
        blocks[-1].tap = Tap(info["num_chs"], info["reduction"], _as_normed_map)
    last = blocks[-1]
    last.module.norm = model.norm
    last.names = {**last.names, "norm.": "norm."}
    last.tap = Tap(info["num_chs"], info["reduction"], _as_map)
    return blocks


def pad_first(block: Block) -> Block:
    """The block with its maps padded to whole windows before the windows are shifted, as the authors' code, mmdet and
    mmseg do.

    timm shifts before it pads (its issue 2438), so its mask misses the rows and columns that came round: they attend to
    the opposite border. The two agree where no map needs padding, at 224 pixels with windows of 7 for instance. In
    exchange for timm's numbers elsewhere this gives mmdet's and mmseg's at every size but that of ``img_size`` (224),
    where it keeps stock timm's.
    """
    unit = block.module
    if isinstance(unit, Unit):
        unit.pads_first = True
        unit.block._attn = partial(_attend_padded, unit.block._attn, unit.block.window_size)
    return block


def _attend_padded(attend: Any, window: tuple[int, int], x: Tensor) -> Tensor:
    """(B, H, W, C) -> (B, H, W, C). Padding only now, behind any norm, leaves zeros in the windows."""
    height, width = x.shape[1:3]
    x = F.pad(x, (0, 0, 0, -width % window[1], 0, -height % window[0]))
    return attend(x)[:, :height, :width].contiguous()


def _as_map(x: Tensor, image_size: tuple[int, int]) -> Tensor:
    return x.permute(0, 3, 1, 2).contiguous()


def _as_normed_map(x: Tensor, image_size: tuple[int, int]) -> Tensor:
    return _as_map(F.layer_norm(x, x.shape[-1:]), image_size)


def _obstacle(model: Any) -> str | None:
    """Why the model does not come apart, and what to do about it."""
    if not model.dynamic_img_size:
        return "takes images of one size only: remove strict_img_size from backbone.options."
    if len(set(model.patch_embed.patch_size)) > 1:
        return f"has patches of {model.patch_embed.patch_size} pixels: set patch_size to one number."
    if not all(len(stage.blocks) for stage in model.layers):
        return "has a stage without blocks: let depths be at least 1 everywhere."
    return None


FAMILY = Family(split, {"strict_img_size": False}, variants={"pad_first": pad_first})
