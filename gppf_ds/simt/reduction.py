"""Layer-synchronous reduction: a lego layer's gradients leave while the layers below it are still in backward.

Every rank walks the same parts in the same order (heads, last layer, ..., first layer), whatever its devices run, so
these collectives may share a process group with those of cross-task batch norm. What nobody used is not sent.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gppf_ds.simt.averaging import scale_for_average
from gppf_ds.simt.usage import Owner

Part = Sequence[tuple[nn.Parameter, Owner]]


def split_into_parts(named: Sequence[tuple[str, nn.Parameter, Owner]], num_layers: int) -> list[list[Any]]:
    """The parameters of a :class:`gppf_ds.simt.model.SimtModel` in the order in which backward is done with them.

    Returns:
        1 + num_layers lists of (parameter, owner): the heads, then the layers from last to first.
    """
    parts: list[list[Any]] = [[] for _ in range(num_layers + 1)]
    for name, parameter, owner in named:
        layer = int(name.split(".")[2]) if name.startswith("backbone.layers.") else num_layers
        parts[num_layers - layer].append((parameter, owner))
    return parts


class LayerwiseReduction:
    """Sums scaled gradients over all ranks, part by part, and leaves the task average in ``.grad``.

    Args:
        parts: from :func:`split_into_parts`.
    """

    def __init__(self, parts: Sequence[Part]) -> None:
        self.parts = parts
        self.counts: Mapping[Owner, int] | None = None
        self._flying: list[tuple[Tensor, list[Tensor], Any]] = []
        self._next = 0
        self._strict = True

    def begin(self, counts: Mapping[Owner, int], strict: bool) -> None:
        """The next backward pass is the last one of the step; see :func:`scale_for_average` for the arguments."""
        self.counts, self._strict, self._next = counts, strict, 0

    def backward_reached(self, layer: int) -> None:
        """Backward is done with the heads and with all layers from ``layer`` on."""
        if self.counts is not None:
            self._launch(len(self.parts) - layer)

    def finish(self) -> None:
        """Launches what is left and waits for everything."""
        self._launch(len(self.parts))
        for flat, gradients, work in self._flying:
            if work is not None:
                work.wait()
            start = 0
            for gradient in gradients:
                gradient.copy_(flat[start : start + gradient.numel()].view_as(gradient))
                start += gradient.numel()
        self._flying.clear()
        self.counts = None

    def _launch(self, end: int) -> None:
        assert self.counts is not None
        for part in self.parts[self._next : end]:
            gradients = scale_for_average(part, self.counts, strict=self._strict)
            if gradients and dist.get_world_size() > 1:
                flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
                self._flying.append((flat, gradients, dist.all_reduce(flat, async_op=True)))
        self._next = max(self._next, end)
