"""Does a run take as long as ``gppf-ds plan`` says?

In one group of ranks each task is measured, then real steps are made under several schedules, again and again in turn.
Every round compares the mean time of its real steps with what the simulation says of the very same steps from that
round's measurements, so that a machine that grows slower meanwhile is slower for both.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import harness
import yaml

from gppf_ds.data.demo import make_demo_data

AIM = 0.1
"""What the forecast may be off by, of the real time."""


def two_tasks(folder: Path) -> Path:
    """A recipe of two kinds of task that import nothing heavy, one with a light and one with a heavy head."""
    make_demo_data(folder / "demo-data", train_scenes=64, val_scenes=2, train_crops=640, val_crops=20)
    digits = {"data": f"{folder}/demo-data/classification", "batch_size": 16, "image_size": 64}
    distance = {"data": f"{folder}/demo-data/scenes", "max_depth": 20.0, "input_size": [128, 128], "head_channels": 32}
    recipe = {
        "output": f"{folder}/run",
        "steps": 100_000,
        "backbone": {"name": "resnet50", "options": {"layers": [1, 1, 1, 1], "channels": [16, 32, 64, 64]}},
        "optimizer": {"learning_rate": 1e-6},
        "loader": {"workers": 0},
        "tasks": {
            "digits": {"class_path": "gppf_ds.tasks.classification.Classification", "init_args": digits},
            "distance": {"class_path": "gppf_ds.tasks.depth.Depth", "init_args": {**distance, "batch_size": 4}},
        },
    }
    (folder / "two_tasks.yaml").write_text(yaml.safe_dump(recipe))
    return folder / "two_tasks.yaml"


def report(result: Mapping[str, Any]) -> str:
    """One line for each schedule."""
    rows = [["schedule", "real ms", "said ms", "said / real: median (min - max)", "busy by the plan", ""]]
    for name, found in result["schedules"].items():
        ratio = found["ratio"]
        rows.append(
            [
                name,
                f"{1000 * found['real']['median']:.0f}",
                f"{1000 * found['said']['median']:.0f}",
                f"{ratio['median']:.3f} ({ratio['min']:.3f} - {ratio['max']:.3f})",
                f"{found['busy']['median']:.1%}",
                "met" if abs(ratio["median"] - 1) <= AIM else "not met",
            ]
        )
    return f"{harness.table(rows)}\n\naim: within {AIM:.0%} of the real time"


def main() -> None:
    """Starts the ranks, prints the table and writes the json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, help="a recipe with its data in place (default: two tasks of the demo)")
    parser.add_argument("--ranks", type=int, default=2, help="processes (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="measurements and forecasts (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=12, help="real steps of a round (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="measured steps of a task (default: %(default)s)")
    parser.add_argument("--limit", type=float, default=1800.0, help="seconds for everything (default: %(default)s)")
    parser.add_argument("--results", type=Path, default=harness.RESULTS, help="folder for the json")
    args = parser.parse_args()
    if min(args.ranks, args.rounds, args.steps, args.repeats) < 1:
        parser.error("--ranks, --rounds, --steps and --repeats start at 1")
    settings = {name: getattr(args, name) for name in ("ranks", "rounds", "steps", "repeats")}
    with tempfile.TemporaryDirectory() as folder:
        recipe = args.config or two_tasks(Path(folder))
        settings["recipe"] = recipe.name
        argument = json.dumps({**settings, "recipe": str(recipe)})
        result = harness.result_of_ranks(harness.HERE / "plan_accuracy_rank.py", argument, args.ranks, args.limit)
    print(f"{settings['recipe']}, {args.ranks} ranks, {args.rounds} rounds of {args.steps} steps\n")
    print(report(result))
    harness.save("plan_accuracy", settings, result, args.results)


if __name__ == "__main__":
    main()
