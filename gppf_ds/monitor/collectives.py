"""Where a step's time goes when ranks talk: waiting for the last of them, and the talking itself.

Every rank notes how long it spends in each collective of a step. A collective cannot end before its last rank has come,
so that rank spends only what the transfer takes: the minimum over the ranks is communication, what a rank spends beyond
it is waiting for a slower one. No clocks are compared. All ranks call the same collectives in the same order
(docs/architecture.md), which is what makes the n-th entry of one rank comparable with the n-th of another.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from gppf_ds.simt.audit import OPERATIONS

CAPACITY = 1024
"""Collectives of one step that are told apart; later ones count as one. A fixed number, so that ranks can compare
their entries whatever each of them has called."""

Mark = Any
"""A moment: seconds on the CPU, an event in the stream of a GPU, where the host runs ahead."""


@dataclass(frozen=True)
class Talk:
    """What one step's collectives took on this rank, in seconds."""

    communication: float
    straggler_wait: float


class CollectiveClock:
    """Of one rank; all ranks make theirs and use it alike.

    Args:
        device: of this rank.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._mark: Callable[[], Mark] = _event if device.type == "cuda" else time.perf_counter
        self._steps: list[list[list[tuple[Mark, Mark]]]] = []

    @contextmanager
    def step(self) -> Iterator[None]:
        """Times the collectives that are called inside, which is one optimizer step."""
        if dist.get_world_size() == 1:
            self._steps.append([])
            yield
            return
        intervals: list[list[tuple[Mark, Mark]]] = []
        originals = {name: getattr(dist.ProcessGroup, name) for name in OPERATIONS}
        try:
            for name, original in originals.items():
                setattr(dist.ProcessGroup, name, _timed(original, self._mark, intervals))
            yield
        finally:
            for name, original in originals.items():
                setattr(dist.ProcessGroup, name, original)
            self._steps.append(intervals)

    def settle(self) -> list[Talk]:
        """Of every step since the last call; a collective call where there are several ranks, of 4 KiB a step."""
        own = torch.zeros(len(self._steps), CAPACITY)
        for row, intervals in zip(own, self._steps, strict=True):
            for number, spent in enumerate(intervals):
                row[min(number, CAPACITY - 1)] += sum(_seconds(*marks) for marks in spent)
        self._steps = []
        least = own
        if dist.get_world_size() > 1:
            least = own.to(self.device, copy=True)
            dist.all_reduce(least, dist.ReduceOp.MIN)
        communication = least.sum(1).tolist()
        return [Talk(c, max(s - c, 0.0)) for s, c in zip(own.sum(1).tolist(), communication, strict=True)]


def _timed(original: Callable[..., Any], mark: Callable[[], Mark], steps: list[list[tuple[Mark, Mark]]]) -> Any:
    """The method of a process group, and the ``wait`` of what it returns, with the time spent in both noted."""

    def call(*args: Any, **kwargs: Any) -> Any:
        spent: list[tuple[Mark, Mark]] = []
        steps.append(spent)
        started = mark()
        work = original(*args, **kwargs)
        spent.append((started, mark()))
        return None if work is None else _TimedWork(work, mark, spent)

    return call


class _TimedWork:
    """What a collective returns; knows how long it was waited for."""

    def __init__(self, work: Any, mark: Callable[[], Mark], spent: list[tuple[Mark, Mark]]) -> None:
        self._work, self._mark, self._spent = work, mark, spent

    def wait(self, *args: Any, **kwargs: Any) -> Any:
        started = self._mark()
        answer = self._work.wait(*args, **kwargs)
        self._spent.append((started, self._mark()))
        return answer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._work, name)


def _event() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _seconds(start: Mark, end: Mark) -> float:
    if isinstance(start, float):
        return float(end - start)
    end.synchronize()
    return start.elapsed_time(end) / 1000
