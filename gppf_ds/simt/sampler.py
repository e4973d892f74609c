"""Which samples each device reads: every sample of a task once per epoch of that task, for any number of ranks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from gppf_ds.errors import UserError
from gppf_ds.seeding import ORDER, generator
from gppf_ds.simt.schedule import Schedule


def shuffled(positions: np.ndarray, size: int, seed: int, *key: int | str) -> np.ndarray:
    """Images of ``positions`` under a pseudo-random permutation of range(size); nothing of O(size) is stored.

    A four-round Feistel network over the next even power of two; values outside the range walk on along their cycle
    until they fall into it (Black and Rogaway, "Ciphers with arbitrary finite domains", 2002), at most 4 times as many
    rounds on average.
    """
    half_bits = max(1, (max(size - 1, 1).bit_length() + 1) // 2)
    mask = np.uint64((1 << half_bits) - 1)
    shift = np.uint64(half_bits)
    keys = generator(seed, *key).integers(1 << 32, size=4, dtype=np.uint64)
    values = positions.astype(np.uint64)
    outside: np.ndarray = np.ones(len(values), dtype=bool)
    while outside.any():
        left, right = values[outside] >> shift, values[outside] & mask
        for round_key in keys:
            left, right = right, left ^ (_mix(right, round_key) & mask)
        values[outside] = (left << shift) | right
        outside = values >= size
    return values.astype(np.int64)


def _mix(values: np.ndarray, key: np.uint64) -> np.ndarray:
    """A 64-bit finaliser (xor-shift-multiply); wraps on purpose."""
    with np.errstate(over="ignore"):
        values = (values + key) * np.uint64(0x9E3779B97F4A7C15)
        values = (values ^ (values >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)
        return values ^ (values >> np.uint64(32))


@dataclass(frozen=True)
class Request:
    """The batch that one device reads in one step: indices into the task's training set."""

    step: int
    device: int
    task: str
    epochs: tuple[int, ...]
    indices: tuple[int, ...]


class Sampler:
    """Deals samples to devices in schedule order.

    The only state is one cursor per task: how many of its samples have been dealt so far. It advances on all ranks
    alike, whoever reads the samples, so it means the same for any number of ranks and devices.

    Raises:
        UserError: a training set is empty.
    """

    def __init__(self, schedule: Schedule, sizes: Sequence[int], batch_sizes: Sequence[int]) -> None:
        for name, size in zip(schedule.tasks, sizes, strict=True):
            if size < 1:
                raise UserError(f"tasks.{name}: the training set has no sample: check its paths and filters.")
        self.schedule = schedule
        self.sizes = list(sizes)
        self.batch_sizes = list(batch_sizes)

    def requests(
        self, step: int, cursors: Sequence[int], devices: Sequence[int], num_devices: int
    ) -> tuple[list[Request], list[int]]:
        """The batches of ``devices`` in a step, and every task's cursor after it.

        Args:
            step: optimizer step.
            cursors: samples dealt before this step, by task.
            devices: the devices of this rank.
            num_devices: devices of all ranks.
        """
        tasks = self.schedule(step, num_devices)
        requests = [
            self._request(step, device, int(tasks[device]), cursors, int(np.sum(tasks[:device] == tasks[device])))
            for device in devices
        ]
        counts = np.bincount(tasks, minlength=len(cursors))
        after = [c + int(n) * b for c, n, b in zip(cursors, counts, self.batch_sizes, strict=True)]
        return requests, after

    def _request(self, step: int, device: int, task: int, cursors: Sequence[int], turn: int) -> Request:
        """The batch of the ``turn``-th device that runs ``task`` in this step."""
        size, batch = self.sizes[task], self.batch_sizes[task]
        positions = cursors[task] + turn * batch + np.arange(batch)
        epochs = positions // size
        indices = np.empty(batch, dtype=np.int64)
        name = self.schedule.tasks[task]
        for epoch in np.unique(epochs):
            inside = epochs == epoch
            indices[inside] = shuffled(positions[inside] % size, size, self.schedule.seed, ORDER, name, int(epoch))
        return Request(step, device, name, tuple(epochs.tolist()), tuple(indices.tolist()))

    def __call__(
        self, start: int, stop: int, cursors: Sequence[int], devices: Sequence[int], num_devices: int
    ) -> Iterator[Request]:
        """The requests of these devices from step ``start`` up to ``stop``, step by step."""
        for step in range(start, stop):
            requests, cursors = self.requests(step, cursors, devices, num_devices)
            yield from requests
