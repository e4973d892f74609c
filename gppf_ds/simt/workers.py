"""Answers from a pool of worker processes that goes on when one of them dies (out of memory, a crash in a decoder).

So it does when one never starts: a process forked beside other threads can hang in a lock that one of them held.

A request is answered by a pure function, so a fresh pool that starts at the first request not yet answered loses
nothing and gives the same bits.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from itertools import islice
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from typing import Any, Generic, TypeVar

import torch
import torch.multiprocessing
from torch.utils.data import DataLoader, Dataset

from gppf_ds.errors import UserError

MAX_DEATHS = 3
"""Pools in a row that die without an answer, after which the run is given up."""

START = 20.0
"""Seconds for a worker to start; a forked one takes milliseconds."""

_VERDICT = 2.0
"""Seconds for a worker whose pipe broke to be found dead."""

Request = TypeVar("Request")
Answer = TypeVar("Answer")

log = logging.getLogger(__name__)


class _WorkerDeathError(Exception):
    """Interrupts a wait for an answer."""


class WorkerPool(Generic[Request, Answer]):
    """Iterates over the answers to requests, in their order, read ahead by worker processes.

    Args:
        dataset: ``dataset[request]`` is the answer; a pure function of the request.
        requests: any number; taken in this process, never more than the workers read ahead.
        workers: processes; 0 answers in this one, where a death is the run's own.
        prefetch: requests that each worker reads ahead.
        name: of a request, for messages.

    Attributes:
        restarts: how often a fresh pool had to be started.

    Raises:
        UserError: while iterating, when :data:`MAX_DEATHS` pools in a row died without an answer.
    """

    def __init__(
        self,
        dataset: Dataset[Answer],
        requests: Iterable[Request],
        workers: int,
        prefetch: int,
        name: Callable[[Request], str],
    ) -> None:
        self.dataset = dataset
        self.workers = workers
        self.prefetch = prefetch
        self.name = name
        self.restarts = 0
        self._source = iter(requests)
        self._unanswered: deque[Request] = deque()

    def __iter__(self) -> Iterator[Answer]:
        deaths = 0
        while True:
            try:
                for answer in self._answers():
                    deaths = 0
                    yield answer
                return
            except _WorkerDeathError as death:
                cause = str(death)
            deaths += 1
            self.restarts += 1
            waiting = self.name(self._unanswered[0])
            if deaths == MAX_DEATHS:
                raise UserError(
                    f"{deaths} times in a row a data worker died ({cause}) before {waiting} was read: if memory ran "
                    "out, lower loader.workers or loader.prefetch or give the job more memory; if it is a crash, "
                    "loader.workers: 0 shows where."
                )
            log.warning("data worker died (%s): a fresh pool goes on at %s (restart %d)", cause, waiting, self.restarts)

    def _answers(self) -> Iterator[Answer]:
        """Answers of one pool, from the first request that has none; raises :class:`_WorkerDeathError`."""
        given = deque(self._unanswered)
        self._take(given)
        if not given:
            return
        started = torch.multiprocessing.get_context().Semaphore(0)  # as high as workers have started
        loader = DataLoader(
            self.dataset,
            batch_size=None,
            sampler=_drain(given),
            num_workers=self.workers,
            prefetch_factor=self.prefetch if self.workers else None,
            collate_fn=_identity,
            worker_init_fn=partial(_start_worker, started),
        )
        answers, processes = _start(loader)
        try:
            with _alarm(processes, started) as hung:
                while self._unanswered:
                    with _deaths_told(processes, hung):
                        answer = next(answers)
                    self._unanswered.popleft()
                    yield answer
                    self._take(given)
        finally:
            if processes:
                answers._shutdown_workers()
            for process in processes:
                if process.is_alive():  # one that never started hears no SIGTERM
                    process.kill()
                    process.join(_VERDICT)

    def _take(self, given: deque[Request]) -> None:
        """Takes as many requests as a pool may ask for until its next answer has been handed over.

        Outside of all waiting: an interrupted generator would be at its end.
        """
        ahead = self.workers * self.prefetch + 1
        for request in islice(self._source, max(0, ahead - len(self._unanswered))):
            self._unanswered.append(request)
            given.append(request)


def _drain(given: deque[Request]) -> Iterator[Request]:
    while given:
        yield given.popleft()


def _identity(answer: Any) -> Any:
    return answer


def _start_worker(started: Any, worker: int) -> None:
    """One thread per worker: the pool is the parallelism."""
    started.release()
    torch.set_num_threads(1)
    try:
        import cv2

        cv2.setNumThreads(0)
    except ImportError:
        pass


def _start(loader: DataLoader[Answer]) -> tuple[Any, list[BaseProcess]]:
    """The iterator of a loader and its worker processes."""
    try:
        answers: Any = iter(loader)
        return answers, getattr(answers, "_workers", [])
    except RuntimeError as error:  # torch's own handler, see below, tells of a worker that dies at once
        raise _WorkerDeathError(str(error)) from error


@contextmanager
def _alarm(processes: Sequence[BaseProcess], started: Any) -> Iterator[Callable[[], bool]]:
    """Wakes this process, inside, when its workers should have started; hands out whether one of them then has not."""
    due = time.monotonic() + START

    def hung() -> bool:
        return started.get_value() < len(processes) and time.monotonic() >= due

    def wake() -> None:
        if hung():
            os.kill(os.getpid(), signal.SIGCHLD)

    if not processes:
        yield hung
        return
    timer = threading.Timer(START, wake)
    timer.daemon = True
    timer.start()
    try:
        yield hung
    finally:
        timer.cancel()
        timer.join()  # the next pool is forked beside as few threads as may be


@contextmanager
def _deaths_told(processes: Sequence[BaseProcess], hung: Callable[[], bool]) -> Iterator[None]:
    """Inside, the death of a worker raises :class:`_WorkerDeathError`; outside, it waits.

    torch's own handler of SIGCHLD raises in whatever the main thread is doing, in the middle of a step too: it goes.
    But a signal is needed in here: a worker that dies in the middle of a message leaves a read that would never end.
    """
    if not processes or threading.current_thread() is not threading.main_thread():
        with _errors_of_deaths(processes):
            yield
        return

    def tell(*_: Any) -> None:
        if hung():
            raise _WorkerDeathError(f"it did not start within {START:g} s")
        if any(process.exitcode is not None for process in processes):
            raise _WorkerDeathError(_cause(processes))

    try:
        signal.signal(signal.SIGCHLD, tell)
        tell()  # of deaths before
        with _errors_of_deaths(processes):
            yield
    finally:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)


@contextmanager
def _errors_of_deaths(processes: Sequence[BaseProcess]) -> Iterator[None]:
    """Turns the errors that a broken pipe to a dead worker makes into :class:`_WorkerDeathError`."""
    try:
        yield
    except (RuntimeError, OSError, EOFError) as error:
        ended = wait([process.sentinel for process in processes], timeout=_VERDICT) if processes else []
        if not ended:
            raise
        for process in processes:
            if process.sentinel in ended:
                process.join(_VERDICT)  # its pipe closes a moment before its exit code is known
        raise _WorkerDeathError(_cause(processes)) from error


def _cause(processes: Sequence[BaseProcess]) -> str:
    dead = [process for process in processes if process.exitcode is not None]
    return ", ".join(f"process {process.pid} {_end(process.exitcode or 0)}" for process in dead)


def _end(code: int) -> str:
    if code >= 0:
        return f"ended with code {code}"
    name = str(-code)
    with suppress(ValueError):
        name = signal.Signals(-code).name
    return f"was killed by {name}" + (", as the system does when memory runs out" if name == "SIGKILL" else "")
