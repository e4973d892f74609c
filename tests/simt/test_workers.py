"""Workers that die: the same batches as without, a line in the log, and one sentence if they go on dying."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from itertools import count, islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gppf_ds.config import LoaderConfig
from gppf_ds.errors import UserError
from gppf_ds.simt import workers
from gppf_ds.simt.loader import LoadedBatch, TaskReader, load
from gppf_ds.simt.sampler import Request
from gppf_ds.simt.workers import MAX_DEATHS, WorkerPool

torch.set_num_threads(1)
pytestmark = pytest.mark.timeout(60)


def kill_self() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class Deadly:
    """Noise; the sample ``deadly`` ends its process, ``times`` times in all."""

    def __init__(self, folder: Path, times: int, deadly: int = 5, end: Callable[[], None] = kill_self) -> None:
        self.folder, self.times, self.deadly, self.end = folder, times, deadly, end

    def __len__(self) -> int:
        return 100

    def __getitem__(self, index: int) -> torch.Tensor:
        if index == self.deadly and (died := len(list(self.folder.iterdir()))) < self.times:
            (self.folder / str(died)).touch()
            self.end()
        return torch.cat([torch.tensor([float(index)]), torch.rand(20_000)])


def requests(steps: int) -> list[Request]:
    return [Request(step, 0, "a", (0, 0), (step, step + 50)) for step in range(steps)]


def batches(dataset: Deadly, steps: int = 12, count: int = 2) -> Iterator[LoadedBatch]:
    reader = TaskReader(dataset, torch.stack)
    return load({"a": reader}, requests(steps), 0, LoaderConfig(workers=count, prefetch=2))


def same(one: list[LoadedBatch], other: list[LoadedBatch]) -> bool:
    pairs = zip(one, other, strict=True)
    return all(a.request == b.request and torch.equal(a.data, b.data) for a, b in pairs)


@pytest.mark.parametrize(
    ("end", "words"),
    [(kill_self, "was killed by SIGKILL, as the system does when memory runs out"), (lambda: os._exit(3), "code 3")],
    ids=["killed", "exits"],
)
@pytest.mark.parametrize("deadly", [0, 5, 11])
def test_a_death_changes_no_batch(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, deadly: int, end: Callable[[], None], words: str
) -> None:
    undisturbed = list(batches(Deadly(tmp_path, 0)))
    with caplog.at_level(logging.WARNING):
        found = list(batches(Deadly(tmp_path, 1, deadly, end)))
    assert same(found, undisturbed)
    assert sum(batch.restarts for batch in found) == 1
    assert next(batch.request.step for batch in found if batch.restarts) <= deadly
    (line,) = [record.getMessage() for record in caplog.records]
    assert words in line or "DataLoader worker" in line
    assert "restart 1" in line
    assert "step" in line
    assert "task 'a'" in line


def test_deaths_with_batches_between_them_go_on(tmp_path: Path) -> None:
    class Often(Deadly):
        def __getitem__(self, index: int) -> torch.Tensor:
            if index < 50 and index % 3 == 1 and not (marker := self.folder / str(index)).exists():
                marker.touch()
                kill_self()
            return super().__getitem__(index)

    (tmp_path / "often").mkdir()
    (tmp_path / "never").mkdir()
    found = list(batches(Often(tmp_path / "often", 0), count=1))
    assert same(found, list(batches(Deadly(tmp_path / "never", 0), count=1)))
    assert sum(batch.restarts for batch in found) == 4 > MAX_DEATHS


@pytest.mark.parametrize("count", [1, 2])
def test_a_worker_that_never_starts_is_replaced(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    """As one that hangs in a lock that another thread held when it was forked; SIGTERM does not end it."""
    undisturbed = list(batches(Deadly(tmp_path, 0), count=count))
    honest = workers._start_worker

    def hang_once(started: Any, worker: int) -> None:
        if worker == 0 and not (tmp_path / "hung").exists():
            (tmp_path / "hung").write_text(str(os.getpid()))
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            time.sleep(600)
        honest(started, worker)

    monkeypatch.setattr(workers, "_start_worker", hang_once)
    monkeypatch.setattr(workers, "START", 1.0)
    with caplog.at_level(logging.WARNING):
        found = list(batches(Deadly(tmp_path, 0), count=count))
    assert same(found, undisturbed)
    assert sum(batch.restarts for batch in found) == 1
    (line,) = [record.getMessage() for record in caplog.records]
    assert "did not start within 1 s" in line
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "hung").read_text()), 0)


@pytest.mark.parametrize("count", [1, 2])
def test_workers_that_always_die_end_in_one_sentence(tmp_path: Path, count: int) -> None:
    found = []
    with pytest.raises(UserError) as error:
        found.extend(batches(Deadly(tmp_path, 10**6), count=count))
    sentence = str(error.value)
    assert f"{MAX_DEATHS} times in a row a data worker died" in sentence
    assert "loader.workers" in sentence
    assert "task 'a', samples" in sentence
    assert "\n" not in sentence
    assert len(found) <= 5


def test_a_death_during_the_step_does_not_interrupt_it(tmp_path: Path) -> None:
    """It may be in the middle of an unfinished message, too: the big answer waits in the worker, half in its pipe."""

    class Late(Deadly):
        def __getitem__(self, index: int) -> np.ndarray:
            if index == 3 and not (self.folder / "died").exists():
                (self.folder / "died").touch()
                threading.Timer(0.5, kill_self).start()
            return np.full(2**22, index, np.uint8)

    reader = TaskReader(Late(tmp_path, 0), np.stack)
    found = load({"a": reader}, requests(6), 0, LoaderConfig(workers=1, prefetch=4))
    steps = [next(found).request.step]
    started = time.monotonic()
    while time.monotonic() < started + 1.5:  # the step
        time.sleep(0.01)
    assert (tmp_path / "died").exists()
    rest = list(found)
    assert steps + [batch.request.step for batch in rest] == list(range(6))
    assert all((batch.data[0] == batch.request.step).all() for batch in rest)
    assert [batch.restarts for batch in rest] == [1, 0, 0, 0, 0]


def test_a_death_while_a_read_waits_for_the_rest_of_a_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The read itself would never end: this process holds the other end of the pipe."""

    class Cut(Deadly):
        def __getitem__(self, index: int) -> np.ndarray:
            if index == 2 and not (self.folder / "died").exists():
                (self.folder / "died").touch()
                threading.Timer(1.0, kill_self).start()
                time.sleep(30)
            return np.full(8, index, np.uint8)

    pools: list[object] = []
    real = torch.utils.data.dataloader._MultiProcessingDataLoaderIter._try_get_data

    def endless(self: object, timeout: float = 0) -> object:
        pools.append(self)
        if len(pools) == 3:  # for the answer that never comes
            os.read(os.pipe()[0], 1)
        return real(self)

    monkeypatch.setattr(torch.utils.data.dataloader._MultiProcessingDataLoaderIter, "_try_get_data", endless)
    reader = TaskReader(Cut(tmp_path, 0), np.stack)
    found = list(load({"a": reader}, requests(6), 0, LoaderConfig(workers=1, prefetch=1)))
    assert [batch.request.step for batch in found] == list(range(6))
    assert sum(batch.restarts for batch in found) == 1


