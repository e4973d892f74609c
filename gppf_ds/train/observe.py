"""What a run shows of itself: progress, files of json lines, results.json and Prometheus. Watching never changes it."""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from gppf_ds.backbone.controller import Controller, temperature
from gppf_ds.backbone.moe.selections import running
from gppf_ds.config import RunConfig
from gppf_ds.monitor.metrics import Metrics
from gppf_ds.monitor.progress import Progress
from gppf_ds.monitor.split import TimeSplit
from gppf_ds.monitor.trackers import Trackers
from gppf_ds.simt.engine import SimtEngine, StepReport
from gppf_ds.simt.loader import LoadedBatch
from gppf_ds.simt.model import SimtModel
from gppf_ds.simt.optimizer import learning_rate
from gppf_ds.train import history
from gppf_ds.train.record import versions
from gppf_ds.train.route_record import RouteRecorder
from gppf_ds.train.spent import Spent

log = logging.getLogger(__name__)


class Observer:
    """Of one rank; the main rank also writes the files.

    Args:
        config: of the run.
        batch_sizes: by task.
        start: steps already done.
        main: whether this is the rank that writes and prints.
        device: of this rank.
    """

    def __init__(
        self, config: RunConfig, batch_sizes: Mapping[str, int], start: int, main: bool, device: torch.device
    ) -> None:
        self.config = config
        self.batch_sizes = dict(batch_sizes)
        self.main = main
        self.folder = Path(config.output)
        self.metrics = Metrics(versions(), batch_sizes)
        self.metrics.learning_rate.labels("controllers").set(config.controller.learning_rate)
        if config.metrics_port:
            port = config.metrics_port + int(os.environ.get("LOCAL_RANK", "0"))
            self.metrics.serve(config.metrics_address, port)
        self.progress = Progress(config.steps, start, config.log_every, main)
        self.routes = RouteRecorder(config, main)
        self.spent = Spent(self.folder, main, start)
        self.device = device
        self.split = TimeSplit(self.metrics, device)
        self.trackers: Trackers | None = None
        self._waited = 0.0

    def attach(self, engine: SimtEngine) -> None:
        """The engine whose DeepSpeed monitor is written to from now on."""
        self.trackers = Trackers(engine.engine.monitor)

    def read(self, batch: LoadedBatch, seconds: float) -> None:
        """A batch came after this rank had waited for it."""
        self._waited += seconds
        self.metrics.data_wait.labels(batch.request.task).inc(seconds)
        self.metrics.unreadable.labels(batch.request.task).inc(len(batch.unreadable))
        self.metrics.worker_restarts.inc(batch.restarts)

    def step(
        self, step: int, tasks: Sequence[str], batches: Sequence[LoadedBatch], report: StepReport, seconds: float
    ) -> None:
        """An optimizer step is done: the tasks of all devices, this rank's batches and what became of them.

        Every ``log_every`` steps a collective call: the ranks add up their losses, and compare how long they waited for
        each other.
        """
        self._outcomes(step, batches, report)
        logged = (step + 1) % self.config.log_every == 0
        losses = self._losses(batches, report, everywhere=logged)
        tau = temperature(step, self.config.steps, self.config.controller)
        self.metrics.step.set(step + 1)
        self.metrics.step_duration.observe(seconds)
        self.metrics.temperature.set(tau)
        self.metrics.learning_rate.labels("network").set(learning_rate(step, self.config))
        self.metrics.last_step.set(time.time())
        if report.skipped:
            self.metrics.skipped.labels(report.skipped).inc()
        devices = Counter(tasks)
        counts = {name: devices[name] for name in self.batch_sizes}
        images = sum(size * devices[name] for name, size in self.batch_sizes.items())
        self.progress.step(step, counts, losses, tau, images)
        self.spent.step(seconds, self._waited, images)
        self.split.step([batch.request.task for batch in batches], seconds, self._waited)
        self._waited = 0.0
        if not logged:
            return
        split = self.split.settle()
        if self.main:
            self.metrics.parameter_users(report.counts, report.gradient_norms())
            line = {"step": step + 1, "seconds": round(seconds, 4), "tasks": counts, "losses": losses, "tau": tau}
            history.append(self.folder / "metrics.jsonl", {**line, "skipped": report.skipped, "split": split})
            values = {"learning_rate": learning_rate(step, self.config), "temperature": tau, "time/step": seconds}
            values |= {f"task/{name}/loss": value for name, value in losses.items()}
            values |= {f"time/{part}": value for part, value in split.items()}
            self._track(step + 1, values)
            self.spent.write()

    def _track(self, step: int, values: Mapping[str, float]) -> None:
        if self.trackers is not None:
            self.trackers.write(step, values)

    def _losses(self, batches: Sequence[LoadedBatch], report: StepReport, everywhere: bool) -> dict[str, float]:
        """Of each task the mean total loss of its devices: those of this rank or, a collective call, of all ranks."""
        names = list(self.batch_sizes)
        sums = torch.zeros(2, len(names), dtype=torch.float64)
        for batch, outcome in zip(batches, report.losses, strict=True):
            index = names.index(batch.request.task)
            sums[0, index] += sum(outcome.terms.values())
            sums[1, index] += 1
        if everywhere and dist.get_world_size() > 1:
            shared = sums.to(self.device)
            dist.all_reduce(shared)
            sums = shared.cpu()
        totals, counts = sums.tolist()
        return {name: total / count for name, total, count in zip(names, totals, counts, strict=True) if count}

    def _outcomes(self, step: int, batches: Sequence[LoadedBatch], report: StepReport) -> None:
        for batch, outcome in zip(batches, report.losses, strict=True):
            name = batch.request.task
            self.metrics.iterations.labels(name).inc()
            self.metrics.images.labels(name).inc(len(batch.request.indices))
            for term, value in outcome.terms.items():
                self.metrics.loss.labels(name, term).set(value)
            if not outcome.finite:
                self.metrics.dropped.labels(name).inc()
                samples = ", ".join(map(str, batch.request.indices))
                log.warning("step %d: task %s gave no finite loss or gradient on samples %s", step, name, samples)

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
        for task, values in finite.items():
            self._track(step, {f"task/{task}/{metric}": value for metric, value in values.items()})
        path = self.folder / "results.json"
        entries: list[dict[str, Any]] = json.loads(path.read_text()) if path.is_file() else []
        entries = [entry for entry in entries if entry["step"] < step] + [{"step": step, "metrics": finite}]
        pending = path.with_suffix(".tmp")
        pending.write_text(json.dumps(entries, indent=1) + "\n")
        pending.replace(path)

    def capacity(self, step: int, losses: Mapping[str, float], experts: Mapping[str, int]) -> None:
        """After ``step`` steps: every task's loss on held-out images, and k from then on."""
        if self.main:
            history.append(self.folder / "capacity.jsonl", {"step": step, "losses": losses, "experts": experts})

    @torch.no_grad()
    def choices(self, step: int, controller: Controller, layers: Sequence[str]) -> None:
        """After ``step`` steps: which units the tasks choose, told every ``log_every`` steps by the main rank."""
        if not self.main or step % self.config.log_every or max(controller.units) == 1:
            return
        for task in controller.logits:
            rows = controller.probabilities(task).tolist()
            self.metrics.selection(
                task, layers, [row[:count] for row, count in zip(rows, controller.units, strict=True)]
            )

    def experts(self, step: int, model: SimtModel) -> None:
        """After ``step`` steps: which experts the tasks use, told every ``log_every`` steps by the main rank."""
        layout = model.backbone.layout
        if not self.main or step % self.config.log_every or layout is None:
            return
        shares = running(model.named_buffers(), layout)
        for layer, numbers in layout.experts.items():
            load = {task: [own.get(layer, {}).get(expert, 0.0) for expert in numbers] for task, own in shares.items()}
            self.metrics.experts(layer, load)

    def saved(self, stall: float, total: float) -> None:
        """A checkpoint is complete.

        Args:
            stall: seconds that training stood still for it.
            total: seconds from its begin until all of it was on disk.
        """
        self.metrics.checkpoint_duration.labels("stall").observe(stall)
        self.metrics.checkpoint_duration.labels("total").observe(total)
        self.metrics.checkpoint_time.set(time.time())

    def close(self) -> None:
        """The run is over."""
        self.spent.write()
        self.progress.close()

    def say(self, text: str) -> None:
        """A line on the console of the main rank."""
        if self.main:
            print(text, flush=True)
