"""``gppf-ds export``."""

from __future__ import annotations

import argparse
from pathlib import Path

from gppf_ds.train import recipe


def export(arguments: list[str]) -> int:
    """Writes each task's path as a plain timm model: safetensors, and the timm name and options to load it into."""
    parser = argparse.ArgumentParser(prog="gppf-ds export", description=export.__doc__)
    parser.add_argument("--run", type=Path, required=True, help="the run's output folder")
    parser.add_argument("--checkpoint", type=Path, help="a checkpoint folder (default: the run's last)")
    parser.add_argument("--task", nargs="+", metavar="TASK", help="only these tasks (default: all)")
    parser.add_argument("--output", type=Path, help="where to write (default: RUN/exports)")
    options = parser.parse_args(arguments)
    run = recipe.read_run(options.run)

    from gppf_ds.train.restore import load_trained
    from gppf_ds.transfer import extract

    trained = load_trained(options.run, options.checkpoint, run)
    for task in trained.require_tasks(options.task):
        print(extract.export(trained, task, options.output or options.run / "exports"))
    return 0
