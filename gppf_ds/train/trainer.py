"""The training loop: which tasks -> batches -> step -> observe -> evaluate and save."""

from __future__ import annotations

import gc
import time
from collections import Counter
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
from gppf_ds.train import record
from gppf_ds.train.capacity import adapt, experts_of
from gppf_ds.train.checkpoint import CheckpointReader, TrainState
from gppf_ds.train.evaluate import evaluate
from gppf_ds.train.feed import Feed
from gppf_ds.train.held_out_loss import held_out_losses
from gppf_ds.train.observe import Observer
from gppf_ds.train.restore import (
    BUFFER,
    build_model,
    is_kept,
    require_same_architecture,
    restore_shared,
    shared_tensors,
)
from gppf_ds.train.saving import Saved, Saver
from gppf_ds.train.start import start
from gppf_ds.train.stopping import Stop


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
        saving = config.checkpoint
        self.saver = Saver(Path(config.output) / "checkpoints", saving.keep, config.engine.timeout, saving.background)
        self.stop = Stop(Path(config.output))
        self.feed = Feed(config, self.tasks)
        self.state = TrainState(0, dict.fromkeys(self.names, 0), config.seed)
        resumed = CheckpointReader(self.saver.newest) if self.saver.newest else None
        self.unreadable = UnreadableSamples(config.loader)
        batch_sizes = {name: task.batch_size for name, task in self.tasks.items()}
        done = resumed.state.step if resumed else 0
        self.observer = Observer(config, batch_sizes, done, dist.get_rank() == 0, device)
        self.engine = self._build(resumed)
        self.observer.attach(self.engine)
        self.state.provenance.begin(config, self.tasks, set(self.engine.owners.values()))
        if resumed is not None:
            self.observer.say(f"resuming from {resumed.path} at step {self.state.step} of {config.steps}")

    def fit(self) -> None:
        """Runs the remaining steps, or those until it is asked to stop; on return the last checkpoint is complete."""
        with self.stop.listening():
            self._train()
            self._written(self.saver.finish())
        self.observer.close()

    def _train(self) -> None:
        if self.state.step == 0:
            self._record_routes()
            self._evaluate()
        batches = self._batches()
        while self.state.step < self.config.steps:
            if self._controllers_have_settled():
                self._enter_sparse_phase()
            step, started = self.state.step, time.monotonic()
            tasks = self.feed.tasks(step, self.engine.num_devices)
            groups = [[self._next(batches) for _ in group] for group in self.engine.devices()]
            jobs = [[self.feed.job(batch, self.engine) for batch in group] for group in groups]
            with self.observer.split.clock.step():
                report = self.engine.step(step, tasks, jobs)
            self._advance(tasks, report)
            loaded = [batch for group in groups for batch in group]
            self.observer.step(step, tasks, loaded, report, time.monotonic() - started)
            self._record_routes()
            self._guard(report)
            self._adapt_capacity()
            self._evaluate_and_save()
            self._written(self.saver.check())
            if reason := self.stop.asked(self.state.step):
                self._stop_early(reason)
                return

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

    def _record_routes(self) -> None:
        engine = self.engine
        layers = [str(layer.name) for layer in engine.model.backbone.layers]
        self.observer.routes.step(self.state.step, engine.controller, layers)
        self.observer.choices(self.state.step, engine.controller, layers)
        self.observer.experts(self.state.step, engine.model)

    def _advance(self, tasks: list[str], report: StepReport) -> None:
        self.state.step += 1
        if report.skipped is None:
            learning = self.engine.learning
            self.state.provenance.add(tasks, report.valid, report.chosen, learning)
        for name, devices in Counter(tasks).items():
            self.state.cursors[name] += devices * self.tasks[name].batch_size

    def _guard(self, report: StepReport) -> None:
        """Ends the run, with a checkpoint, when nothing finite has come for too long.

        Overflows neither count nor break the row: each halves the loss scale, down to 1.
        """
        if report.skipped != "loss_scale_overflow":
            self.state.unchanged_steps = self.state.unchanged_steps + 1 if report.skipped else 0
        if report.skipped:
            self._decide("skip", report.skipped, self.state.step - 1)
        if self.state.unchanged_steps >= self.config.guard_limit:
            self._save()
            self.saver.finish()
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
        path = self._save()
        self._written(self.saver.finish())
        reader = CheckpointReader(path)
        engine.close()
        del self.engine, engine
        gc.collect()
        self.engine = self._build(reader)
        self.observer.attach(self.engine)
        self.state.provenance = self.state.provenance.restricted(set(self.engine.owners.values()))
        units = sum(self.engine.model.backbone.units)
        gone = before - len(dict(self.engine.model.named_parameters()))
        self._decide("sparse", "the controllers are frozen, and units on no task's path dropped")
        self.observer.say(
            f"sparse phase from step {self.state.step}: the controllers are frozen, and "
            f"{units - sum(map(len, reader.state.kept or []))} of {units} units, on no task's path, are dropped "
            f"({gone} of {before} parameters)"
        )

    def _adapt_capacity(self) -> None:
        """Measures, now and then, whether tasks still improve, and changes k of those that do not."""
        engine, state, moe = self.engine, self.state, self.config.backbone.moe
        if moe is None or moe.adaptive is None or state.step % moe.adaptive.every:
            return
        engine.average_head_buffers()
        with self.observer.spent.on("evaluation"):
            losses = held_out_losses(self._whole_model(), engine.controller, self.feed, self.device)
        before = {name: experts_of(engine.model.backbone, name) for name in losses}
        state.trials = adapt(state.trials, losses, engine.model.backbone, state.step, moe.adaptive)
        experts = {name: experts_of(engine.model.backbone, name) for name in losses}
        self.observer.capacity(state.step, losses, experts)
        for name in (name for name in losses if experts[name] != before[name]):
            self._decide("capacity", f"tokens of task {name} go through {experts[name]} experts, not {before[name]}")

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
        with self.observer.spent.on("evaluation"):
            results = evaluate(self._whole_model(), engine.controller, self.tasks, self.device, self.config.loader)
        self.observer.evaluation(self.state.step, results)

    def _whole_model(self) -> SimtModel:
        """The network with whole parameters: a copy where ranks hold parts, for they must not gather at other times."""
        if self.config.engine.zero_stage < 3 and self.engine.expert_parallel is None:
            return self.engine.model
        model, _ = build_model(
            self.config.backbone, self.all_tasks, self.config.seed, self.state.kept, layout=self.state.layout
        )
        model.load_state_dict(
            {**dict(self.engine.model.named_buffers()), **self.engine.full_parameters()}, strict=False
        )
        return model.to(self.device)

    def _save(self) -> Path:
        engine, kept = self.engine, self.state.kept
        engine.average_head_buffers()
        self.state.loss_scale = engine.loss_scale or self.state.loss_scale
        shared = shared_tensors(engine.model, engine.controller, engine.controller_optimizer)
        shared = {key: tensor for key, tensor in shared.items() if is_kept(key.removeprefix(BUFFER), kept)}
        fragments = [fragment for fragment in engine.fragments() if is_kept(fragment.name, kept)]
        with self.observer.spent.on("checkpoint"):
            self._written(self.saver.wait())
            return self.saver.save(self.state, fragments, shared)

    def _written(self, saved: Saved | None) -> None:
        if saved is not None:
            self.observer.saved(saved.stall, saved.stall + saved.writing)

    def _decide(self, kind: str, text: str, step: int | None = None) -> None:
        if dist.get_rank() == 0:
            record.decide(Path(self.config.output), self.state.step if step is None else step, kind, text)

    def _stop_early(self, reason: str) -> None:
        step, config = self.state.step, self.config
        self._decide("stop", reason)
        if step < config.steps and step % config.checkpoint.every:
            self._save()
        self._written(self.saver.finish())
        self.stop.done()
        self.observer.say(
            f"stopped at step {step} of {config.steps}, as {reason} asked; all is saved: start again to go on"
        )

    def _build(self, reader: CheckpointReader | None) -> SimtEngine:
        """The engine at the start of the run, or as a checkpoint left it."""
        config = self.config
        if reader is None:
            begun = start(config, self.all_tasks)
            agree(describe(begun.model, self.feed.sizes))
            self.state.kept, self.state.paths_fixed = begun.kept, begun.paths_fixed
            self.state.layout = begun.model.backbone.layout
            self.state.provenance = begun.provenance
            if begun.report:
                self.observer.say(begun.report)
            return SimtEngine(begun.model, begun.controller, config, self.device)
        state = reader.state
        model, controller = build_model(
            config.backbone, self.all_tasks, config.seed, state.kept, state.paths_fixed, config.trainable, state.layout
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
        if engine.loss_scale:
            engine.loss_scale = state.loss_scale
        self.state = state
        return engine
