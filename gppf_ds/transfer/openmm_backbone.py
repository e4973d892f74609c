"""A path as a backbone that mmdet and mmseg build from a configuration, for heads on maps that none of theirs gives.

Those are dense heads on a ViT (behind a feature pyramid), on Swin transformers whose units are not all ``pad_first`` or
that are of version 2, and on residual blocks of mixed kinds. A configuration names :class:`PathBackbone` by its full
name, which mmengine imports, so gppf_ds has to be installed where it is used. All other exports do without this module.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import timm
from torch import Tensor, nn

from gppf_ds.backbone.blocks import feature_maps
from gppf_ds.backbone.lego import FAMILIES, timm_module
from gppf_ds.tasks.pyramid import SimpleFeaturePyramid


class PathBackbone(nn.Module):
    """The blocks of a timm model one after another, of the classes that a path chose, trainable.

    Args:
        timm_model, timm_options: what ``timm.create_model`` makes the model of, random weights.
        unit_blocks: class of every block, as ``backbone.unit_blocks`` names it.
        out_indices: of the maps to hand out; of those of the pyramid, where there is one.
        pyramid: strides of the maps that a simple feature pyramid makes of the only map, finest first.
    """

    def __init__(
        self,
        timm_model: str,
        timm_options: Mapping[str, Any],
        unit_blocks: Sequence[str],
        out_indices: Sequence[int],
        pyramid: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        family = FAMILIES[timm_module(timm_model)]
        blocks = family.split(timm.create_model(timm_model, pretrained=False, **timm_options))
        self.blocks = [family.of_class(kind, block) for block, kind in zip(blocks, unit_blocks, strict=True)]
        self.units = nn.ModuleList(block.module for block in self.blocks)
        self.out_indices = tuple(out_indices)
        self.pyramid = None
        if pyramid is not None:
            [tap] = [block.tap for block in blocks if block.tap is not None]
            self.pyramid = SimpleFeaturePyramid(tap.channels, tap.stride, tuple(pyramid))

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """(B, 3, H, W) -> the maps (B, C, H / stride, W / stride) at ``out_indices``, as the path gives them."""
        maps = feature_maps(zip(self.blocks, self.units, strict=True), images)
        if self.pyramid is not None:
            maps = self.pyramid(*maps)
        return tuple(maps[index] for index in self.out_indices)
