"""Reading exactly the batches that the schedule gives this rank, ahead of time, in one pool of worker processes."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from gppf_ds.config import LoaderConfig
from gppf_ds.errors import SampleError, UserError
from gppf_ds.seeding import SAMPLE, seed_global_generators
from gppf_ds.simt.sampler import Request
from gppf_ds.simt.workers import WorkerPool
from gppf_ds.tasks.task import Dataset

MAX_ATTEMPTS = 50
"""Unreadable samples in a row after which a batch is given up."""

log = logging.getLogger(__name__)


@dataclass
class LoadedBatch:
    """A collated batch, still on the CPU."""

    request: Request
    data: Any
    unreadable: list[str] = field(default_factory=list)
    """What could not be read and was replaced by the task's next sample."""
    restarts: int = 0
    """Pools of workers that died before this batch and after the one before it."""


@dataclass
class TaskReader:
    """One task's data set and how its samples become a batch."""

    dataset: Dataset
    collate: Callable[[list[Any]], Any]


class RequestDataset(torch.utils.data.Dataset[LoadedBatch | UserError]):
    """Answers a :class:`Request` with its batch; a sample's randomness is a function of (seed, task, epoch, index).

    A :class:`UserError` is returned, since torch would add the worker's traceback to one that is raised.
    """

    def __init__(self, readers: Mapping[str, TaskReader], seed: int) -> None:
        self.readers = dict(readers)
        self.seed = seed

    def __getitem__(self, request: Request) -> LoadedBatch | UserError:
        reader = self.readers[request.task]
        unreadable: list[str] = []
        try:
            samples = [
                self._sample(reader.dataset, request.task, epoch, index, unreadable)
                for epoch, index in zip(request.epochs, request.indices, strict=True)
            ]
        except UserError as error:
            return error
        return LoadedBatch(request, reader.collate(samples), unreadable)

    def _sample(self, dataset: Dataset, task: str, epoch: int, index: int, unreadable: list[str]) -> Any:
        for attempt in range(MAX_ATTEMPTS):
            candidate = (index + attempt) % len(dataset)
            seed_global_generators(self.seed, SAMPLE, task, epoch, candidate)
            try:
                return dataset[candidate]
            except (OSError, SampleError) as error:
                unreadable.append(f"{task}: sample {candidate}: {error}")
        raise UserError(f"task {task!r}: {MAX_ATTEMPTS} samples in a row are unreadable; the last: {unreadable[-1]}.")


def load(
    readers: Mapping[str, TaskReader], requests: Iterable[Request], seed: int, config: LoaderConfig
) -> Iterator[LoadedBatch]:
    """The batches for the requests, in their order.

    Args:
        readers: by task.
        requests: what this rank's devices read, step by step.
        seed: of the run.
        config: workers and prefetch.

    Raises:
        UserError: a task's samples are unreadable, or workers die again and again.
    """
    pool = WorkerPool(RequestDataset(readers, seed), requests, config.workers, config.prefetch, _name)
    restarts = 0
    for answer in pool:
        if isinstance(answer, UserError):
            raise answer
        answer.restarts, restarts = pool.restarts - restarts, pool.restarts
        yield answer


def _name(request: Request) -> str:
    samples = ", ".join(map(str, request.indices))
    return f"step {request.step}, task {request.task!r}, samples {samples}"


class UnreadableSamples:
    """Counts what could not be read and ends the run when it is more than the configured share."""

    def __init__(self, config: LoaderConfig) -> None:
        self.limit = config.max_unreadable_share
        self.read = 0
        self.lost = 0
        self._known: set[str] = set()

    def observe(self, batch: LoadedBatch) -> None:
        """Logs each unreadable sample once.

        Raises:
            UserError: too many of the samples read so far were unreadable.
        """
        self.read += len(batch.request.indices)
        self.lost += len(batch.unreadable)
        for message in batch.unreadable:
            if message not in self._known:
                self._known.add(message)
                log.warning("unreadable sample replaced: %s", message)
        # A single bad file early on is no verdict about the set.
        if self.lost > self.limit * max(self.read, 200):
            raise UserError(
                f"{self.lost} of {self.read} samples could not be read, more than loader.max_unreadable_share "
                f"({self.limit:.1%}): repair the data (the last: {batch.unreadable[-1] if batch.unreadable else ''}) "
                "or raise the share."
            )
