"""A step's time in four parts that sum to it: compute, waiting for data, waiting for slower ranks, communication."""

from __future__ import annotations

from collections.abc import Collection

import torch

from gppf_ds.monitor.collectives import CollectiveClock
from gppf_ds.monitor.metrics import Metrics

SEVERAL = "several"
"""Stands for the task where a rank's devices ran different ones, which advance layer by layer together."""
PARTS = ("compute", "data_wait", "straggler_wait", "communication")
MAX_UNSETTLED = 100
"""Steps after which the ranks compare what they noted, whether anybody asks or not: it is held until then."""


class TimeSplit:
    """Of one rank; all ranks make theirs and use it alike.

    Args:
        metrics: to tell.
        device: of this rank.
    """

    def __init__(self, metrics: Metrics, device: torch.device) -> None:
        self.metrics = metrics
        self.clock = CollectiveClock(device)
        self._steps: list[tuple[str, float, float]] = []
        self._begin()

    def _begin(self) -> None:
        self._count, self._total = 0, dict.fromkeys(PARTS, 0.0)

    def step(self, tasks: Collection[str], seconds: float, waited: float) -> None:
        """A step is done whose collectives the clock has timed; every so often a collective call.

        Args:
            tasks: of this rank's devices.
            seconds: of the whole step.
            waited: seconds of it that this rank waited for data.
        """
        distinct = set(tasks)
        self._steps.append((distinct.pop() if len(distinct) == 1 else SEVERAL, seconds, waited))
        if len(self._steps) == MAX_UNSETTLED:
            self._compare()

    def settle(self) -> dict[str, float]:
        """What the steps since the last call were spent on, in mean seconds of a step by part; a collective call."""
        self._compare()
        mean = {part: round(seconds / max(1, self._count), 5) for part, seconds in self._total.items()}
        self._begin()
        return mean

    def _compare(self) -> None:
        steps, self._steps = self._steps, []
        for (task, seconds, waited), talk in zip(steps, self.clock.settle(), strict=True):
            others = waited + talk.straggler_wait + talk.communication
            # On a GPU the collectives are timed by the device and the step by the host, which may run ahead a little.
            values = (max(0.0, seconds - others), waited, talk.straggler_wait, talk.communication)
            parts = dict(zip(PARTS, values, strict=True))
            self.metrics.split(task, parts)
            self._count += 1
            self._total = {part: before + parts[part] for part, before in self._total.items()}
