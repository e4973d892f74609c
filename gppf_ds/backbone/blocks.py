"""What a family of backbones says about itself and each of its blocks, so that lego layers can be made of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn


def _same(x: Tensor) -> Tensor:
    return x


def _already_map(x: Tensor, image_size: tuple[int, int]) -> Tensor:
    return x


@dataclass(frozen=True)
class Tap:
    """A feature map that the backbone hands to the heads, taken after a layer."""

    channels: int
    stride: int
    as_map: Callable[[Tensor, tuple[int, int]], Tensor] = _already_map
    """(what the layer returned, (height, width) of the images) -> (B, C, H, W), where the family computes in another
    layout."""


@dataclass
class Block:
    """One block of a timm model: a unit of a lego layer."""

    name: str
    """As the paper calls it: Stem, Res2.0, ..."""
    names: Mapping[str, str]
    """Beginnings of the unit's own parameter names -> those of timm's model; the longest that fits is used."""
    module: nn.Module
    tap: Tap | None = None
    before: Callable[[Tensor], Tensor] = _same
    """A step without parameters between the previous layer and this one (max-pooling after the stem)."""

    def timm_name(self, own: str) -> str:
        """The name in timm's model of a parameter or buffer of :attr:`module`."""
        start = max((start for start in self.names if own.startswith(start)), key=len)
        return self.names[start] + own.removeprefix(start)


def feature_maps(steps: Iterable[tuple[Any, nn.Module]], images: Tensor) -> list[Tensor]:
    """The maps (B, C, H / stride, W / stride) of a single path: (B, 3, H, W) through one unit of every step.

    Args:
        steps: (a :class:`Block` or a lego layer, its unit), first to last.
        images: of any size that the family takes.
    """
    maps, x = [], images
    for step, unit in steps:
        x = unit(step.before(x))
        if step.tap is not None:
            maps.append(step.tap.as_map(x, (images.shape[-2], images.shape[-1])))
    return maps


@dataclass(frozen=True)
class Family:
    """The timm models that come apart in the same way."""

    split: Callable[[Any], list[Block]]
    """The blocks of a model, first to last; together they own all of its parameters."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Keyword arguments for ``timm.create_model`` that make the model take images of any size."""
    variants: Mapping[str, Callable[[Block], Block]] = field(default_factory=dict)
    """Other classes of blocks that may stand beside the plain one in a layer (``backbone.unit_blocks``)."""
    channels_last: bool = False
    """Whether the maps of a training in 16 bits lie channels-last in memory: where ``benchmarks/levers.py`` shows it to
    pay."""

    def of_class(self, kind: str, block: Block) -> Block:
        """The block as one of this class; ``plain`` is timm's own."""
        return block if kind == "plain" else self.variants[kind](block)
