"""A part of each training set that training never deals, on which every task's own loss can be measured."""

from __future__ import annotations

from typing import Any

import numpy as np

from gppf_ds.errors import UserError
from gppf_ds.seeding import ORDER
from gppf_ds.simt.sampler import shuffled
from gppf_ds.tasks.task import Dataset

SHARE = 10
"""At most one of so many samples is held out."""


class Part:
    """Some samples of a data set, spread over it at random.

    Args:
        whole: the data set.
        positions: in its random order.
        key: (seed, name) of that order.
    """

    def __init__(self, whole: Dataset, positions: range, key: tuple[int, str]) -> None:
        self.whole, self.positions, self.key = whole, positions, key

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, index: int) -> Any:
        seed, name = self.key
        place = np.array([self.positions[index]])
        return self.whole[int(shuffled(place, len(self.whole), seed, ORDER, "held out", name)[0])]


def split_off(whole: Dataset, images: int, batch_size: int, seed: int, name: str) -> tuple[Part, Part]:
    """What a task trains on, and what is held out: whole batches, of about ``images`` images, but of one at least.

    Args:
        whole: the task's training set.
        images: to hold out; no more than a tenth is, unless a batch is more.
        batch_size: of the task.
        seed: of the run.
        name: of the task.

    Raises:
        UserError: the training set is too small for that.
    """
    size = len(whole)
    count = max(1, min(images, size // SHARE) // batch_size) * batch_size
    if size < 2 * count:
        raise UserError(
            f"tasks.{name}: a training set of {size} samples is too small to hold out a batch of {batch_size} for "
            "backbone.moe.adaptive: lower batch_size, or leave adaptive out."
        )
    return Part(whole, range(count, size), (seed, name)), Part(whole, range(count), (seed, name))
