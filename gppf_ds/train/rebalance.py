"""Batch sizes and devices per rank under which ranks hardly wait for each other, with every task's share as it was.

No proposal lets a task see fewer images in a step, and none touches weights, steps or learning rate: the task average
makes a task's expected gradient independent of its batch size and of how many devices share its images.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import yaml

from gppf_ds.config import ScheduleConfig
from gppf_ds.errors import UserError
from gppf_ds.train.simulation import Costs, Forecast, Layout, Tasks, simulate

SPLITS = (1, 2, 3, 4, 6, 8)
"""Into how many devices a device's batch is divided."""
LEAST_BATCH = 2
"""Images of a divided batch: norms of heads have only their own device's."""
CLOSE_ENOUGH = 1.02
"""Of two proposals whose steps differ by less than this factor the one that changes less is taken."""

Schedules = Callable[[ScheduleConfig, Layout], Tasks]
"""The run's schedule under other settings."""


@dataclass(frozen=True)
class Proposal:
    """Other settings of a recipe, and what they are expected to bring."""

    layout: Layout
    schedule: ScheduleConfig
    filled: bool
    """Whether lighter tasks read more images, in time that their ranks would spend waiting."""
    forecast: Forecast
    fits: bool
    """Into a rank's memory, as far as that is known."""


def propose(costs: Costs, layout: Layout, schedules: Schedules, steps: Sequence[int]) -> list[Proposal]:
    """Ways to balance a run, those that change least first.

    Every device's batch is divided among several devices of its rank, which a balanced schedule places; as it is, and
    with the batches of lighter tasks filled up until all take as long as the heaviest.

    Args:
        costs: at the recipe's batch sizes.
        layout: the recipe's.
        schedules: of the run.
        steps: to simulate.
    """
    proposals = []
    for filled in (False, True):
        for split in SPLITS:
            sizes = {name: -(-cost.batch_size // split) for name, cost in costs.tasks.items()}
            if split > 1 and min(sizes.values()) < LEAST_BATCH:
                continue
            divided = costs.at(sizes)
            after = divided.at(_filled(divided)) if filled else divided
            spread = replace(layout, per_rank=layout.per_rank * split)
            schedule = ScheduleConfig(kind="balanced", costs=_told(after))
            forecast = simulate(schedules(schedule, spread), after, spread, steps)
            fits = costs.capacity is None or forecast.memory <= costs.capacity
            proposals.append(Proposal(spread, schedule, filled, forecast, fits))
    return proposals


def _filled(costs: Costs) -> dict[str, int]:
    """The largest batches, not below the present ones, that take at most as long as the heaviest task's does."""
    longest = max(sum(cost.seconds) for cost in costs.tasks.values())
    sizes = {}
    for name, cost in costs.tasks.items():
        each = (sum(cost.seconds) - sum(cost.start)) / cost.batch_size
        room = int((longest - sum(cost.start)) / each + 1e-9) if each > 0 else cost.batch_size
        sizes[name] = max(cost.batch_size, room)
    return sizes


def _told(costs: Costs) -> dict[str, float | list[float]]:
    """``schedule.costs``, to four digits."""
    phases = {name: [float(f"{seconds:.4g}") for seconds in cost.seconds] for name, cost in costs.tasks.items()}
    return {name: own if len(own) > 1 else own[0] for name, own in phases.items()}


def choose(proposals: Sequence[Proposal], aim: float) -> Proposal:
    """The proposal whose steps are shortest among those that reach a busy share; if none does, the busiest.

    Raises:
        UserError: none fits into memory.
    """
    fitting = [proposal for proposal in proposals if proposal.fits]
    if not fitting:
        raise UserError("no proposal fits into a rank's memory, nor does the recipe: lower its batch sizes first.")
    reaching = [proposal for proposal in fitting if proposal.forecast.busy >= aim]
    if not reaching:
        return max(fitting, key=lambda proposal: proposal.forecast.busy)
    shortest = min(proposal.forecast.step_seconds for proposal in reaching)
    return next(p for p in reaching if p.forecast.step_seconds <= CLOSE_ENOUGH * shortest)


def write_recipe(path: Path, base: Path, output: str, proposal: Proposal, before: Mapping[str, int], why: str) -> None:
    """Writes a recipe that inherits another one and holds only what the proposal changes.

    Args:
        path: to write; must not exist.
        base: the recipe to inherit.
        output: the new recipe's.
        proposal: what to change.
        before: the batch sizes of ``base``.
        why: a line of comment.

    Raises:
        UserError: the file is there already.
    """
    if path.exists():
        raise UserError(f"--balance: {path} is there already: name a new file.")
    after = proposal.forecast.batch_sizes
    changed = {n: {"init_args": {"batch_size": size}} for n, size in after.items() if size != before[n]}
    content = {
        "inherit": os.path.relpath(base.absolute(), path.absolute().parent),
        "output": output,
        "engine": {"devices_per_rank": proposal.layout.per_rank},
        "schedule": {"kind": "balanced", "static": [], "costs": proposal.schedule.costs},
    } | ({"tasks": changed} if changed else {})
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"# {why}\n{yaml.safe_dump(content, sort_keys=False, default_flow_style=None)}")
