"""Placing the tasks of a step so that all ranks have about the same to do: schedule.kind balanced.

Which tasks a step has is not decided here, only where they run. So every expectation over the step's devices, and with
it the meaning of the sampling weights, stays what the schedule made it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from gppf_ds.errors import UserError

RESOLUTION = 2**20
"""Costs become whole numbers, the largest this one: ranks with different processors must not round differently."""


@dataclass(frozen=True)
class _Alike:
    """Groups of devices that hold the same tasks so far; they need not be told apart until all are dealt."""

    number: int
    tasks: tuple[int, ...]
    load: tuple[int, ...]
    """By phase."""

    def with_more(self, number: int, times: int, task: int, cost: Sequence[int]) -> _Alike:
        """So many of the groups, with more devices of one task in each."""
        load = tuple(held + times * own for held, own in zip(self.load, cost, strict=True))
        return _Alike(number, self.tasks + times * (task,), load)


def cost_matrix(tasks: Sequence[str], costs: Mapping[str, float | list[float]]) -> np.ndarray:
    """``schedule.costs`` in the order of the tasks, (tasks, phases); costs of other tasks are of no interest.

    Raises:
        UserError: a task has none, or they have different numbers of phases.
    """
    rows = []
    for name in tasks:
        if name not in costs:
            raise UserError(
                f"schedule.costs has no {name!r}: schedule.kind balanced needs the seconds of every task (gppf-ds plan "
                "measures them)."
            )
        cost = costs[name]
        rows.append(cost if isinstance(cost, list) else [cost])
        if len(rows[-1]) != len(rows[0]):
            raise UserError(
                f"schedule.costs.{name} has {len(rows[-1])} phases, that of {tasks[0]} {len(rows[0])}: give all tasks "
                "as many."
            )
    return np.array(rows, dtype=float)


def balanced(tasks: np.ndarray, costs: np.ndarray, devices_per_rank: int, random: np.random.Generator) -> np.ndarray:
    """The tasks of a step in an order in which all ranks have about the same to do.

    The devices that pass through the network together on one rank form a group. Longest processing time first (Graham,
    "Bounds on multiprocessing timing anomalies", 1969), with at most ``devices_per_rank`` devices in a group: task by
    task, the costliest first, each device goes where it adds least to the sum of the squared loads. With one phase that
    is the group with the least load; with several, phases that end in a barrier each are evened out one by one. Groups,
    and places within a group, are then permuted at random: if every device had the same marginals before, it keeps
    them. The time does not depend on the number of devices, save for counting and permuting.

    Args:
        tasks: index of every device's task, (devices,); devices is a multiple of ``devices_per_rank``.
        costs: of a device of each task, in any unit, by phase, (tasks, phases), not negative.
        devices_per_rank: neighbouring devices that make a group.
        random: of the step.

    Returns:
        A permutation of ``tasks``, (devices,), int64.
    """
    whole = np.rint(costs * (RESOLUTION / max(costs.max(), np.finfo(float).tiny))).astype(np.int64).tolist()
    counts = np.bincount(tasks, minlength=len(whole)).tolist()
    groups = [_Alike(len(tasks) // devices_per_rank, (), (0,) * len(whole[0]))]
    for task in sorted(range(len(whole)), key=lambda t: -_dot(whole[t], whole[t])):
        groups = _deal(groups, task, whole[task], counts[task], devices_per_rank)
    held = np.repeat([group.tasks for group in groups], [group.number for group in groups], axis=0)
    return random.permuted(random.permutation(held), axis=1).reshape(-1).astype(np.int64, copy=False)


def _deal(groups: Sequence[_Alike], task: int, cost: Sequence[int], count: int, places: int) -> list[_Alike]:
    """The groups after ``count`` devices of one task have gone, one by one, where the sum of squares grows least."""
    square = _dot(cost, cost)
    # Of |load + cost|^2 - |load|^2 what differs between groups; a group's next device costs the square more each time.
    growth = sorted(
        (_dot(cost, group.load) + turn * square, index)
        for index, group in enumerate(groups)
        for turn in range(places - len(group.tasks))
    )
    given = [0] * len(groups)
    after: list[_Alike] = []
    for _, index in growth:
        group = groups[index]
        if count < group.number:  # the last devices do not reach all groups of a kind
            if count:
                after.append(group.with_more(count, given[index] + 1, task, cost))
            after.append(group.with_more(group.number - count, given[index], task, cost))
            given[index] = -1
            break
        given[index] += 1
        count -= group.number
    after += [
        group.with_more(group.number, times, task, cost)
        for group, times in zip(groups, given, strict=True)
        if times >= 0
    ]
    return after


def _dot(one: Sequence[int], other: Sequence[int]) -> int:
    return sum(a * b for a, b in zip(one, other, strict=True))
