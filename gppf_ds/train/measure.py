"""What every task of a recipe costs on this hardware: steps of the real engine in which all ranks run one task."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from gppf_ds.config import ScheduleConfig
from gppf_ds.simt.agreement import agree, describe
from gppf_ds.simt.engine import SimtEngine
from gppf_ds.simt.loader import LoadedBatch
from gppf_ds.tasks.task import Task
from gppf_ds.train.feed import Feed
from gppf_ds.train.memory import peak
from gppf_ds.train.recipe import Recipe
from gppf_ds.train.simulation import Cost, Costs
from gppf_ds.train.start import start

WARM_UP = 2
"""Steps of a task before any is counted."""
STILL = 1e-12
"""Learning rate while measuring: the weights stay where they are, and with them the losses stay finite."""


@dataclass(frozen=True)
class _Step:
    """Seconds of one step by part: up to the last layer of the backbone, heads, backward, all else."""

    forward: float
    head: float
    backward: float
    rest: float


class _Clock:
    """Notes when an engine's step has come to the end of each part."""

    def __init__(self, engine: SimtEngine) -> None:
        self.device = engine.device
        self.marks: list[float] = []
        self.began = 0.0
        engine.model.backbone.register_forward_hook(self._mark)
        engine.model.heads.register_forward_hook(self._mark)
        backward = engine.engine.backward

        def marked(*arguments: Any, **settings: Any) -> None:
            backward(*arguments, **settings)
            self._mark()

        engine.engine.backward = marked

    def begin(self) -> None:
        self.marks, self.began = [], self.now()

    def _mark(self, *_: Any) -> None:
        self.marks.append(self.now())

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def end(self) -> _Step:
        forward, head, backward = self.marks
        began, ended = self.began, self.now()
        return _Step(forward - began, head - forward, backward - head, ended - backward)


def measure(run: Recipe, device: torch.device, repeats: int) -> tuple[Costs, dict[str, int]]:
    """Trains each task of a recipe alone for a few steps, with its own batches and with half of them.

    What a batch of any size takes follows from the two sizes. What the devices of a rank share, because they wait for
    the other ranks together, follows from steps of two devices with half batches each. Reading counts where the
    training process does it (``loader.workers`` 0); otherwise the batches are there before the clock starts. A
    collective call.

    Args:
        run: the recipe, checked.
        device: of this rank.
        repeats: steps to take the median of.

    Returns:
        The costs, and the sizes of the training sets by task.
    """
    engine_settings = replace(run.config.engine, devices_per_rank=1, accumulation=1)
    optimizer = replace(run.config.optimizer, learning_rate=STILL)
    config = replace(run.config, engine=engine_settings, optimizer=optimizer, schedule=ScheduleConfig())
    begun = start(config, run.tasks)
    agree(describe(begun.model, {}))
    engine = SimtEngine(begun.model, begun.controller, config, device)
    clock = _Clock(engine)
    # Batch norms make the ranks wait for each other in every layer, also before the heads.
    joint = any(isinstance(module, nn.BatchNorm2d) for module in engine.model.backbone.modules())
    found: dict[str, Cost] = {}
    rests: list[float] = []
    bases: list[float] = []
    shared: list[tuple[float, ...]] = []
    sizes: dict[str, int] = {}
    for name, task in config.trained(run.tasks).items():
        whole, rest, sizes[name] = _measure_task(engine, clock, name, task, joint, repeats)
        rests.append(rest)
        if task.batch_size > 1:
            smaller = copy.copy(task)
            smaller.batch_size = task.batch_size // 2
            half, rest, _ = _measure_task(engine, clock, name, smaller, joint, repeats)
            rests.append(rest)
            pair, _, _ = _measure_task(engine, clock, name, smaller, joint, repeats, devices=2)
            shared.append(_shared(half, pair))
            bases.append(_intercept(whole.memory, half.memory, whole.batch_size, half.batch_size))
            whole = _with_start(whole, half)
        found[name] = whole
    # What every step holds, whatever its batch, is the rank's.
    base = min(bases, default=0.0)
    waits = [statistics.median(phase) for phase in zip(*shared, strict=True)]
    found = {name: _own(cost, waits, base) for name, cost in found.items()}
    held = _held(engine) + base
    engine.close()
    capacity = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None
    return Costs(found, statistics.median(rests), sum(waits), held, capacity), sizes


