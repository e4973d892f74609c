"""Where the wall time of a run goes: ``time.jsonl``, written by the main rank."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from gppf_ds.train import history

FILE = "time.jsonl"
Kind = Literal["data", "step", "evaluation", "checkpoint"]
"""Waiting for data; the optimizer step (preparing batches on the device included); evaluating; saving."""


class Spent:
    """Adds up the seconds of each kind of work and appends them to ``time.jsonl``.

    Args:
        folder: of the run.
        main: whether this is the rank that writes.
        start: optimizer steps already done.
    """

    def __init__(self, folder: Path, main: bool, start: int) -> None:
        self.path = folder / FILE
        self.main = main
        self._done = start
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._images = 0

    @contextmanager
    def on(self, kind: Kind) -> Iterator[None]:
        """Counts the time of the block."""
        started = time.monotonic()
        yield
        self._seconds[kind] += time.monotonic() - started

    def step(self, seconds: float, data: float, images: int) -> None:
        """Counts an optimizer step.

        Args:
            seconds: of the step, waiting for data included.
            data: seconds of it that this rank waited for data.
            images: of all ranks in this step.
        """
        self._seconds["step"] += seconds - data
        self._seconds["data"] += data
        self._images += images
        self._done += 1

    def write(self) -> None:
        """Appends what has come together since the last line, and begins anew."""
        if self.main and self._seconds:
            seconds = {kind: round(value, 4) for kind, value in self._seconds.items()}
            history.append(self.path, {"step": self._done, "images": self._images, "seconds": seconds})
        self._seconds.clear()
        self._images = 0
