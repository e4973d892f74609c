"""Trains a recipe, and on request freezes the controllers in the sparse phase without dropping a unit."""

from __future__ import annotations

import sys
from pathlib import Path

import torch.distributed as dist

from gppf_ds.backbone.controller import Controller
from gppf_ds.simt.job import start_distributed
from gppf_ds.train import recipe
from gppf_ds.train.trainer import Trainer


def main(path: str, output: str, mode: str) -> None:
    if mode == "keep":
        Controller.units_on_paths = lambda self: [  # type: ignore[method-assign]
            [unit for unit, value in enumerate(row) if value == 0] for row in self.mask.tolist()
        ]
    Path(output).mkdir(parents=True, exist_ok=True)
    run = recipe.read(["--config", path, "--output", output])
    Trainer(run.config, run.tasks, start_distributed(60.0)).fit()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
