"""``gppf-ds reproduce``: results on disk beside the rows that the paper published."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

import gppf_ds
from gppf_ds.data.catalogue import find
from gppf_ds.errors import UserError
from gppf_ds.tasks.task import Task
from gppf_ds.train.recipe import read

PUBLISHED = Path(__file__).with_name("published.yaml")
"""The paper's tables, and for every cell the run and the metric that stand beside it."""


@dataclass(frozen=True)
class Column:
    """One column of a table."""

    name: str
    task: str
    metric: str
    """As our evaluation calls it."""
    scale: float
    """Of our metric, to be in the paper's unit."""


@dataclass(frozen=True)
class Row:
    """One line of a table."""

    name: str
    run: str | None
    """Folder of our run below ``runs``, ``{task}`` standing for the column's. None for the rows of others."""
    recipe: str | None
    """Path of its recipe below ``ds_configs/recipes``."""
    published: list[float | str | None]
    """By column; a word where the paper has no number, None where it says nothing."""


@dataclass(frozen=True)
class Table:
    """A table of the paper."""

    title: str
    columns: list[Column]
    rows: list[Row]
    digits: int
    """Behind the point."""


def load() -> dict[str, Table]:
    """The tables by name."""
    content = yaml.safe_load(PUBLISHED.read_text())
    return {name: _table(table) for name, table in content["tables"].items()}


def _table(content: dict[str, Any]) -> Table:
    columns = []
    for name, measure in content["columns"].items():
        task, metric = measure.split()
        columns.append(Column(name, task, metric, content["scale"]))
    rows = []
    for row in content["rows"]:
        published = row["published"]
        values = published if isinstance(published, list) else [published] * len(columns)
        rows.append(Row(row["name"], row.get("run"), row.get("recipe", row.get("run")), values))
    return Table(content["title"], columns, rows, content["digits"])


def render(table: Table, runs: Path) -> str:
    """The table as text: under each published row that we have a recipe for, ours.

    A cell of ours is the last result on disk; without one "no data" where the task's data set is not on disk, else
    "not run".

    Args:
        runs: the folder that the recipes' outputs are in.

    Raises:
        UserError: a run's results cannot be read.
    """
    lines = [["", "", *(column.name for column in table.columns)]]
    notes: list[str] = []
    for row in table.rows:
        published = [_number(value, table.digits) for value in row.published]
        lines.append([row.name, "published", *published])
        if row.run is not None:
            ours = [_ours(column, row, runs, table.digits, notes) for column in table.columns]
            lines.append(["", "ours", *ours])
    return "\n".join([table.title, "", *_aligned(lines), *dict.fromkeys(notes)])


def _aligned(lines: list[list[str]]) -> list[str]:
    widths = [max(map(len, cells)) for cells in zip(*lines, strict=True)]
    return [
        "  ".join(
            [
                *(cell.ljust(width) for cell, width in zip(line[:2], widths, strict=False)),
                *(cell.rjust(width) for cell, width in zip(line[2:], widths[2:], strict=True)),
            ]
        )
        for line in lines
    ]


def _number(value: float | str | None, digits: int) -> str:
    if value is None:
        return "-"
    return value if isinstance(value, str) else f"{value:.{digits}f}"


def _ours(column: Column, row: Row, runs: Path, digits: int, notes: list[str]) -> str:
    folder = runs / str(row.run).format(task=column.task)
    found = []
    for place in [folder, *sorted(folder.glob("lr*_wd*"))]:  # the run itself, and those of a grid
        step, metrics = _last_result(place)
        if (value := metrics.get(column.task, {}).get(column.metric)) is not None:
            found.append((value, step, place))
    if not found:
        return "not run" if _has_data(str(row.recipe).format(task=column.task), column.task) else "no data"
    value, step, place = max(found)
    if step < (steps := _steps(place)):
        notes.append(f"{place}: results of step {step} of {steps}; not finished.")
    return _number(value * column.scale, digits)


def _last_result(folder: Path) -> tuple[int, dict[str, dict[str, float]]]:
    """Step and metrics of the last evaluation after some training; nothing where there was none."""
    path = folder / "results.json"
    if not path.is_file():
        return 0, {}
    try:
        last = json.loads(path.read_text())[-1]
        return (last["step"], last["metrics"]) if last["step"] > 0 else (0, {})
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        raise UserError(f"{path} cannot be read ({error!r}): remove it, and run evaluate or train again.") from error


def _steps(folder: Path) -> int:
    config = folder / "config.yaml"
    return int(yaml.safe_load(config.read_text())["steps"]) if config.is_file() else 0


@cache
def _has_data(recipe_name: str, task_name: str) -> bool:
    """Whether the data of the recipe's task lie where the recipe looks for them."""
    task = _tasks(recipe_name).get(task_name)
    if task is None or task.source is None:
        return True
    folder = task.data_folder()
    return folder is not None and all((folder / place).exists() for place in find(task.source).layout)


@cache
def _tasks(recipe_name: str) -> dict[str, Task]:
    file = recipes() / f"{recipe_name}.yaml"
    return read(["--config", str(file)]).tasks if file.is_file() else {}


def recipes() -> Path:
    """The folder of the recipes."""
    return gppf_ds.shipped_configs() / "recipes"
