"""Layer-synchronous reduction: a lego layer's gradients leave while the layers below it are still in backward.

Every rank walks the same parts in the same order (heads, last layer, ..., first layer), whatever its devices run, so
these collectives may share a process group with those of cross-task batch norm. What nobody used is not sent. Layers
with few parameters wait for the next one and travel together.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gppf_ds.simt.averaging import scale_for_average
from gppf_ds.simt.usage import Owner

BUCKET_BYTES = 25 * 2**20
"""Gradients wait until so many are ready, as they do in torch's DDP: every message costs time of its own."""

ALONE_BYTES = 2**20
"""On a CPU it takes longer to copy so many into a message with others than to send one message more."""

Part = Mapping[Any, Sequence[tuple[nn.Parameter, Owner]]]
"""By process group (None: all ranks), the parameters whose gradients are summed over it."""


def split_into_parts(
    named: Sequence[tuple[str, nn.Parameter, Owner]],
    rows: Sequence[tuple[nn.Parameter, Owner]],
    num_layers: int,
    peers: Callable[[nn.Parameter], Any],
) -> list[Part]:
    """All parameters that learn, in the order in which backward is done with them.

    Args:
        named: name, parameter and owner of those of a :class:`gppf_ds.simt.model.SimtModel`.
        rows: of the controller, and their owners; every layer's backward adds to them.
        num_layers: of the backbone.
        peers: the process group of the ranks that hold a parameter; None for all.

    Returns:
        1 + num_layers parts: the heads, then the layers from last to first, the rows with the first.
    """
    parts: list[dict[Any, list[Any]]] = [{} for _ in range(num_layers + 1)]
    for name, parameter, owner in named:
        layer = int(name.split(".")[2]) if name.startswith("backbone.layers.") else num_layers
        parts[num_layers - layer].setdefault(peers(parameter), []).append((parameter, owner))
    parts[-1].setdefault(None, []).extend(rows)
    return list(parts)


class LayerwiseReduction:
    """Sums scaled gradients over all ranks, part by part, and leaves the task average in ``.grad``.

    Args:
        parts: from :func:`split_into_parts`.
        sizes: how many values each parameter of the network has; at ZeRO 3 it does not show while it is partitioned.
        bucket_bytes: what it takes to send before backward is done.
    """

    def __init__(
        self, parts: Sequence[Part], sizes: Mapping[nn.Parameter, int], bucket_bytes: int = BUCKET_BYTES
    ) -> None:
        self.parts = parts
        self._sizes = [_bytes_by_owner(part.get(None, ()), sizes) for part in parts[:-1]]
        self.bucket_bytes = bucket_bytes
        self.alone_bytes = ALONE_BYTES
        self.counts: Mapping[Owner, int] | None = None
        self._flying: list[Any] = []
        self._next = 0
        self._loss_scale, self._strict = 1.0, True

    def begin(self, counts: Mapping[Owner, int], loss_scale: float, strict: bool) -> None:
        """The next backward pass is the last one of the step; see :func:`scale_for_average` for the arguments."""
        self.counts, self._loss_scale, self._strict, self._next = counts, loss_scale, strict, 0

    def backward_reached(self, layer: int) -> None:
        """Backward is done with the heads and with all layers from ``layer`` on."""
        if self.counts is not None and layer > 0:  # autograd comes to the rows, which go with the first layer, last
            self._launch(len(self.parts) - layer)

    def finish(self) -> None:
        """Launches what is left and waits for everything."""
        self._launch(len(self.parts))
        for work in self._flying:
            work.wait()
        self._flying.clear()
        self.counts = None

    def _launch(self, end: int) -> None:
        assert self.counts is not None
        ready = self.parts[self._next : end]
        if end < len(self.parts) and self._bytes(self._next, end) < self.bucket_bytes:
            return
        together: dict[Any, list[tuple[nn.Parameter, Owner]]] = {}
        for part in ready:
            for peers, parameters in part.items():
                together.setdefault(peers, []).extend(parameters)
        for peers, parameters in together.items():
            gradients = scale_for_average(parameters, self.counts, self._loss_scale, self._strict)
            if dist.get_world_size(peers) > 1:
                for message in _messages(gradients, self.alone_bytes):
                    self._flying.append(dist.all_reduce(message, group=peers, async_op=True))
        self._next = max(self._next, end)

    def _bytes(self, start: int, end: int) -> int:
        """Of the gradients that all ranks send: the same number on each, so that they send at the same places."""
        assert self.counts is not None
        return sum(size for sizes in self._sizes[start:end] for owner, size in sizes.items() if self.counts[owner])


def _bytes_by_owner(
    parameters: Sequence[tuple[nn.Parameter, Owner]], sizes: Mapping[nn.Parameter, int]
) -> Mapping[Owner, int]:
    found: Counter[Owner] = Counter()
    for parameter, owner in parameters:
        found[owner] += parameter.element_size() * sizes[parameter]
    return found


def _messages(gradients: Sequence[Tensor], alone_bytes: int) -> list[Tensor]:
    """What is summed over the ranks: the short gradients as one, and on a CPU every long one where it lies."""
    short: list[Tensor] = []
    messages: list[Tensor] = []
    for gradient in gradients:
        if gradient.device.type == "cpu" and gradient.nbytes >= alone_bytes:
            gradient.data = gradient.contiguous()  # in the same order of values on every rank
            messages.append(gradient)
        else:
            short.append(gradient)
    return [_joined(short), *messages] if short else messages


def _joined(gradients: Sequence[Tensor]) -> Tensor:
    """One flat tensor of all values, in which the gradients lie from now on: their memory is free, and sums need no
    copying back."""
    flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
    for gradient, part in zip(gradients, flat.split([gradient.numel() for gradient in gradients]), strict=True):
        gradient.set_(part.view_as(gradient))
    return flat
