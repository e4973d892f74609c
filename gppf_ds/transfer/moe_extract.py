"""Extraction from networks of token-level experts: which experts a plan leaves, and what that changes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from gppf_ds.backbone.moe.adapt import pruned, restricted, with_top_k
from gppf_ds.backbone.moe.layout import Layout
from gppf_ds.backbone.moe.selections import running
from gppf_ds.config import MoePlan
from gppf_ds.errors import UserError
from gppf_ds.train.calibration import batches, count_selections
from gppf_ds.train.restore import Trained
from gppf_ds.transfer import counts
from gppf_ds.transfer.serving import drift, serving

COMPARED = 4
"""Batches of each task on which maps are compared."""


@dataclass(frozen=True)
class Extraction:
    """What a plan makes of a network."""

    plan: MoePlan
    layout: Layout
    images: int
    """Validation images of each task, at most, whose choices decided; 0: the running shares of the training."""
    drift: dict[str, float | None] = field(default_factory=dict)
    """By task, the largest difference of the feature maps from the parent's, relative to their largest value; None
    where there are no images to compare on."""

    def as_json(self) -> dict[str, Any]:
        """For ``costs.json``."""
        return {"plan": asdict(self.plan), "images": self.images, "drift": self.drift, "experts": self.layout.experts}


def apply(trained: Trained, plan: MoePlan, images: int, device: torch.device) -> tuple[Extraction, Trained]:
    """The smaller network that a plan leaves, in memory, and how far it is from the whole one.

    Args:
        trained: with token-level experts, on ``device``.
        plan: ``tasks``, ``prune`` and the ``top_k``.
        images: see :class:`Extraction`.
        device: to compute on.

    Raises:
        UserError: the plan has keys for fine-tuning, names a task that is not there, or data are missing.
    """
    whole = trained.model.backbone.layout
    if whole is None:
        raise UserError("plans are for networks with token-level experts (backbone.moe), which this run has not.")
    if plan.experts or plan.learn is not None:
        raise UserError("the plan's experts and learn are for fine-tuning (finetune.plan): take them out.")
    tasks = trained.require_tasks(plan.tasks or None)
    layout = restricted(whole, tasks)
    if plan.prune is not None:
        used = (
            count_selections(trained, tasks, images, device)
            if images
            else running(trained.model.named_buffers(), whole)
        )
        layout = pruned(layout, used, plan.prune)
    layout = with_top_k(layout, plan.mlp_top_k, plan.attention_top_k)
    smaller = serving(trained, tasks, layout)
    smaller.model.to(device)
    smaller.controller.to(device)
    return Extraction(plan, layout, images, _drift(trained, smaller, tasks, images, device)), smaller


def _drift(
    trained: Trained, smaller: Trained, tasks: Sequence[str], images: int, device: torch.device
) -> dict[str, float | None]:
    found: dict[str, float | None] = {}
    for name in tasks:
        try:
            some = list(islice(batches(trained.recipe.tasks[name], name, images or 64, device), COMPARED))
            found[name] = drift(trained, smaller, name, some)
        except UserError:
            found[name] = None
    return found


def table(found: Extraction, trained: Trained, smaller: Trained) -> str:
    """Experts, parameters and drift, for people."""
    lines = []
    whole = trained.model.backbone.layout
    assert whole is not None
    left, all_ = (sum(map(len, layout.experts.values())) for layout in (found.layout, whole))
    lines.append(f"experts: {left} of {all_} ({', '.join(_by_layer(found.layout, whole))})")
    lines.append(f"resident parameters: {counts.resident(smaller):,} of {counts.resident(trained):,}")
    for name, far in found.drift.items():
        own, before = counts.of_task(smaller, name), counts.of_task(trained, name)
        change = "not compared: no images" if far is None else f"maps differ by {far:.1e}"
        active = f"{own['active_parameters']:,} of {before['active_parameters']:,} active parameters"
        lines.append(f"{name}: {active}, {change}")
    return "\n".join(lines)


def _by_layer(layout: Layout, whole: Layout) -> list[str]:
    return [f"{layer}: {len(own)}/{len(whole.experts[layer])}" for layer, own in layout.experts.items()]


def plan_of(tasks: Sequence[str], threshold: float | None, file: Path | None) -> MoePlan:
    """The plan that the command line asks for."""
    from gppf_ds.train.moe_plan import read_plan

    return read_plan(file) if file is not None else MoePlan(tasks=list(tasks), prune=threshold or 0.0)
