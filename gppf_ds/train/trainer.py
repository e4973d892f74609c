"""The training loop: which tasks -> batches -> step -> observe -> evaluate and save."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
import torch.distributed as dist

from gppf_ds.backbone.controller import settled_step
from gppf_ds.config import RunConfig
from gppf_ds.errors import UserError
from gppf_ds.simt.agreement import agree, describe
from gppf_ds.simt.engine import SimtEngine, StepReport
from gppf_ds.simt.loader import LoadedBatch, UnreadableSamples
from gppf_ds.simt.model import SimtModel
from gppf_ds.tasks.task import Task
from gppf_ds.train import checkpoint
from gppf_ds.train.checkpoint import CheckpointReader, TrainState
from gppf_ds.train.evaluate import evaluate
from gppf_ds.train.feed import Feed
from gppf_ds.train.observe import Observer
from gppf_ds.train.restore import (
    BUFFER,
    build_model,
    is_kept,
    require_same_architecture,
    restore_shared,
    shared_tensors,
)
from gppf_ds.train.start import start


class Trainer:
    """Trains, evaluates, saves and resumes one run.

    Args:
        config: of the run.
        tasks: by name.
        device: of this rank; the process group exists already.
    """

    def __init__(self, config: RunConfig, tasks: Mapping[str, Task], device: torch.device) -> None:
        self.config = config
        self.all_tasks = dict(tasks)
        self.tasks = config.trained(tasks)
        self.names = list(self.tasks)
        self.device = device
        self.checkpoints = Path(config.output) / "checkpoints"
        self.feed = Feed(config, self.tasks)
        self.state = TrainState(0, dict.fromkeys(self.names, 0), config.seed)
        found = checkpoint.complete(self.checkpoints)
        resumed = CheckpointReader(found[-1]) if found else None
        self.unreadable = UnreadableSamples(config.loader)
        batch_sizes = {name: task.batch_size for name, task in self.tasks.items()}
        done = resumed.state.step if resumed else 0
        self.observer = Observer(config, batch_sizes, done, dist.get_rank() == 0)
        self.engine = self._build(resumed)
        self.state.provenance.begin(config, self.tasks, set(self.engine.owners.values()))
        if resumed is not None:
            self.observer.say(f"resuming from {resumed.path} at step {self.state.step} of {config.steps}")

    def fit(self) -> None:
        """Runs the remaining steps; on return the last checkpoint and ``results.json`` are on disk."""
        if self.state.step == 0:
            self._evaluate()
        batches = self._batches()
        while self.state.step < self.config.steps:
            if self._controllers_have_settled():
                self._enter_sparse_phase()
            step, started = self.state.step, time.monotonic()
            tasks = self.feed.tasks(step, self.engine.num_devices)
            groups = [[self._next(batches) for _ in group] for group in self.engine.devices()]
            jobs = [[self.feed.job(batch, self.engine) for batch in group] for group in groups]
            report = self.engine.step(step, tasks, jobs)
            self._advance(tasks, report)
            loaded = [batch for group in groups for batch in group]
            self.observer.step(step, tasks, loaded, report, time.monotonic() - started)
            self._guard(report)
            self._evaluate_and_save()
        self.observer.progress.close()

    def _batches(self) -> Iterator[LoadedBatch]:
        """This rank's batches from the present step to the last, in the order of its devices."""
        devices = [device for group in self.engine.devices() for device in group]
        state = self.state
        return self.feed.batches(state.step, self.config.steps, state.cursors, devices, self.engine.num_devices)

    def _next(self, batches: Iterator[LoadedBatch]) -> LoadedBatch:
        started = time.monotonic()
        batch = next(batches)
        self.observer.read(batch, time.monotonic() - started)
        self.unreadable.observe(batch)
        return batch

    def _advance(self, tasks: list[str], report: StepReport) -> None:
        self.state.step += 1
        if report.skipped is None:
            learning = {owner for _, owner in self.engine.parameters}
            self.state.provenance.add(tasks, report.paths, report.valid, learning)
        for name in tasks:
            self.state.cursors[name] += self.tasks[name].batch_size

    def _guard(self, report: StepReport) -> None:
        """Ends the run, with a checkpoint, when nothing finite has come for too long."""
        self.state.unchanged_steps = self.state.unchanged_steps + 1 if report.skipped else 0
        if self.state.unchanged_steps >= self.config.guard_limit:
            self._save()
            raise UserError(
                f"{self.state.unchanged_steps} steps in a row had no finite loss or gradient ({report.skipped}; the "
                f"last was step {self.state.step - 1}): lower optimizer.learning_rate, or set optimizer.clip_norm."
            )

    def _controllers_have_settled(self) -> bool:
        due = self.state.step >= settled_step(self.config.steps, self.config.controller)
        return self.config.controller.sparse and due and not self.state.paths_fixed

    def _enter_sparse_phase(self) -> None:
        """Freezes the controllers and goes on with an engine that holds only the units on the tasks' paths."""
        engine = self.engine
        self.state.kept, self.state.paths_fixed = engine.controller.units_on_paths(), True
        before = len(dict(engine.model.named_parameters()))
        reader = CheckpointReader(self._save())
        engine.close()
        del self.engine, engine
        gc.collect()
        self.engine = self._build(reader)
        self.state.provenance = self.state.provenance.restricted(set(self.engine.owners.values()))
        units = sum(self.engine.model.backbone.units)
        gone = before - len(dict(self.engine.model.named_parameters()))
        self.observer.say(
            f"sparse phase from step {self.state.step}: the controllers are frozen, and "
            f"{units - sum(map(len, reader.state.kept or []))} of {units} units, on no task's path, are dropped "
            f"({gone} of {before} parameters)"
        )

    def _evaluate_and_save(self) -> None:
        step, config = self.state.step, self.config
        last = step == config.steps
        if last or (config.evaluate_every and step % config.evaluate_every == 0):
            self._evaluate()
        if last or step % config.checkpoint.every == 0:
            self._save()

    def _evaluate(self) -> None:
        engine = self.engine
        engine.average_head_buffers()
        results = evaluate(self._whole_model(), engine.controller, self.tasks, self.device, self.config.loader)
        self.observer.evaluation(self.state.step, results)

    def _whole_model(self) -> SimtModel:
        """The network with whole parameters: at stage 3 a copy, for ranks must not gather at different times."""
        if self.config.engine.zero_stage < 3:
            return self.engine.model
        model, _ = build_model(self.config.backbone, self.all_tasks, self.config.seed, self.state.kept)
        model.load_state_dict(
            {**dict(self.engine.model.named_buffers()), **self.engine.full_parameters()}, strict=False
        )
        return model.to(self.device)

    def _save(self) -> Path:
        engine, kept = self.engine, self.state.kept
        engine.average_head_buffers()
        shared = shared_tensors(engine.model, engine.controller, engine.controller_optimizer)
        shared = {key: tensor for key, tensor in shared.items() if is_kept(key.removeprefix(BUFFER), kept)}
        fragments = [fragment for fragment in engine.fragments() if is_kept(fragment.name, kept)]
        path = checkpoint.save(self.checkpoints, self.state, fragments, shared, self.config.checkpoint.keep)
        self.observer.saved()
        return path

    def _build(self, reader: CheckpointReader | None) -> SimtEngine:
        """The engine at the start of the run, or as a checkpoint left it."""
        config = self.config
        if reader is None:
            begun = start(config, self.all_tasks)
            agree(describe(begun.model, self.feed.sizes))
            self.state.kept, self.state.paths_fixed = begun.kept, begun.paths_fixed
            self.state.provenance = begun.provenance
            if begun.report:
                self.observer.say(begun.report)
            return SimtEngine(begun.model, begun.controller, config, self.device)
        state = reader.state
        model, controller = build_model(
            config.backbone, self.all_tasks, config.seed, state.kept, state.paths_fixed, config.trainable
        )
        agree(describe(model, self.feed.sizes))
        require_same_architecture(reader, model, self.names)
        if reader.state.seed != config.seed:
            raise UserError(
                f"{reader.path} was trained with seed {reader.state.seed}, not {config.seed}: set seed to resume it, "
                "or choose another output folder."
            )
        engine = SimtEngine(model, controller, config, self.device)
        engine.load_fragments(reader.whole, reader.kinds)
        restore_shared(reader, engine.model, engine.controller, engine.controller_optimizer)
        self.state = reader.state
        return engine
