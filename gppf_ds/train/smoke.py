"""Smoke runs: a whole recipe in seconds, on imitations of its data sets in their own formats.

What the recipe is about stays as it is (tasks, heads, augmentation, units, routing, engine, optimizer); what makes it
long and large shrinks: data, images, batches, backbone, steps.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import timm
import yaml

from gppf_ds.backbone.lego import timm_module
from gppf_ds.data.catalogue import find
from gppf_ds.errors import UserError
from gppf_ds.tasks.task import Task
from gppf_ds.train.finetune import smoke_folder
from gppf_ds.train.recipe import SMOKE_DATA, Recipe, check, from_content, use_smoke_data

STEPS = 2
_RESNET = {"layers": [1, 1, 1, 1], "channels": [8, 8, 16, 16]}
_SWIN = {"embed_dim": 24, "depths": [1, 2, 1, 1], "num_heads": [1, 2, 4, 8]}
_VIT = {"embed_dim": 48, "depth": 3, "num_heads": 3}
NARROW: dict[str, dict[str, Any]] = {
    "resnet": _RESNET,
    "swin_transformer": _SWIN,
    "swin_transformer_v2": _SWIN,
    "convnext": {"depths": [1, 1, 2, 1], "dims": [8, 16, 24, 32]},
    "vision_transformer": _VIT,
    "deit": _VIT,
}
"""Options of ``timm.create_model`` that make a model of the family tiny, by timm's module."""


def reduced(recipe: Recipe) -> Recipe:
    """The recipe of the smoke run: another output folder, two steps in which every task is trained, a tiny backbone.

    With ``schedule.kind`` per_batch all devices of a step share a task, and two steps train two tasks at most.

    Raises:
        UserError: a task does not say what its data are.
    """
    for name, task in recipe.tasks.items():
        if task.source is None:
            raise UserError(f"tasks.{name}: --smoke imitates public data sets: give the task a source, or remove it.")
        find(task.source)
    content: dict[str, Any] = yaml.safe_load(recipe.text)
    content |= {"output": smoke_folder(recipe.config.output), "steps": STEPS, "evaluate_every": 0}
    content |= {"log_every": 1, "metrics_port": 0}
    content["optimizer"]["warmup_steps"] = min(1, recipe.config.optimizer.warmup_steps)
    content["loader"]["workers"] = min(1, recipe.config.loader.workers)
    if recipe.config.finetune.source is None:  # otherwise the source's smoke run has settled the backbone
        backbone, units = content["backbone"], recipe.config.backbone.units
        backbone |= {"units": units if isinstance(units, int) else max(units), "pretrained": None}
        backbone["options"] = {**backbone["options"], **_narrow(backbone["name"])}
    if recipe.config.schedule.kind not in ("per_batch", "accumulate"):  # the latter trains every task as it is
        trained = list(recipe.config.trained(recipe.tasks))
        content["schedule"] = {"kind": "static", "static": trained}
        ranks = int(os.environ.get("WORLD_SIZE", "1"))
        groups = ranks * recipe.config.engine.accumulation
        content["engine"]["devices_per_rank"] = math.ceil(len(trained) / groups)
    return from_content(content)


def prepare(recipe: Recipe) -> None:
    """Makes the run's folder anew, with the data of every task in it. For one rank, before the others go on."""
    folder = Path(recipe.config.output)
    shutil.rmtree(folder, ignore_errors=True)
    for name in _sources(recipe.tasks.values()):
        root = folder / SMOKE_DATA / name
        root.mkdir(parents=True)
        find(name).smoke(root)


def use(recipe: Recipe) -> None:
    """Lets the tasks read what :func:`prepare` made, and checks the recipe as that of a real run is."""
    use_smoke_data(recipe, Path(recipe.config.output))
    check(recipe)


def _sources(tasks: Iterable[Task]) -> list[str]:
    return sorted({task.source for task in tasks if task.source is not None})


def _narrow(name: str) -> dict[str, Any]:
    module = timm_module(name) if timm.is_model(name) else ""
    if module not in NARROW:
        raise UserError(f"backbone.name {name!r}: smoke runs know how to shrink {', '.join(NARROW)} only.")
    return NARROW[module]
