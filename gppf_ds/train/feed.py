"""What the devices of a run are fed: which task and samples each has in a step, read and prepared."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch

from gppf_ds.backbone.lego import Pass
from gppf_ds.config import RunConfig
from gppf_ds.seeding import FORWARD, seed_global_generators
from gppf_ds.simt.engine import SimtEngine
from gppf_ds.simt.loader import LoadedBatch, TaskReader, load
from gppf_ds.simt.model import Job
from gppf_ds.simt.sampler import Sampler
from gppf_ds.simt.schedule import Schedule
from gppf_ds.tasks.task import Batch, Task
from gppf_ds.train.held_out import split_off


class Feed:
    """Schedule, sampler and readers of a run.

    Args:
        config: of the run.
        tasks: by name.

    Attributes:
        sizes: of the training sets, by task.
        held_out: batches that training never sees, by task; none without ``backbone.moe.adaptive``.
    """

    def __init__(self, config: RunConfig, tasks: Mapping[str, Task]) -> None:
        self.config = config
        self.task_by_name = dict(tasks)
        self.readers = {name: TaskReader(task.dataset("train"), task.collate) for name, task in tasks.items()}
        self.held_out: dict[str, TaskReader] = {}
        if config.backbone.moe is not None and config.backbone.moe.adaptive is not None:
            self._hold_out(config.backbone.moe.adaptive.images)
        self.sizes = {name: len(reader.dataset) for name, reader in self.readers.items()}
        weights = {name: task.weight for name, task in tasks.items()}
        engine = config.engine
        self.schedule = Schedule.from_weights(
            weights, config.schedule, config.seed, engine.devices_per_rank, engine.accumulation
        )
        self.sampler = Sampler(self.schedule, list(self.sizes.values()), [task.batch_size for task in tasks.values()])

    def _hold_out(self, images: int) -> None:
        for name, task in self.task_by_name.items():
            learnt, held = split_off(self.readers[name].dataset, images, task.batch_size, self.config.seed, name)
            self.readers[name] = TaskReader(learnt, task.collate)
            self.held_out[name] = TaskReader(held, task.collate)

    def tasks(self, step: int, num_devices: int) -> list[str]:
        """The task of every device."""
        names: list[str] = np.array(self.schedule.tasks, dtype=object)[self.schedule(step, num_devices)].tolist()
        return names

    def batches(
        self, start: int, stop: int, cursors: Mapping[str, int], devices: Sequence[int], num_devices: int
    ) -> Iterator[LoadedBatch]:
        """The batches of these devices from step ``start`` up to ``stop``, in the order of the devices."""
        position = [cursors[name] for name in self.schedule.tasks]
        requests = self.sampler(start, stop, position, devices, num_devices)
        return load(self.readers, requests, self.config.seed, self.config.loader)

    def prepare(self, loaded: LoadedBatch, device: torch.device) -> Batch:
        """The batch on ``device``, ready for the backbone; its randomness is that of the virtual device."""
        request = loaded.request
        seed_global_generators(self.config.seed, FORWARD, request.step, request.device, "preprocess")
        return self.task_by_name[request.task].preprocess(loaded.data, device, training=True)

    def job(self, loaded: LoadedBatch, engine: SimtEngine) -> Job:
        """What a device does with a batch in the engine's present state."""
        request = loaded.request
        batch = self.prepare(loaded, engine.device)
        route = engine.route(request.task, request.step, request.device)
        key = (self.config.seed, request.step, request.device)
        return Job(request.device, request.task, batch, Pass(batch.images, route, key, batch.sizes))
