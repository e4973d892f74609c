"""How long does it take to start?

Importing the command line, printing its help, the first step of a new run, and the first step of a run that resumes: at
step 1, and at step 400,000, whose checkpoint is that of step 1 with other counters. Every measurement is a process of
its own, stopped as soon as it has printed what it is waited for. Wall time says what a user sees, CPU time what the
machine did for it whatever else it was doing.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import harness
from plan_accuracy import two_tasks

from gppf_ds.train import checkpoint

FAR = 400_000
HELP_AIM = 1.0
"""Seconds."""
SAME = 1.1
"""By how much more a late resume may cost than an early one, which is no more than the noise of this measurement."""


def wait_for(arguments: Sequence[str], text: str, limit: float) -> tuple[float, float]:
    """Seconds of wall and CPU time until a Python process prints a line with this text."""
    environment = {**os.environ, "PYTHONPATH": str(harness.HERE.parent), "PYTHONUNBUFFERED": "1"}
    started = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, *arguments], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line)
        if text in line or time.perf_counter() - started > limit:
            break
    wall = time.perf_counter() - started
    # Not Popen's kill, which would take an ended process's usage with it.
    os.kill(process.pid, signal.SIGKILL)
    _, _, usage = os.wait4(process.pid, 0)
    process.returncode = -1
    if not lines or text not in lines[-1]:
        sys.exit(f"{' '.join(arguments)} did not print {text!r} in {limit:.0f} s:\n{''.join(lines[-20:])}")
    return wall, usage.ru_utime + usage.ru_stime


def at_step(run: Path, folder: Path, step: int) -> Path:
    """A copy of a run after one step in which that step has the number ``step``."""
    shutil.copytree(run, folder)
    [saved] = checkpoint.complete(folder / "checkpoints")
    renamed = saved.rename(saved.with_name(f"step-{step:08d}"))
    state = json.loads((renamed / "state.json").read_text())
    state |= {"step": step, "cursors": {name: read * step for name, read in state["cursors"].items()}}
    (renamed / "state.json").write_text(json.dumps(state))
    manifest = json.loads((renamed / "manifest.json").read_text())
    manifest["files"]["state.json"] = checkpoint.describe(renamed / "state.json")
    (renamed / "manifest.json").write_text(json.dumps(manifest))
    return folder


def measure(folder: Path, recipe: Path, repeats: int, limit: float) -> dict[str, list[tuple[float, float]]]:
    """(wall, CPU) of every repetition."""
    train = ["-m", "gppf_ds", "train", "--config", str(recipe), "--steps", "500000", "--log_every", "1"]
    found: dict[str, list[tuple[float, float]]] = {}

    def note(name: str, arguments: Sequence[str], text: str) -> None:
        found.setdefault(name, []).append(wait_for(arguments, text, limit))

    first = folder / "first"
    done = subprocess.run(
        [sys.executable, *train, "--steps", "1", "--output", str(first)],
        env={**os.environ, "PYTHONPATH": str(harness.HERE.parent)},
        capture_output=True,
        text=True,
        timeout=limit,
    )
    if done.returncode:
        sys.exit(f"The run to resume did not end well:\n{done.stdout}{done.stderr}")
    for number in range(repeats):
        note("import", ["-c", "import gppf_ds.cli; print('imported')"], "imported")
        note("--help", ["-m", "gppf_ds", "--help"], "says more")
        note("first step", [*train, "--output", str(folder / f"new-{number}")], "step 1/")
        for step in (1, FAR):
            run = at_step(first, folder / f"at-{step}-{number}", step)
            note(f"resume at step {step:,}", [*train, "--output", str(run)], f"step {step + 1}/")
    return found


def report(result: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    """One line for each start."""
    rows = [["until", "wall s: median (min - max)", "CPU s: median (min - max)"]]
    for name, found in result.items():
        cells = [f"{one['median']:.2f} ({one['min']:.2f} - {one['max']:.2f})" for one in found.values()]
        rows.append([name, *cells])
    early, late = (result[f"resume at step {step:,}"]["cpu"]["min"] for step in (1, FAR))
    verdicts = [
        f"--help below {HELP_AIM:.0f} s: {'met' if result['--help']['wall']['min'] < HELP_AIM else 'not met'}",
        f"resume at {FAR:,} / at 1, least CPU time: {late / early:.2f}, {'met' if late < SAME * early else 'not met'}",
    ]
    return f"{harness.table(rows)}\n\n{'; '.join(verdicts)}"


def main() -> None:
    """Measures, prints the table and writes the json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, help="a recipe with its data in place (default: two tasks of the demo)")
    parser.add_argument("--repeats", type=int, default=3, help="(default: %(default)s)")
    parser.add_argument("--limit", type=float, default=300.0, help="seconds for each start (default: %(default)s)")
    parser.add_argument("--results", type=Path, default=harness.RESULTS, help="folder for the json")
    args = parser.parse_args()
    if args.repeats < 1:
        parser.error("--repeats starts at 1")
    with tempfile.TemporaryDirectory() as folder:
        recipe = args.config or two_tasks(Path(folder))
        measured = measure(Path(folder), recipe, args.repeats, args.limit)
    result: dict[str, Any] = {
        name: {kind: harness.spread([pair[index] for pair in pairs]) for index, kind in enumerate(("wall", "cpu"))}
        for name, pairs in measured.items()
    }
    print(report(result))
    harness.save("startup", {"ranks": 1, "repeats": args.repeats, "recipe": recipe.name}, result, args.results)


if __name__ == "__main__":
    main()
