"""Extraction: a task's path as a plain model (GPPF section 3.3). A renaming, with the same numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from functools import cached_property
from typing import Any

import timm
import torch
from torch import Tensor, nn

from gppf_ds.backbone.blocks import feature_maps
from gppf_ds.backbone.lego import LegoBackbone, LegoLayer
from gppf_ds.errors import UserError

Size = tuple[int, int]
"""(height, width) in pixels."""


class ChosenPath(nn.Module):
    """Copies of the units of a path, one after another, in evaluation mode: what the task's head was trained on.

    It computes what the lego backbone computes along the path, also where no timm model does (deformable units, Swin
    units that pad first).

    Args:
        backbone: trained; stays as it is.
        path: the unit of every lego layer.

    Attributes:
        timm_model, timm_options: what ``timm.create_model`` makes the plain model of.
        numbers: the unit of every layer, by the layers' names.
        kinds: block classes of these units (``backbone.unit_blocks``).
        strides: of the maps, finest first.
        windowed: whether attention is within windows (Swin).
    """

    def __init__(self, backbone: LegoBackbone, path: Sequence[int]) -> None:
        super().__init__()
        self.timm_model = backbone.config.name
        self.timm_options = backbone.timm_options
        self.kinds = {backbone.block_class(unit) for unit in path}
        self.strides = backbone.strides
        self.layers = [layer for layer in backbone.layers if isinstance(layer, LegoLayer)]
        chosen = list(zip(self.layers, path, strict=True))
        self.numbers = {layer.name: unit for layer, unit in chosen}
        self.units = nn.ModuleList(deepcopy(layer.units[str(unit)]) for layer, unit in chosen)
        self.windowed = any(hasattr(module, "window_size") for module in self.units.modules())
        self.eval().requires_grad_(False)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """(B, 3, H, W) -> the maps that the head was trained on, (B, C, H / stride, W / stride), finest first."""
        return tuple(feature_maps(zip(self.layers, self.units, strict=True), images))

    def state(self) -> dict[str, Tensor]:
        """Parameters and buffers under timm's names."""
        return {
            layer.timm_name(name): tensor
            for layer, unit in zip(self.layers, self.units, strict=True)
            for name, tensor in unit.state_dict().items()
        }

    @cached_property
    def trained_size(self) -> Size:
        """The image size that timm's model was made for: its own, or ``img_size`` of the options."""
        model = timm.create_model(self.timm_model, pretrained=False, **self.timm_options)
        height, width = getattr(getattr(model, "patch_embed", None), "img_size", model.pretrained_cfg["input_size"][1:])
        return height, width


def probe(size: Size, images: int = 2) -> Tensor:
    """Random images (images, 3, height, width), always the same ones."""
    return torch.randn(images, 3, *size, generator=torch.Generator().manual_seed(0))


def relative_difference(ours: Tensor, theirs: Tensor) -> float:
    """The largest absolute difference over the largest absolute value of ``ours``."""
    return float((ours - theirs).abs().max() / ours.abs().max().clamp_min(1e-12))


def plain_options(path: ChosenPath, size: Size) -> dict[str, Any]:
    """Keyword arguments of ``timm.create_model`` for a model that computes what the path does on images of this size.

    Only Swin asks: timm decides once, by its image size, whether the windows of the last stage are shifted; on larger
    images the path shifts them, which timm does with ``always_partition``.
    """
    if path.windowed and any(side > own for side, own in zip(size, path.trained_size, strict=True)):
        return {**path.timm_options, "always_partition": True}
    return dict(path.timm_options)


def plain_model(name: str, options: Mapping[str, Any], state: Mapping[str, Tensor]) -> Any:
    """The timm model that a path loads into, strictly; in evaluation mode.

    Raises:
        UserError: the path has parameters that timm's model has not.
    """
    model = timm.create_model(name, pretrained=False, **options)
    if foreign := sorted(state.keys() - model.state_dict().keys()):
        raise UserError(
            f"the path has {len(foreign)} tensors that timm's {name} has no place for ({foreign[0]}, ...): it runs "
            "through units of another kind (backbone.unit_blocks), which only --names mmdet, mmseg or detectron2 write."
        )
    model.load_state_dict(state, strict=True)
    return model.eval()


@torch.no_grad()
def largest_difference(path: ChosenPath, model: Any, size: Size = (64, 64)) -> float:
    """How far timm's own forward is from the path: of the last maps, relative to the largest value.

    Args:
        path: a task's.
        model: of timm, in evaluation mode.
        size: of the images to compare on.

    Raises:
        UserError: timm's model takes no images of this size.
    """
    images = probe(size)
    try:
        [theirs] = model.forward_intermediates(images, indices=1, norm=True, intermediates_only=True)
    except (AssertionError, RuntimeError) as error:
        raise UserError(
            f"timm's {path.timm_model} takes no images of {size[0]} x {size[1]} ({error}): give another --size."
        ) from error
    return relative_difference(path(images)[-1], theirs)
