"""What the runs of a study came to, from what they have written."""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from gppf_ds.study.plan import Run, Study
from gppf_ds.train import history, recipe, record, spent
from gppf_ds.train.claims import result

Curve = dict[int, float]
"""A loss by step."""


@dataclass
class Result:
    """One arm with one seed; of an arm with a run for each task, all of them together."""

    finished: bool
    failed: bool
    """Whether a run ended by a fault, such as losses that are not finite any more."""
    metrics: dict[str, dict[str, float]] = field(default_factory=dict)
    """By task, of the runs that are finished."""
    losses: dict[str, Curve] = field(default_factory=dict)
    """By task, as far as metrics.jsonl goes."""
    seconds: float = 0.0
    """Of training steps, waiting for data included."""
    images: int = 0


@dataclass(frozen=True)
class Measure:
    """A column of the tables."""

    task: str
    metric: str
    higher_is_better: bool


@dataclass
class Results:
    """Of a whole study."""

    measures: list[Measure]
    by_arm: dict[str, dict[int, Result]]
    """Arm, then seed."""

    def values(self, arm: str, measure: Measure) -> dict[int, float]:
        """A metric by seed, of the runs that are finished and have it."""
        found = {}
        for seed, one in self.by_arm[arm].items():
            value = one.metrics.get(measure.task, {}).get(measure.metric)
            if value is not None:
                found[seed] = value
        return found


@dataclass(frozen=True)
class Spread:
    """Of some values."""

    mean: float
    deviation: float | None
    """Sample standard deviation; of a single value there is none."""
    count: int


def spread(values: Sequence[float]) -> Spread | None:
    """Mean and deviation; None of no values."""
    if not values:
        return None
    return Spread(statistics.mean(values), statistics.stdev(values) if len(values) > 1 else None, len(values))


def differences(results: Results, arm: str, baseline: str, measure: Measure) -> list[float]:
    """How much more an arm has than the baseline, of every seed that both have."""
    own, base = results.values(arm, measure), results.values(baseline, measure)
    return [value - base[seed] for seed, value in own.items() if seed in base]


def furthest(results: Results, arm: str, baseline: str) -> tuple[float, int] | None:
    """The largest distance of a loss from the baseline's of the same seed, task and step, relative to it; its step."""
    found = [
        (abs(loss - base[step]) / max(abs(base[step]), 1e-12), step)
        for seed, one in results.by_arm[arm].items()
        for task, curve in one.losses.items()
        for base in [results.by_arm[baseline][seed].losses.get(task, {})]
        for step, loss in curve.items()
        if step in base
    ]
    return max(found, default=None)


def collect(plan: Study) -> Results:
    """Reads what there is of every run that the tables show."""
    by_arm = {arm: {seed: _together(plan.of(arm, seed)) for seed in plan.config.seeds} for arm in plan.shown}
    return Results(_measures(plan), by_arm)


def _together(runs: Sequence[Run]) -> Result:
    found = [result(run.folder, run.steps) for run in runs]
    states = [record.read_state(run.folder).get("state") for run in runs]
    one = Result(finished=None not in found, failed="failed" in states)
    for run, metrics in zip(runs, found, strict=True):
        one.metrics |= metrics or {}
        if metrics is not None and run.evaluation.is_file():
            one.metrics |= json.loads(run.evaluation.read_text())["metrics"]
        one.losses |= _losses(run.folder / "metrics.jsonl")
        for line in history.read(run.folder / spent.FILE):  # what a resumed run did twice counts twice
            one.seconds += line["seconds"].get("step", 0.0) + line["seconds"].get("data", 0.0)
            one.images += line["images"]
    return one


def _losses(path: Path) -> dict[str, Curve]:
    curves: dict[str, Curve] = {}
    for line in history.latest(history.read(path)):
        for task, loss in line.get("losses", {}).items():
            curves.setdefault(task, {})[line["step"]] = loss
    return curves


def _measures(plan: Study) -> list[Measure]:
    """The columns: of every task that a shown arm trains, the metrics that the study names, or its headline."""
    found: dict[str, Any] = {}
    for arm in plan.shown:
        for run in plan.of(arm, plan.config.seeds[0]):
            new = [name for name in run.content["tasks"] if name not in found]
            if new and (run.folder / "config.yaml").is_file():
                tasks = recipe.read_run(run.folder).tasks
                found |= {name: tasks[name] for name in new}
    return [
        Measure(name, metric, task.higher_is_better)
        for name, task in found.items()
        for metric in plan.config.metrics.get(name, [task.headline])
    ]


def as_json(plan: Study, results: Results) -> dict[str, Any]:
    """The raw numbers, for ``study.json``."""
    arms: dict[str, Any] = {}
    for arm, by_seed in results.by_arm.items():
        arms[arm] = {
            str(seed): {
                "finished": one.finished,
                "failed": one.failed,
                "metrics": one.metrics,
                "seconds": round(one.seconds, 1),
                "images": one.images,
            }
            for seed, one in by_seed.items()
        }
    return {
        "title": plan.config.title,
        "baseline": plan.baseline,
        "steps": {arm: plan.of(arm, plan.config.seeds[0])[0].steps for arm in results.by_arm},
        "versions": record.versions(),
        "hardware": torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} CPU cores",
        "arms": arms,
    }
