"""What a family of backbones says about each of its blocks, so that lego layers can be made of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn


def _same(x: Tensor) -> Tensor:
    return x


@dataclass(frozen=True)
class Tap:
    """A feature map that the backbone hands to the heads, taken after a layer."""

    channels: int
    stride: int
    as_map: Callable[[Tensor], Tensor] = _same
    """To (B, C, H, W), where the family computes in another layout."""


@dataclass
class Block:
    """One block of a timm model: a unit of a lego layer."""

    name: str
    """As the paper calls it: Stem, Res2.0, ..."""
    prefix: str
    """Of the block's parameters in timm's model, with the final dot; empty where they stand at the top level."""
    module: nn.Module
    tap: Tap | None = None
    before: Callable[[Tensor], Tensor] = _same
    """A step without parameters between the previous layer and this one (max-pooling after the stem)."""
