"""An optimizer step that leaves parameters nobody used exactly as they are, over partitions that hold many of them.

ZeRO flattens parameters, so that to the optimizer a whole partition is one parameter. Zero gradients are not enough
for the unused ones among them: weight decay, momentum and Adam's moments would still move. So the step runs on views of
the flat tensor, one for each model parameter, and an unused one gets no gradient: torch's own rule for "skip".
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Partition:
    """A flat fp32 tensor that DeepSpeed hands to the optimizer as one parameter."""

    flat: Tensor
    group: int
    """The optimizer's parameter group."""
    segments: list[Segment]


@dataclass(frozen=True)
class Segment:
    """The part of one model parameter that a flat partition holds."""

    name: str
    """Of the model parameter."""
    start: int
    """Of the part within the flattened parameter."""
    offset: int
    """Of the part within the flat partition."""
    length: int


class MaskedOptimizer:
    """Steps the segments of flat partitions with the class and hyper-parameters of the optimizer that owns them.

    Args:
        base: the optimizer that DeepSpeed steps.
        partitions: this rank's flat tensors.
    """

    def __init__(self, base: torch.optim.Optimizer, partitions: Sequence[Partition]) -> None:
        self.base = base
        self._parts = {
            id(partition.flat): [
                (s, partition.flat.detach()[s.offset : s.offset + s.length].requires_grad_())
                for s in partition.segments
            ]
            for partition in partitions
        }
        groups, self._sources = [], []
        for index, source in enumerate(base.param_groups):
            views = [v for p in partitions if p.group == index for _, v in self._parts[id(p.flat)]]
            if views:
                groups.append({**source, "params": views})
                self._sources.append(source)
        self.optimizer = type(base)(groups) if groups else None  # type: ignore[call-arg]
        self.users: Callable[[str], int] = lambda name: 1
        base.step = self.step  # type: ignore[method-assign,assignment]

    @property
    def views(self) -> list[tuple[Segment, Tensor]]:
        """Every segment with its values."""
        return [part for parts in self._parts.values() for part in parts]

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """The step of the flat tensors that have a gradient now; ``users`` says how many devices used a parameter."""
        if self.optimizer is None:
            return
        for target, source in zip(self.optimizer.param_groups, self._sources, strict=True):
            target.update({key: value for key, value in source.items() if key != "params"})
        active: list[Tensor] = []
        for group in self.base.param_groups:
            for flat in group["params"]:
                for segment, view in self._parts[id(flat)]:
                    if flat.grad is not None and self.users(segment.name) > 0:
                        view.grad = flat.grad[segment.offset : segment.offset + segment.length]
                        active.append(view)
        self.optimizer.step()
        for view in active:
            view.grad = None


@dataclass
class Fragment:
    """A contiguous part of one parameter on this rank, with its optimizer state: the unit of our checkpoints."""

    name: str
    start: int
    master: Tensor
    """The fp32 values that the optimizer steps, flat."""
    state: dict[str, Tensor]
    """Optimizer state by name; tensors of the master's length, or single numbers."""
    shape: tuple[int, ...] = ()
    """Of the whole parameter."""


def fragments_of(views: Iterable[tuple[str, int, Tensor]], state: Mapping[Tensor, Mapping[str, Any]]) -> list[Fragment]:
    """Fragments of (name, start, tensor) triples, in a torch optimizer's state dictionary."""
    return [
        Fragment(
            name, start, tensor.detach().view(-1), {k: v for k, v in state.get(tensor, {}).items() if v is not None}
        )
        for name, start, tensor in views
    ]
