"""``gppf-ds runs``: the runs below a folder, from what they have written of themselves."""

from __future__ import annotations

import argparse
import json
import os
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from gppf_ds.errors import UserError
from gppf_ds.train import history, record
from gppf_ds.train.table import aligned

_INSIDE = {"checkpoints", "exports", "smoke-data"}
"""Folders of a run that hold no runs."""
SILENT = 600.0
"""Seconds without a sign after which a run on another machine is called silent."""


@dataclass
class Run:
    """One line of the list."""

    name: str
    state: str
    """starting, running, finished, stopped or failed, as the run wrote it; killed where its process on this machine is
    gone; silent where another machine's has not written for long; unknown for runs of older versions."""
    step: int
    steps: int
    age: float
    """Seconds since it wrote last."""
    metrics: str
    """The first metric of every task at the last evaluation; the losses where there is none."""


def runs(arguments: list[str]) -> int:
    """Lists the runs below a folder: state, step, time since the last sign, last metrics."""
    parser = argparse.ArgumentParser(prog="gppf-ds runs", description=runs.__doc__)
    parser.add_argument("folder", type=Path, nargs="?", default=Path("runs"), help="where to look (default: runs)")
    folder = parser.parse_args(arguments).folder
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}: name the one that the runs' output folders lie in.")
    found = [read(path, folder) for path in find(folder)]
    if not found:
        print(f"no runs below {folder}")
        return 0
    rows = [("run", "state", "step", "last sign", "metrics")]
    rows += [(run.name, run.state, f"{run.step}/{run.steps}", _ago(run.age), run.metrics) for run in found]
    print(*aligned(rows), sep="\n")
    return 0


def find(folder: Path) -> Iterator[Path]:
    """The run folders below, and this one if it is one, by name."""
    for path, inner, files in os.walk(folder):
        inner[:] = sorted(name for name in inner if name not in _INSIDE and not name.startswith("."))
        if record.LAUNCHES in files and "config.yaml" in files:
            yield Path(path)


def read(path: Path, folder: Path) -> Run:
    """What a run folder says of its run."""
    config = yaml.safe_load((path / "config.yaml").read_text())
    lines = [history.last(path / name) for name in ("metrics.jsonl", record.LAUNCHES)]
    results = path / "results.json"
    evaluated = json.loads(results.read_text())[-1:] if results.is_file() else []
    step = max(int(line.get("step", 0)) for line in [*lines, *evaluated])
    signs = [path / name for name in ("metrics.jsonl", record.STATE, record.LAUNCHES, results.name)]
    age = time.time() - max(sign.stat().st_mtime for sign in signs if sign.is_file())
    name = str(path.relative_to(folder)) if path != folder else path.name
    state = _state(record.read_state(path), age)
    return Run(name, state, step, int(config["steps"]), age, _metrics(evaluated, lines[0].get("losses", {})))


def _state(written: dict[str, Any], age: float) -> str:
    state = str(written.get("state", "unknown"))
    if state not in ("starting", "running"):
        return state
    if written.get("host") == socket.gethostname():
        return state if Path(f"/proc/{written.get('process')}").exists() else "killed"
    return "silent" if age > SILENT else state


def _metrics(evaluated: list[dict[str, Any]], losses: dict[str, float]) -> str:
    if evaluated:
        firsts = {task: next(iter(values.items()), None) for task, values in evaluated[-1]["metrics"].items()}
        return ", ".join(f"{task} {first[0]} {first[1]:.4f}" for task, first in firsts.items() if first)
    return ", ".join(f"{task} loss {value:.4f}" for task, value in losses.items())


def _ago(seconds: float) -> str:
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit} ago"
    return f"{seconds:.0f} s ago"
