"""One rank of metrics_cost.py, which starts it."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import harness
import torch
from prometheus_client import generate_latest

from gppf_ds.simt.engine import StepReport
from gppf_ds.simt.job import start_distributed
from gppf_ds.train import recipe
from gppf_ds.train.trainer import Trainer


class Arms:
    """Two ways through one and the same step: watched as the product does it, and not at all."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.batches = trainer._batches()
        self.number = -1
        self.told: list[float] = []
        """CPU seconds that telling took, by step: the clock would also count what others do on a busy machine."""
        self.alone: list[float] = []
        """CPU seconds of the whole process in a bare step."""

    def load(self, number: int) -> None:
        """The step's batches, read once for both arms."""
        if number != self.number:
            self.groups = [[next(self.batches) for _ in group] for group in self.trainer.engine.devices()]
            self.number = number

    def bare(self, number: int) -> None:
        """The step alone."""
        started = time.process_time()
        self._run(number)
        self.alone.append(time.process_time() - started)

    def watched(self, number: int) -> None:
        """The step with its collectives timed, then everything told as the trainer tells it."""
        trainer = self.trainer
        started = time.perf_counter()
        with trainer.observer.split.clock.step():
            tasks, report = self._run(number)
        ended, used = time.perf_counter(), time.thread_time()
        loaded = [batch for group in self.groups for batch in group]
        for batch in loaded:
            trainer.observer.read(batch, 0.0)
        trainer.observer.step(number, tasks, loaded, report, ended - started)
        trainer.state.step = number + 1
        trainer._record_routes()
        self.told.append(time.thread_time() - used)

    def _run(self, number: int) -> tuple[list[str], StepReport]:
        trainer = self.trainer
        tasks = trainer.feed.tasks(number, trainer.engine.num_devices)
        jobs = [[trainer.feed.job(batch, trainer.engine) for batch in group] for group in self.groups]
        return tasks, trainer.engine.step(number, tasks, jobs)


def _step(arm: Callable[[int], None], number: int, _: int) -> None:
    arm(number)


def main() -> None:
    """Trains by the settings of the argument: what one would give gppf-ds train, warmup and rounds."""
    settings = json.loads(sys.argv[1])
    run = recipe.read(settings["arguments"])
    device = start_distributed(run.config.engine.timeout)
    torch.set_num_threads(1 if device.type == "cpu" else torch.get_num_threads())
    Path(run.config.output).mkdir(parents=True, exist_ok=True)
    trainer = Trainer(run.config, run.tasks, device)
    arms = Arms(trainer)
    order: list[dict[str, Any]] = [
        {"bare": arms.bare, "watched": arms.watched},
        {"watched": arms.watched, "bare": arms.bare},
    ]
    seconds: dict[str, list[float]] = {"bare": [], "watched": []}
    for number in range(settings["warmup"] + settings["rounds"]):
        arms.load(number)
        # Which arm goes first changes from round to round: the second one finds caches warm.
        turn = {name: partial(_step, step, number) for name, step in order[number % 2].items()}
        timed = harness.interleaved(turn, device, warmup=0, rounds=1)
        for name, values in timed.items():
            seconds[name] += values
    started = time.perf_counter()
    scrape = len(generate_latest(trainer.observer.metrics.registry))
    scraping = time.perf_counter() - started
    skip = settings["warmup"]
    harness.hand_over(
        {
            "bare": seconds["bare"][skip:],
            "watched": seconds["watched"][skip:],
            "told": arms.told[skip:],
            "alone": arms.alone[skip:],
            "scrape": {"seconds": scraping, "bytes": scrape},
        }
    )
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
