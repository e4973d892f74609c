"""Layer-synchronous reduction: a lego layer's gradients leave while the layers below it are still in backward.

Every rank walks the same parts in the same order (heads, last layer, ..., first layer), whatever its devices run, so
these collectives may share a process group with those of cross-task batch norm. What nobody used is not sent.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gppf_ds.simt.averaging import scale_for_average
from gppf_ds.simt.usage import Owner

Part = Mapping[Any, Sequence[tuple[nn.Parameter, Owner]]]
"""By process group (None: all ranks), the parameters whose gradients are summed over it."""


def split_into_parts(
    named: Sequence[tuple[str, nn.Parameter, Owner]], num_layers: int, peers: Callable[[nn.Parameter], Any]
) -> list[Part]:
    """The parameters of a :class:`gppf_ds.simt.model.SimtModel` in the order in which backward is done with them.

    Args:
        named: name, parameter and owner.
        num_layers: of the backbone.
        peers: the process group of the ranks that hold a parameter; None for all.

    Returns:
        1 + num_layers parts: the heads, then the layers from last to first.
    """
    parts: list[dict[Any, list[Any]]] = [{} for _ in range(num_layers + 1)]
    for name, parameter, owner in named:
        layer = int(name.split(".")[2]) if name.startswith("backbone.layers.") else num_layers
        parts[num_layers - layer].setdefault(peers(parameter), []).append((parameter, owner))
    return list(parts)


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
            for peers, parameters in part.items():
                gradients = scale_for_average(parameters, self.counts, strict=self._strict)
                if gradients and dist.get_world_size(peers) > 1:
                    flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
                    self._flying.append((flat, gradients, dist.all_reduce(flat, group=peers, async_op=True)))
        self._next = max(self._next, end)
