"""Evaluation: every task on the argmax path of its controller, each validation image once over all ranks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.data import Dataset

from gppf_ds.backbone.controller import Controller
from gppf_ds.backbone.lego import Pass
from gppf_ds.config import LoaderConfig
from gppf_ds.errors import SampleError, UserError
from gppf_ds.simt.model import SimtModel
from gppf_ds.simt.workers import WorkerPool
from gppf_ds.tasks.task import Task


class _Validation(Dataset[Any]):
    """Batches of a task's validation samples, by their indices.

    A sample that cannot be read is an error, for a metric over the rest would lie. The error is returned, since torch
    would add the worker's traceback to one that is raised.
    """

    def __init__(self, task: Task, name: str) -> None:
        self.samples = task.dataset("val")
        self.collate = task.collate
        self.name = name

    def __getitem__(self, indices: Sequence[int]) -> Any:
        samples = []
        for index in indices:
            try:
                samples.append(self.samples[index])
            except (OSError, SampleError) as error:
                return UserError(f"task {self.name!r}: validation sample {index} cannot be read: {error}")
        return self.collate(samples)


def evaluate(
    model: SimtModel,
    controller: Controller,
    tasks: Mapping[str, Task],
    device: torch.device,
    loader: LoaderConfig,
) -> dict[str, dict[str, float]]:
    """The metrics of every task; a collective call whose result is the same on every rank.

    Args:
        model: with whole parameters (ZeRO stages 0 to 2).
        controller: of the same tasks.
        tasks: by name.
        device: of this rank.
        loader: workers and prefetch.
    """
    was_training = model.training
    model.eval()
    results = {}
    for name, task in tasks.items():
        route = controller.fixed_route(name)
        metric = task.metric()
        for data in _batches(task, name, loader):
            batch = task.preprocess(data, device, training=False)
            predictions = model.predict(name, batch, Pass(batch.images, route, sizes=batch.sizes))
            metric.update(predictions, batch.targets)
        states: list[Any] = [None] * _world_size()
        if _world_size() > 1:
            dist.all_gather_object(states, metric.state())
        else:
            states = [metric.state()]
        metric.merge(states)
        results[name] = metric.compute()
    model.train(was_training)
    return results


def _world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def _batches(task: Task, name: str, loader: LoaderConfig) -> Iterator[Any]:
    """This rank's share of the validation set: every world-size-th image."""
    dataset = _Validation(task, name)
    rank = dist.get_rank() if dist.is_initialized() else 0
    own = range(rank, len(dataset.samples), _world_size())
    requests = (own[start : start + task.batch_size] for start in range(0, len(own), task.batch_size))
    pool = WorkerPool(dataset, requests, loader.workers, loader.prefetch, lambda i: f"task {name!r}, val samples {i}")
    for batch in pool:
        if isinstance(batch, UserError):
            raise batch
        yield batch
