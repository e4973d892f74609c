"""The training loop: which tasks -> batches -> step -> observe -> save."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from gppf_ds.backbone.controller import temperature
from gppf_ds.backbone.lego import Pass
from gppf_ds.config import RunConfig
from gppf_ds.errors import UserError
from gppf_ds.monitor.metrics import Metrics
from gppf_ds.monitor.progress import Progress
from gppf_ds.seeding import FORWARD, seed_global_generators
from gppf_ds.simt.engine import SimtEngine, StepReport, learning_rate
from gppf_ds.simt.loader import LoadedBatch, TaskReader, UnreadableSamples, load
from gppf_ds.simt.model import Job
from gppf_ds.simt.sampler import Sampler
from gppf_ds.simt.schedule import Schedule
from gppf_ds.tasks.task import Task
from gppf_ds.train import checkpoint
from gppf_ds.train.checkpoint import CheckpointReader, TrainState
from gppf_ds.train.evaluate import evaluate
from gppf_ds.train.record import versions
from gppf_ds.train.restore import build_model, require_same_architecture, restore_shared, shared_tensors


class Trainer:
    """Trains, evaluates, saves and resumes one run.

    Args:
        config: of the run.
        tasks: by name.
        device: of this rank; the process group exists already.
    """

    def __init__(self, config: RunConfig, tasks: Mapping[str, Task], device: torch.device) -> None:
        self.config = config
        self.tasks = dict(tasks)
        self.device = device
        self.folder = Path(config.output)
        self.names = list(tasks)
        model, controller = build_model(config.backbone, tasks, config.seed)
        self.engine = SimtEngine(model, controller, config, device)
        readers = {name: TaskReader(task.dataset("train"), task.collate) for name, task in tasks.items()}
        self.readers = readers
        self.schedule = Schedule.from_weights({n: t.weight for n, t in tasks.items()}, config.schedule, config.seed)
        sizes = [len(reader.dataset) for reader in readers.values()]
        self.sampler = Sampler(self.schedule, sizes, [task.batch_size for task in tasks.values()])
        self.state = TrainState(0, dict.fromkeys(self.names, 0), config.seed)
        self.metrics = Metrics(versions())
        self.unreadable = UnreadableSamples(config.loader)
        self.main = dist.get_rank() == 0
        self.results: list[dict[str, Any]] = []

    def fit(self) -> None:
        """Runs the remaining steps; on return the last checkpoint and ``results.json`` are on disk."""
        self._resume()
        if self.state.step == 0:
            self._evaluate()
        progress = Progress(self.config.steps, self.state.step, self.config.log_every, self.main)
        batches = self._batches()
        while self.state.step < self.config.steps:
            started = time.monotonic()
            step = self.state.step
            loaded = [[self._next(batches) for _ in group] for group in self.engine.devices()]
            tasks = [self.names[t] for t in self.schedule(step, self.engine.num_devices)]
            report = self.engine.step(step, tasks, [[self._job(batch) for batch in group] for group in loaded])
            self._advance(tasks)
            self._observe(step, tasks, [b for group in loaded for b in group], report, progress, started)
            self._guard(report)
            self._evaluate_and_save()
        progress.close()

    def _advance(self, tasks: list[str]) -> None:
        self.state.step += 1
        for name in tasks:
            self.state.cursors[name] += self.tasks[name].batch_size

    def _batches(self) -> Any:
        requests = self.sampler(
            self.state.step,
            self.config.steps,
            [self.state.cursors[name] for name in self.names],
            [device for group in self.engine.devices() for device in group],
            self.engine.num_devices,
        )
        return load(self.readers, requests, self.config.seed, self.config.loader)

    def _next(self, batches: Any) -> LoadedBatch:
        started = time.monotonic()
        batch: LoadedBatch = next(batches)
        self.metrics.data_wait.labels(batch.request.task).inc(time.monotonic() - started)
        self.metrics.unreadable.labels(batch.request.task).inc(len(batch.unreadable))
        self.unreadable.observe(batch)
        return batch

    def _job(self, loaded: LoadedBatch) -> Job:
        request = loaded.request
        key = (self.config.seed, request.step, request.device)
        seed_global_generators(key[0], FORWARD, *key[1:], "preprocess")
        batch = self.tasks[request.task].preprocess(loaded.data, self.device, training=True)
        route = self.engine.route(request.task, request.step, request.device)
        return Job(request.device, request.task, batch, Pass(batch.images, route, key))

    def _guard(self, report: StepReport) -> None:
        """Ends the run, with a checkpoint, when nothing finite has come for too long."""
        self.state.unchanged_steps = self.state.unchanged_steps + 1 if report.skipped else 0
        if self.state.unchanged_steps >= self.config.guard_limit:
            self._save()
            raise UserError(
                f"{self.state.unchanged_steps} steps in a row had no finite loss or gradient ({report.skipped}; the "
                f"last was step {self.state.step - 1}): lower optimizer.learning_rate, or set optimizer.clip_norm."
            )

    def _evaluate_and_save(self) -> None:
        step, config = self.state.step, self.config
        last = step == config.steps
        if last or (config.evaluate_every and step % config.evaluate_every == 0):
            self._evaluate()
        if last or step % config.checkpoint.every == 0:
            self._save()

    def _evaluate(self) -> None:
        results = evaluate(self.engine.model, self.engine.controller, self.tasks, self.device, self.config.loader)
        for task, values in results.items():
            for metric, value in values.items():
                self.metrics.metric.labels(task, metric).set(value)
        if self.main:
            entry = {"step": self.state.step, "metrics": results}
            path = self.folder / "results.json"
            entries = json.loads(path.read_text()) if path.is_file() else []
            entries = [old for old in entries if old["step"] < self.state.step] + [entry]
            pending = path.with_suffix(".tmp")
            pending.write_text(json.dumps(entries, indent=1))
            pending.replace(path)

    def _observe(
        self,
        step: int,
        tasks: list[str],
        loaded: list[LoadedBatch],
        report: StepReport,
        progress: Progress,
        started: float,
    ) -> None:
        tau = temperature(step, self.config.steps, self.config.controller)
        losses: dict[str, float] = {}
        for batch, outcome in zip(loaded, report.losses, strict=True):
            name = batch.request.task
            losses[name] = sum(outcome.terms.values())
            self.metrics.iterations.labels(name).inc()
            self.metrics.images.labels(name).inc(len(batch.request.indices))
            for term, value in outcome.terms.items():
                self.metrics.loss.labels(name, term).set(value)
            if not outcome.finite:
                self.metrics.dropped.labels(name).inc()
                samples = list(batch.request.indices)
                print(f"step {step}: task {name} gave no finite loss or gradient on samples {samples}", flush=True)
        if report.skipped:
            self.metrics.skipped.labels(report.skipped).inc()
        self.metrics.step.set(step + 1)
        self.metrics.temperature.set(tau)
        self.metrics.learning_rate.set(learning_rate(step, self.config))
        self.metrics.last_step.set(time.time())
        seconds = time.monotonic() - started
        self.metrics.step_duration.observe(seconds)
        counts = {name: tasks.count(name) for name in self.names}
        images = sum(self.tasks[name].batch_size for name in tasks)
        progress.step(step, counts, losses, tau, images)
        if self.main and (step + 1) % self.config.log_every == 0:
            line = {"step": step + 1, "seconds": round(seconds, 4), "tasks": counts, "losses": losses, "tau": tau}
            with (self.folder / "metrics.jsonl").open("a") as file:
                file.write(json.dumps({**line, "skipped": report.skipped}) + "\n")

    def _save(self) -> None:
        shared = shared_tensors(self.engine.model, self.engine.controller, self.engine.controller_optimizer)
        folder = self.folder / "checkpoints"
        checkpoint.save(folder, self.state, self.engine.fragments(), shared, self.config.checkpoint.keep)
        self.metrics.checkpoint_time.set(time.time())

    def _resume(self) -> None:
        found = checkpoint.complete(self.folder / "checkpoints")
        if not found:
            return
        reader = CheckpointReader(found[-1])
        engine = self.engine
        require_same_architecture(reader, engine.model, self.names)
        if reader.state.seed != self.config.seed:
            raise UserError(
                f"{reader.path} was trained with seed {reader.state.seed}, not {self.config.seed}: set seed to resume "
                "it, or choose another output folder."
            )
        engine.load_fragments(reader.whole, reader.kinds)
        restore_shared(reader, engine.model, engine.controller, engine.controller_optimizer)
        self.state = reader.state
        if self.main:
            print(f"resuming from {found[-1]} at step {self.state.step} of {self.config.steps}", flush=True)
