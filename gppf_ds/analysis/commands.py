"""``gppf-ds analyze`` and ``gppf-ds summary``."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from gppf_ds.errors import UserError
from gppf_ds.train import recipe


def analyze(arguments: list[str]) -> int:
    """Draws what a run's controllers learnt."""
    parser = argparse.ArgumentParser(prog="gppf-ds analyze", description=analyze.__doc__)
    kinds = parser.add_subparsers(dest="kind", required=True)
    routes = kinds.add_parser("routes", help="the selection map: the unit each task chose in each layer")
    routes.add_argument("--run", type=Path, required=True, help="the run's output folder")
    routes.add_argument("--checkpoint", type=Path, help="a checkpoint folder (default: the run's last)")
    routes.add_argument("--output", type=Path, help="image file; svg and pdf too (default: RUN/selection.png)")
    options = parser.parse_args(arguments)

    import numpy as np

    from gppf_ds.analysis.routes import selection_map
    from gppf_ds.train.restore import load_trained

    trained = load_trained(options.run, options.checkpoint, recipe.read_run(options.run))
    tasks = list(trained.recipe.tasks)
    probabilities = np.stack([trained.controller.probabilities(task).detach().numpy() for task in tasks])
    target = options.output or options.run / "selection.png"
    selection_map(probabilities, tasks, [str(layer.name) for layer in trained.model.backbone.layers], target)
    print(target)
    return 0


def summary(arguments: list[str]) -> int:
    """Prints a run's headline metrics before and after training, and the paths of what it wrote."""
    parser = argparse.ArgumentParser(prog="gppf-ds summary", description=summary.__doc__)
    parser.add_argument("--run", type=Path, required=True, help="the run's output folder")
    options = parser.parse_args(arguments)
    run = recipe.read_run(options.run)

    from gppf_ds.train import checkpoint

    path = options.run / "results.json"
    if not path.is_file():
        raise UserError(f"{options.run} has no results.json: train it first.")
    entries = json.loads(path.read_text())
    before, after = entries[0], entries[-1]
    rows: list[tuple[str, ...]] = [("task", "metric", f"step {before['step']}", f"step {after['step']}")]
    for name, task in run.tasks.items():
        values = [entry["metrics"][name][task.headline] for entry in (before, after)]
        arrow = "" if task.higher_is_better else " (lower is better)"
        rows.append((name, task.headline + arrow, *(f"{value:.4f}" for value in values)))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    print()
    saved = checkpoint.complete(options.run / "checkpoints")
    written = [
        *saved[-1:],
        *sorted(options.run.glob("selection.*")),
        *sorted(options.run.glob("exports/*/*.safetensors")),
    ]
    for item in written:
        print(item)
    return 0