def _measure_task(
    engine: SimtEngine, clock: _Clock, name: str, task: Task, joint: bool, repeats: int, devices: int = 1
) -> tuple[Cost, float, int]:
    """The cost of a rank's batches of the task, one for each of its devices, seconds of a step that are not theirs, and
    the size of the training set."""
    schedule = ScheduleConfig(kind="static", static=[name])
    engine.config = replace(
        engine.config, schedule=schedule, engine=replace(engine.config.engine, devices_per_rank=devices)
    )
    feed = Feed(engine.config, {name: task})
    inside = engine.config.loader.workers == 0
    batches = feed.batches(0, WARM_UP + repeats + 1, {name: 0}, engine.devices()[0], engine.num_devices)
    steps = [_one_step(engine, clock, feed, batches, number, inside) for number in range(WARM_UP + repeats)]
    memory = peak(lambda: _one_step(engine, clock, feed, batches, WARM_UP + repeats, inside), engine.device)
    counted = steps[WARM_UP:]
    parts = [statistics.median(getattr(step, part) for step in counted) for part in ("forward", "head", "backward")]
    phases = parts if joint else [parts[0] + parts[1], parts[2]]
    rest = statistics.median(step.rest for step in counted)
    *phases, rest = _mean_over_ranks([*phases, rest], engine.device)
    nothing = (0.0,) * len(phases)
    return Cost(task.batch_size, tuple(phases), nothing, float(memory)), rest, feed.sizes[name]


def _one_step(
    engine: SimtEngine, clock: _Clock, feed: Feed, batches: Iterator[LoadedBatch], number: int, inside: bool
) -> _Step:
    own = engine.devices()[0]
    read = [] if inside else [next(batches) for _ in own]
    if engine.world_size > 1:
        dist.barrier()
    clock.begin()
    jobs = [feed.job(batch, engine) for batch in read or [next(batches) for _ in own]]
    engine.step(number, feed.tasks(number, engine.num_devices), [jobs])
    return clock.end()


def _mean_over_ranks(values: list[float], device: torch.device) -> list[float]:
    mean = torch.tensor(values, dtype=torch.float64, device=device)
    if dist.get_world_size() > 1:
        dist.all_reduce(mean)
    return [float(value) for value in mean / dist.get_world_size()]


def _shared(one: Cost, two: Cost) -> tuple[float, ...]:
    """Seconds by phase that two devices spend once; noise must not take them out of 0 to what one device takes."""
    pairs = zip(one.seconds, two.seconds, strict=True)
    return tuple(min(max(0.0, 2 * single - both), single) for single, both in pairs)


def _own(cost: Cost, waits: Sequence[float], base: float) -> Cost:
    """The cost of a device without what its rank's devices share: seconds by phase, and bytes."""
    pairs = zip(cost.seconds, waits or (0.0,) * len(cost.seconds), strict=True)
    seconds = tuple(max(0.0, whole - wait) for whole, wait in pairs)
    start = tuple(min(first, own) for first, own in zip(cost.start, seconds, strict=True))
    return replace(cost, seconds=seconds, start=start, memory=cost.memory - base)


def _with_start(whole: Cost, half: Cost) -> Cost:
    """The cost of the whole batch with what does not depend on its size."""
    pairs = zip(whole.seconds, half.seconds, strict=True)
    return replace(whole, start=tuple(_intercept(*pair, whole.batch_size, half.batch_size) for pair in pairs))


def _intercept(large: float, small: float, large_batch: int, small_batch: int) -> float:
    """Of the line through two measurements; noise must not take it out of 0 to ``large``."""
    each = (large - small) / (large_batch - small_batch)
    return min(max(0.0, large - each * large_batch), large)


def _held(engine: SimtEngine) -> float:
    """Bytes that this rank holds between steps."""
    if engine.device.type == "cuda":
        return float(torch.cuda.memory_allocated(engine.device))
    weights = [*engine.model.parameters(), *engine.model.buffers()]
    state = [tensor for fragment in engine.fragments() for tensor in (fragment.master, *fragment.state.values())]
    held = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in (*weights, *state)}
    return float(sum(held.values()))
