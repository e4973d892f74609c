"""What the networks of a study's arms cost: parameters that learn, are held and are active, and FLOPs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from gppf_ds.study.plan import Study
from gppf_ds.train import recipe
from gppf_ds.train.claims import result
from gppf_ds.train.restore import load_trained
from gppf_ds.transfer import costs, counts


def of_arms(plan: Study) -> dict[str, dict[str, Any]]:
    """Of every arm with a finished first seed: ``learn`` and ``held`` parameters, and by task ``active`` ones and
    ``gflops`` of an image; an arm with a run for each task counts them all."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found: dict[str, dict[str, Any]] = {}
    for arm in plan.shown:
        runs = plan.of(arm, plan.config.seeds[0])
        if any(result(run.folder, run.steps) is None for run in runs):
            continue
        learn = held = 0
        tasks: dict[str, dict[str, Any]] = {}
        for run in runs:
            trained = load_trained(run.folder, None, recipe.read_run(run.folder))
            if patterns := trained.recipe.config.trainable:
                trained.model.freeze_all_but(patterns)
            learn += counts.trainable(trained)
            held += counts.resident(trained)
            for name, one in costs.each(trained, list(trained.recipe.tasks), device).items():
                flops = one["flops"]["total"] / 1e9 if "flops" in one else None
                tasks[name] = {"active": one["active_parameters"], "gflops": flops}
        found[arm] = {"learn": learn, "held": held, "tasks": tasks}
    return found


def rows(found: Mapping[str, Mapping[str, Any]]) -> Sequence[Sequence[str]]:
    """A line for each arm."""
    names = list(dict.fromkeys(name for one in found.values() for name in one["tasks"]))
    lines = [["arm", "learn", "held", *(f"{name}: active, GFLOPs" for name in names)]]
    for arm, one in found.items():
        cells = [one["tasks"].get(name) for name in names]
        lines.append([arm, f"{one['learn']:,}", f"{one['held']:,}", *map(_cell, cells)])
    return lines


def _cell(one: Mapping[str, Any] | None) -> str:
    if one is None:
        return "-"
    gflops = "not measured" if one["gflops"] is None else f"{one['gflops']:.3f}"
    return f"{one['active']:,}, {gflops}"
