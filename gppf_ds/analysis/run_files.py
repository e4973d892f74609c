"""What a run folder tells without its network: results, losses, time, launches."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gppf_ds.errors import UserError
from gppf_ds.train import history, spent
from gppf_ds.train.recipe import Recipe, read_run
from gppf_ds.train.route_record import RouteRecord, read_routes

STEP_PARTS = ("compute", "straggler_wait", "communication")
"""Of the time of a step that is no waiting for data; see :mod:`gppf_ds.monitor.split`."""


@dataclass(frozen=True)
class RunFiles:
    """The records of a run; whatever it has not written is empty."""

    folder: Path
    recipe: Recipe
    results: list[dict[str, Any]]
    """Evaluations, with ``step`` and ``metrics`` by task."""
    metrics: Sequence[Mapping[str, Any]]
    """Lines of ``metrics.jsonl`` by rising step."""
    time: list[dict[str, Any]]
    """All lines of ``time.jsonl``: what a killed launch did in vain is time as well."""
    launches: list[dict[str, Any]]
    routes: RouteRecord | None

    @property
    def seconds(self) -> dict[str, float]:
        """Wall time by kind of work, over all launches; that of steps in the parts of ``split``, if they are known."""
        total: Counter[str] = Counter()
        for line in self.time:
            total.update(line["seconds"])
        parts: Counter[str] = Counter()
        for told in self.metrics:
            parts.update({kind: told.get("split", {}).get(kind, 0.0) for kind in STEP_PARTS})
        if not (known := sum(parts.values())):
            return dict(total)
        steps = total.pop("step", 0.0)
        return {**{kind: steps * parts[kind] / known for kind in STEP_PARTS}, **total}

    @property
    def images(self) -> int:
        """Images trained on, over all launches."""
        return sum(line["images"] for line in self.time)

    def headline(self, task: str) -> str:
        """The metric that stands for the task; where only the data could tell and are gone, the first recorded one."""
        try:
            return self.recipe.tasks[task].headline
        except UserError:
            return next((name for entry in self.results for name in entry["metrics"].get(task, {})), "no metric")

    def losses(self, task: str) -> tuple[list[int], list[float]]:
        """Steps and total losses of a task, where the main rank had one."""
        pairs = [(line["step"], line["losses"][task]) for line in self.metrics if task in line["losses"]]
        return [step for step, _ in pairs], [loss for _, loss in pairs]

    def metric(self, task: str, name: str) -> tuple[list[int], list[float]]:
        """Steps and values of a task's metric, where it was a number."""
        found = [(entry["step"], entry["metrics"].get(task, {}).get(name)) for entry in self.results]
        pairs = [(step, value) for step, value in found if value is not None]
        return [step for step, _ in pairs], [value for _, value in pairs]

    def pace(self) -> tuple[list[int], list[float]]:
        """Between lines of ``time.jsonl``: the steps at their ends, and images per second of training."""
        lines = history.latest([line for line in self.time if line["images"]])
        rates = [
            line["images"] / max(sum(line["seconds"].get(k, 0.0) for k in ("step", "data")), 1e-9) for line in lines
        ]
        return [line["step"] for line in lines], rates

    def step_parts(self) -> tuple[list[int], dict[str, list[float]]]:
        """Between lines of ``metrics.jsonl``: the steps at their ends, and the mean seconds of a step by part."""
        lines = [line for line in self.metrics if "split" in line]
        parts = {kind: [line["split"][kind] for line in lines] for kind in (*STEP_PARTS, "data_wait")}
        return [line["step"] for line in lines], parts


def read_files(folder: Path) -> RunFiles:
    """Reads a run folder.

    Raises:
        UserError: it is none, or ``results.json`` is damaged.
    """
    recipe = read_run(folder)
    path, routes = folder / "results.json", read_routes(folder)
    try:
        results = json.loads(path.read_text()) if path.is_file() else []
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}): delete it, or evaluate the run again.") from error
    return RunFiles(
        folder,
        recipe,
        results,
        history.latest(history.read(folder / "metrics.jsonl")),
        history.read(folder / spent.FILE),
        history.read(folder / "launches.jsonl"),
        routes.ordered(list(recipe.tasks)) if routes else None,
    )
