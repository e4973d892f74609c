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
        base: the optimizer that DeepSpeed steps; one flat tensor per parameter group, in the same order as ``layout``.
        layout: for every flat tensor its segments.
    """

    def __init__(self, base: torch.optim.Optimizer, layout: Sequence[tuple[Tensor, Sequence[Segment]]]) -> None:
        self.base = base
        self.views: list[tuple[Segment, Tensor]] = []
        self._parts: dict[int, list[tuple[Segment, Tensor]]] = {}
        groups: list[dict[str, Any]] = []
        self._sources: list[dict[str, Any]] = []
        for group in base.param_groups:
            views: list[tuple[Segment, Tensor]] = []
            for flat, segments in layout:
                if any(flat is parameter for parameter in group["params"]):
                    parts = [
                        (s, flat.detach()[s.offset : s.offset + s.length].requires_grad_())
                        for s in segments
                        if s.length > 0
                    ]
                    self._parts[id(flat)] = parts
                    views.extend(parts)
            if views:
                groups.append({**group, "params": [view for _, view in views]})
                self._sources.append(group)
            self.views.extend(views)
        self.optimizer = type(base)(groups) if groups else None  # type: ignore[call-arg]
        self.users: Callable[[str], int] = lambda name: 1
        base.step = self.step  # type: ignore[method-assign,assignment]

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
                for segment, view in self._parts.get(id(flat), []):
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


def fragments_of(views: Iterable[tuple[str, int, Tensor]], state: Mapping[Tensor, Mapping[str, Any]]) -> list[Fragment]:
    """Fragments of (name, start, tensor) triples, in a torch optimizer's state dictionary."""
    return [
        Fragment(
            name, start, tensor.detach().view(-1), {k: v for k, v in state.get(tensor, {}).items() if v is not None}
        )
        for name, start, tensor in views
    ]
