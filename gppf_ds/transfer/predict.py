"""Prediction: several tasks on one image; what their paths share in front of a common input runs once.

Evaluation has nothing to share: there every task has images of its own.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from gppf_ds.backbone.shared import shared_forward, units_run
from gppf_ds.errors import SampleError, UserError
from gppf_ds.tasks.task import Batch, Task
from gppf_ds.train.restore import Trained
from gppf_ds.transfer.drawing import draw, read_pixels

_DPI = 130


@dataclass(frozen=True)
class Prediction:
    """What the tasks find in one image."""

    found: dict[str, dict[str, Any]]
    """By task; see :meth:`Task.describe`."""
    units_run: int
    units_alone: int
    """How many units would have run, had no task shared any."""


def require_images(images: Sequence[Path]) -> None:
    """Raises :class:`UserError` for a path that is no file, and for two whose results would have the same name."""
    stems: dict[str, Path] = {}
    for image in images:
        if not image.is_file():
            raise UserError(f"--image {image}: there is no such file.")
        other = stems.setdefault(image.stem, image)
        if other is not image:
            raise UserError(f"--image {other} and {image} would both be written to {image.stem}.json: run them apart.")


@torch.no_grad()
def predict(trained: Trained, tasks: Sequence[str], image: Path, device: torch.device) -> Prediction:
    """Runs tasks on one image, each as it would be evaluated on it.

    Args:
        trained: the network, on ``device``.
        tasks: their names.
        image: any image file; no ground truth is needed.
        device: of the network.

    Raises:
        UserError: a task cannot read the image.
    """
    model = trained.model
    batches = {name: read_image(trained.recipe.tasks[name], name, image, device) for name in tasks}
    paths = {name: trained.controller.path(name) for name in batches}
    found: dict[str, dict[str, Any]] = {}
    run = 0
    for names in with_equal_images(batches):
        together = {name: paths[name] for name in names}
        run += units_run(together.values())
        first = batches[names[0]]
        features = shared_forward(model.backbone, first.images, together, first.sizes)
        for name in names:
            head: Any = model.heads.bank[name]
            [found[name]] = trained.recipe.tasks[name].describe(head, features.pop(name), batches[name].targets)
    return Prediction({name: found[name] for name in batches}, run, sum(map(len, paths.values())))


def read_image(task: Task, name: str, image: Path, device: torch.device) -> Batch:
    """A batch of one image, as the task would evaluate it; raises :class:`UserError` if the task cannot read it."""
    try:
        sample = task.sample(image)
    except (OSError, SampleError) as error:
        raise UserError(f"task {name!r} cannot read the image: {error}") from error
    return task.preprocess(task.collate([sample]), device, training=False)


def with_equal_images(batches: Mapping[str, Batch]) -> list[list[str]]:
    """The tasks whose input is the same in every value: only they give the maps that each would give alone."""
    groups: list[list[str]] = []
    for name, batch in batches.items():
        same = (group for group in groups if torch.equal(batches[group[0]].images, batch.images))
        group = next(same, None)
        if group is None:
            groups.append([name])
        else:
            group.append(name)
    return groups


def write(prediction: Prediction, trained: Trained, image: Path, folder: Path) -> Path:
    """Writes ``folder/STEM.json``, for every map of pixels in it ``folder/STEM.TASK.KEY.png``, and ``STEM.drawn.png``.

    Args:
        prediction: for ``image``.
        trained: the network that it comes from.
        image: STEM is the stem of its name.
        folder: made where it is missing.

    Returns:
        The json file; in it the names of the png files stand in place of the maps.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tasks: dict[str, dict[str, Any]] = {name: {} for name in prediction.found}
    for name, found in prediction.found.items():
        for key, value in found.items():
            if isinstance(value, np.ndarray):
                file = folder / f"{image.stem}.{name}.{key}.png"
                Image.fromarray(value).save(file)
                value = file.name
            tasks[name][key] = value
    description = {"image": str(image), "checkpoint": trained.path.name, "step": trained.step, "tasks": tasks}
    target = folder / f"{image.stem}.json"
    target.write_text(json.dumps(description, indent=1) + "\n")
    figure = draw(read_pixels(image), prediction.found, image.name)
    figure.savefig(folder / f"{image.stem}.drawn.png", dpi=_DPI, bbox_inches="tight")
    return target
