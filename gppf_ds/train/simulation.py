"""The arithmetic of a plan: from what every task costs to what a run's steps will take. No model, no data, no clock."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

Tasks = Callable[[int], np.ndarray]
"""step -> the index of every device's task, in device order."""


@dataclass(frozen=True)
class Cost:
    """What one device's batch of a task costs."""

    batch_size: int
    seconds: tuple[float, ...]
    """By phase: after each of them the ranks wait for each other."""
    start: tuple[float, ...]
    """Of these, what a batch of any size takes."""
    memory: float
    """Bytes that the batch holds until backward has passed."""

    def at(self, batch_size: int) -> Cost:
        """The cost of a batch of another size: a start, and so much for each image."""
        share = batch_size / self.batch_size
        pairs = zip(self.seconds, self.start, strict=True)
        seconds = tuple(start + share * (whole - start) for whole, start in pairs)
        return replace(self, batch_size=batch_size, seconds=seconds, memory=share * self.memory)


@dataclass(frozen=True)
class Costs:
    """What the tasks and the rest of a step cost on one kind of hardware."""

    tasks: Mapping[str, Cost]
    seconds: float = 0.0
    """Of a step on every rank alike, whatever its devices do: optimizer, communication."""
    group_seconds: float = 0.0
    """Of each group of devices on every rank alike, however many a rank has: what all ranks wait for in batch norms."""
    memory: float = 0.0
    """Bytes that a rank holds between steps: parameters, gradients, optimizer."""
    capacity: float | None = None
    """Bytes of memory that a rank has; None where that is not known."""

    def at(self, batch_sizes: Mapping[str, int]) -> Costs:
        """The costs with batches of these sizes."""
        return replace(self, tasks={name: cost.at(batch_sizes[name]) for name, cost in self.tasks.items()})

    def alike(self, groups: int) -> float:
        """Seconds of a step of so many groups that every rank spends, whatever its devices do."""
        return self.seconds + groups * self.group_seconds

    def matrix(self) -> np.ndarray:
        """Seconds of a device of each task by phase, (tasks, phases)."""
        return np.array([cost.seconds for cost in self.tasks.values()])


@dataclass(frozen=True)
class Layout:
    """Where the devices of a step are: ``ranks * per_rank * groups`` of them, numbered as the engine does."""

    ranks: int
    per_rank: int
    """Devices that a rank advances together: engine.devices_per_rank."""
    groups: int
    """Run one after another: engine.accumulation."""

    @property
    def devices(self) -> int:
        return self.ranks * self.per_rank * self.groups


@dataclass(frozen=True)
class Forecast:
    """What the steps of a run are expected to be like."""

    step_seconds: float
    """Mean."""
    busy: float
    """Share of all ranks' time in which they do not wait for a slower one."""
    devices: dict[str, float]
    """That run each task in a step, on average."""
    present: dict[str, float]
    """Share of the steps in which some device runs the task."""
    memory: float
    """Bytes that the fullest rank needs."""
    batch_sizes: dict[str, int]

    def images(self, task: str) -> float:
        """That a step reads of a task, on average."""
        return self.devices[task] * self.batch_sizes[task]


def simulate(tasks: Tasks, costs: Costs, layout: Layout, steps: Sequence[int]) -> Forecast:
    """Goes through the schedule of some steps and adds up what their devices cost.

    The devices of a rank run one after another, phase by phase, and a phase ends when the slowest rank is done: batch
    norms and the check of the losses are collective. So a step takes
    ``costs.alike(groups) + sum over groups and phases of max over ranks of the rank's sum``.

    Args:
        tasks: the schedule, for ``layout.devices`` devices.
        costs: of the tasks, in the order of their indices.
        layout: of the devices.
        steps: to go through.
    """
    seconds = costs.matrix()
    memory = np.array([cost.memory for cost in costs.tasks.values()])
    longest, own, fullest = 0.0, 0.0, 0.0
    counts = np.zeros((len(steps), len(costs.tasks)))
    for row, step in enumerate(steps):
        placed = tasks(step)
        counts[row] = np.bincount(placed, minlength=len(costs.tasks))
        groups = placed.reshape(layout.groups, layout.ranks, layout.per_rank)
        load = seconds[groups].sum(2)
        longest += float(load.max(1).sum())
        own += float(load.mean(1).sum())
        fullest = max(fullest, float(memory[groups].sum(2).max()))
    alike = costs.alike(layout.groups) * len(steps)
    return Forecast(
        step_seconds=(longest + alike) / len(steps),
        busy=(own + alike) / (longest + alike),
        devices=dict(zip(costs.tasks, counts.mean(0).tolist(), strict=True)),
        present=dict(zip(costs.tasks, (counts > 0).mean(0).tolist(), strict=True)),
        memory=costs.memory + fullest,
        batch_sizes={name: cost.batch_size for name, cost in costs.tasks.items()},
    )
