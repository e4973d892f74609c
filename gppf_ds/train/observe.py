"""What a run shows of itself: progress, metrics.jsonl, results.json and Prometheus. Watching never changes it."""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gppf_ds.backbone.controller import temperature
from gppf_ds.config import RunConfig
from gppf_ds.monitor.metrics import Metrics
from gppf_ds.monitor.progress import Progress
from gppf_ds.simt.engine import StepReport
from gppf_ds.simt.loader import LoadedBatch
from gppf_ds.simt.optimizer import learning_rate
from gppf_ds.train.record import versions

log = logging.getLogger(__name__)


class Observer:
    """Of one rank; the main rank also writes the files.

    Args:
        config: of the run.
        batch_sizes: by task.
        start: steps already done.
        main: whether this is the rank that writes and prints.
    """

    def __init__(self, config: RunConfig, batch_sizes: Mapping[str, int], start: int, main: bool) -> None:
        self.config = config
        self.batch_sizes = dict(batch_sizes)
        self.main = main
        self.folder = Path(config.output)
        self.metrics = Metrics(versions())
        if config.metrics_port:
            port = config.metrics_port + int(os.environ.get("LOCAL_RANK", "0"))
            self.metrics.serve(config.metrics_address, port)
        self.progress = Progress(config.steps, start, config.log_every, main)

    def read(self, batch: LoadedBatch, seconds: float) -> None:
        """A batch came after this rank had waited for it."""
        self.metrics.data_wait.labels(batch.request.task).inc(seconds)
        self.metrics.unreadable.labels(batch.request.task).inc(len(batch.unreadable))
        self.metrics.worker_restarts.inc(batch.restarts)

    def step(
        self, step: int, tasks: Sequence[str], batches: Sequence[LoadedBatch], report: StepReport, seconds: float
    ) -> None:
        """An optimizer step is done: the tasks of all devices, this rank's batches and what became of them."""
        losses = self._outcomes(step, batches, report)
        tau = temperature(step, self.config.steps, self.config.controller)
        self.metrics.step.set(step + 1)
        self.metrics.step_duration.observe(seconds)
        self.metrics.temperature.set(tau)
        self.metrics.learning_rate.set(learning_rate(step, self.config))
        self.metrics.last_step.set(time.time())
        if report.skipped:
            self.metrics.skipped.labels(report.skipped).inc()
        counts = {name: list(tasks).count(name) for name in self.batch_sizes}
        self.progress.step(step, counts, losses, tau, sum(self.batch_sizes[name] for name in tasks))
        if self.main and (step + 1) % self.config.log_every == 0:
            line = {"step": step + 1, "seconds": round(seconds, 4), "tasks": counts, "losses": losses, "tau": tau}
            with (self.folder / "metrics.jsonl").open("a") as file:
                file.write(json.dumps({**line, "skipped": report.skipped}) + "\n")

    def _outcomes(self, step: int, batches: Sequence[LoadedBatch], report: StepReport) -> dict[str, float]:
        losses: dict[str, float] = {}
        for batch, outcome in zip(batches, report.losses, strict=True):
            name = batch.request.task
            losses[name] = sum(outcome.terms.values())
            self.metrics.iterations.labels(name).inc()
            self.metrics.images.labels(name).inc(len(batch.request.indices))
            for term, value in outcome.terms.items():
                self.metrics.loss.labels(name, term).set(value)
            if not outcome.finite:
                self.metrics.dropped.labels(name).inc()
                samples = ", ".join(map(str, batch.request.indices))
                log.warning("step %d: task %s gave no finite loss or gradient on samples %s", step, name, samples)
        return losses

    def evaluation(self, step: int, results: Mapping[str, Mapping[str, float]]) -> None:
        """An evaluation is done: appends it to ``results.json`` (entries of later steps give way)."""
        finite = {
            task: {metric: value for metric, value in values.items() if math.isfinite(value)}
            for task, values in results.items()
        }
        for task, values in finite.items():
            for metric, value in values.items():
                self.metrics.metric.labels(task, metric).set(value)
        if not self.main:
            return
        path = self.folder / "results.json"
        entries: list[dict[str, Any]] = json.loads(path.read_text()) if path.is_file() else []
        entries = [entry for entry in entries if entry["step"] < step] + [{"step": step, "metrics": finite}]
        pending = path.with_suffix(".tmp")
        pending.write_text(json.dumps(entries, indent=1) + "\n")
        pending.replace(path)

    def saved(self) -> None:
        """A checkpoint is complete."""
        self.metrics.checkpoint_time.set(time.time())

    def say(self, text: str) -> None:
        """A line on the console of the main rank."""
        if self.main:
            print(text, flush=True)
