"""One rank of data_wait.py, which starts it."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import harness
import torch.distributed as dist

from gppf_ds.simt.engine import StepReport
from gppf_ds.simt.job import start_distributed
from gppf_ds.simt.loader import LoadedBatch
from gppf_ds.train import recipe
from gppf_ds.train.trainer import Trainer


class Watch:
    """Stands before a trainer's observer and notes, of every step, how long it waited for data and lasted."""

    def __init__(self, observer: Any) -> None:
        self.observer = observer
        self.waited = 0.0
        self.steps: list[tuple[float, float]] = []

    def read(self, batch: LoadedBatch, seconds: float) -> None:
        """A batch came after so long."""
        self.waited += seconds
        self.observer.read(batch, seconds)

    def step(
        self, step: int, tasks: Sequence[str], batches: Sequence[LoadedBatch], report: StepReport, seconds: float
    ) -> None:
        """A step, waiting included, is done."""
        self.steps.append((self.waited, seconds))
        self.waited = 0.0
        self.observer.step(step, tasks, batches, report, seconds)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.observer, name)


def main() -> None:
    """Trains the recipe of the argument, a json list of what one would give gppf-ds train."""
    run = recipe.read(json.loads(sys.argv[1]))
    device = start_distributed(run.config.engine.timeout)
    Path(run.config.output).mkdir(parents=True, exist_ok=True)
    trainer = Trainer(run.config, run.tasks, device)
    watch = Watch(trainer.observer)
    trainer.observer = watch  # type: ignore[assignment]
    trainer.fit()
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, watch.steps)
    harness.hand_over(everyone)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