class Squares(torch.utils.data.Dataset[int]):
    def __getitem__(self, index: int) -> int:
        if index == 100:
            raise RuntimeError("no square")
        return index * index


def pool(requests: Iterator[int], number: int) -> WorkerPool[int, int]:
    return WorkerPool(Squares(), requests, number, 3, str)


@pytest.mark.parametrize("number", [0, 1, 3])
def test_one_pool_reads_no_further_than_it_should(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    started = []
    real = workers._start
    monkeypatch.setattr(workers, "_start", lambda loader: started.append(1) or real(loader))
    source = count()
    answers = iter(pool(source, number))
    assert list(islice(answers, 40)) == [i * i for i in range(40)]
    assert started == [1]
    assert next(source) <= 40 + number * 3


@pytest.mark.parametrize("number", [0, 2])
def test_an_error_of_the_data_set_is_no_death(number: int) -> None:
    answers = pool(iter(range(95, 110)), number)
    with pytest.raises(RuntimeError, match="no square"):
        list(answers)
    assert answers.restarts == 0


def test_it_also_works_outside_the_main_thread(tmp_path: Path) -> None:
    found: list[LoadedBatch] = []
    thread = threading.Thread(target=lambda: found.extend(batches(Deadly(tmp_path, 1))), daemon=True)
    thread.start()
    thread.join(40)
    assert [batch.request.step for batch in found] == list(range(12))
    assert sum(batch.restarts for batch in found) == 1
