"""The record of all controllers' choices during training: ``routes.jsonl``, which learning curves are drawn from.

GPPF draws its figure 11 from probabilities kept every 10,000 steps. A line holds tasks x layers x units numbers, which
the main rank has anyway: keeping them costs one small copy from the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from gppf_ds.backbone.controller import Controller
from gppf_ds.config import RunConfig
from gppf_ds.errors import UserError
from gppf_ds.train import history

FILE = "routes.jsonl"
POINTS = 200
"""Lines that a run gets where the recipe does not say otherwise."""
_DIGITS = 5


class RouteRecorder:
    """Appends the controllers' probabilities to ``routes.jsonl``.

    Args:
        config: of the run; ``routes_every`` is the interval in steps.
        main: whether this is the rank that writes.
    """

    def __init__(self, config: RunConfig, main: bool) -> None:
        self.path = Path(config.output) / FILE
        self.steps = config.steps
        self.every = config.routes_every or max(1, config.steps // POINTS)
        self.main = main

    @torch.no_grad()
    def step(self, step: int, controller: Controller, layers: Sequence[str]) -> None:
        """After ``step`` steps (0: before the first); nothing where there is one unit per layer, and so no choice.

        Args:
            step: optimizer steps done.
            controller: of all tasks.
            layers: their names.
        """
        if not self.main or (step % self.every and step != self.steps) or max(controller.units) == 1:
            return
        if step == 0 or not self.path.is_file():
            history.append(self.path, {"layers": list(layers), "units": controller.units})
        rows = torch.stack([controller.probabilities(task) for task in controller.logits]).cpu().double().numpy()
        probabilities = dict(zip(controller.logits, rows.round(_DIGITS).tolist(), strict=True))
        history.append(self.path, {"step": step, "probabilities": probabilities})


@dataclass(frozen=True)
class RouteRecord:
    """What ``routes.jsonl`` holds."""

    steps: NDArray[np.int64]
    """(records,): optimizer steps done, rising."""
    probabilities: NDArray[np.float64]
    """(records, tasks, layers, units): rows sum to 1; 0 where a layer has fewer units."""
    tasks: list[str]
    layers: list[str]
    units: list[int]
    """How many units each layer has."""

    def ordered(self, tasks: Sequence[str]) -> RouteRecord:
        """With the tasks in another order, say that of the recipe; those it does not name are left out."""
        names = [task for task in tasks if task in self.tasks]
        chosen = self.probabilities[:, [self.tasks.index(name) for name in names]]
        return replace(self, tasks=names, probabilities=chosen)


def read_routes(folder: Path) -> RouteRecord | None:
    """The record of a run; of steps that a resumed run did twice the later line counts.

    Returns:
        None for a run without a record.

    Raises:
        UserError: the file is damaged.
    """
    path = folder / FILE
    if not path.is_file():
        return None
    try:
        lines = history.read(path)
        head = [line for line in lines if "layers" in line][-1]
        entries = history.latest([line for line in lines if "layers" not in line])
        tasks = list(entries[-1]["probabilities"])
        values = np.array([[entry["probabilities"][task] for task in tasks] for entry in entries])
        steps = np.array([entry["step"] for entry in entries])
        return RouteRecord(steps, values, tasks, head["layers"], head["units"])
    except (ValueError, KeyError, IndexError) as error:
        raise UserError(f"{path} is damaged ({error!r}): delete it; only the curves over time are lost.") from error
