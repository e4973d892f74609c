"""The schedule: a pure function (seed, step) -> the task of every device, known to every rank without communication."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from gppf_ds.config import ScheduleConfig
from gppf_ds.errors import UserError
from gppf_ds.seeding import SCHEDULE, generator
from gppf_ds.simt.balance import balanced, cost_matrix

GOLDEN = (5**0.5 - 1) / 2


@dataclass(frozen=True)
class Schedule:
    """Assigns tasks to devices (GPPF section 3.2, algorithm SIMT).

    Attributes:
        tasks: task names; a device's task is an index into them.
        probabilities: of each task, summing to 1.
        config: the kind of schedule.
        seed: of the run.
        per_rank, groups: see :meth:`from_weights`.
    """

    tasks: tuple[str, ...]
    probabilities: tuple[float, ...]
    config: ScheduleConfig
    seed: int
    per_rank: int = 1
    groups: int = 1

    @classmethod
    def from_weights(
        cls,
        weights: Mapping[str, float],
        config: ScheduleConfig,
        seed: int,
        per_rank: int = 1,
        groups: int = 1,
    ) -> Schedule:
        """A schedule for tasks with these sampling weights.

        Args:
            weights: by task.
            config: the kind.
            seed: of the run.
            per_rank, groups: devices per rank and accumulation, which matter to kinds balanced and accumulate alone.

        Raises:
            UserError: no task at all, a static map that names a task that is not there, a task without the cost that
                balancing needs, or a rank that cannot run every task equally often.
        """
        if not weights:
            raise UserError("tasks is empty: give at least one task.")
        for name in config.static:
            if name not in weights:
                raise UserError(f"schedule.static names the task {name!r}, which is not among tasks: {list(weights)}.")
        if config.kind == "balanced":
            cost_matrix(list(weights), config.costs)
        if config.kind == "accumulate" and per_rank * groups % len(weights):
            raise UserError(
                f"schedule.kind accumulate: every rank runs each of the {len(weights)} tasks, so "
                f"engine.devices_per_rank times engine.accumulation must be a multiple of {len(weights)}, "
                f"not {per_rank} x {groups}."
            )
        total = sum(weights.values())
        probabilities = tuple(w / total for w in weights.values())
        return cls(tuple(weights), probabilities, config, seed, per_rank, groups)

    def __call__(self, step: int, num_devices: int) -> np.ndarray:
        """The task index of every device in a step, shape (num_devices,), int64. O(num_devices), any step."""
        match self.config.kind:
            case "iid":
                return self._draw(generator(self.seed, SCHEDULE, step).random(num_devices))
            case "per_batch":
                return np.repeat(self._draw(generator(self.seed, SCHEDULE, step).random(1)), num_devices)
            case "stratified":
                return generator(self.seed, SCHEDULE, step).permutation(self._stratified(step, num_devices))
            case "balanced":
                drawn, costs = self._stratified(step, num_devices), cost_matrix(self.tasks, self.config.costs)
                return balanced(drawn, costs, self.per_rank, generator(self.seed, SCHEDULE, step))
            case "static":
                order = np.array([self.tasks.index(name) for name in self.config.static])
                return order[np.arange(num_devices) % len(order)]
            case "accumulate":
                group, inside = np.divmod(np.arange(num_devices), num_devices // self.groups)
                return (group * self.per_rank + inside % self.per_rank) % len(self.tasks)

    def _draw(self, uniform: np.ndarray) -> np.ndarray:
        """Tasks at these quantiles of the task distribution."""
        edges = np.cumsum(self.probabilities)
        return np.minimum(np.searchsorted(edges, uniform, side="right"), len(self.tasks) - 1)

    def _stratified(self, step: int, num_devices: int) -> np.ndarray:
        """Systematic sampling: one quantile in each of ``num_devices`` equal strata, in order.

        The common offset moves by the golden ratio from step to step. For a random start each offset is uniform, so
        tasks that are dealt to the devices at random have the marginals of ``iid`` on each of them; and by the
        three-distance theorem no interval of length x stays unvisited for 2.62 / x steps, so a task with probability p
        appears at least once in any ceil(2.62 / (p * num_devices)) steps.
        """
        start = generator(self.seed, SCHEDULE, "offset").random()
        offset = (start + step * GOLDEN) % 1.0
        return self._draw((np.arange(num_devices) + offset) / num_devices)
