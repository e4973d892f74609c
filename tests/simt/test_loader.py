"""Reading the requested batches: order, randomness that follows the sample, and what cannot be read."""

from __future__ import annotations

import logging
import random

import numpy as np
import pytest
import torch

from gppf_ds.config import LoaderConfig
from gppf_ds.errors import SampleError, UserError
from gppf_ds.simt.loader import MAX_ATTEMPTS, LoadedBatch, TaskReader, UnreadableSamples, load
from gppf_ds.simt.sampler import Request

torch.set_num_threads(1)


class Noisy:
    """Samples that show which index was read and what the three global generators gave."""

    def __init__(self, size: int, broken: dict[int, type[Exception]] | None = None) -> None:
        self.size = size
        self.broken = broken or {}

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> tuple[int, float, float, float]:
        if index in self.broken:
            raise self.broken[index](f"file {index}.jpg is truncated")
        return index, random.random(), float(np.random.rand()), float(torch.rand(()))


def request(step: int, task: str, indices: list[int], epoch: int = 0, device: int = 0) -> Request:
    return Request(step, device, task, (epoch,) * len(indices), tuple(indices))


def readers(**broken) -> dict[str, TaskReader]:
    return {"a": TaskReader(Noisy(100, broken.get("a")), list), "b": TaskReader(Noisy(7, broken.get("b")), tuple)}


REQUESTS = [request(s, "ab"[s % 2], [s, (s + 3) % 7]) for s in range(7)]


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_come_in_the_order_of_the_requests(workers):
    batches = list(load(readers(), REQUESTS, 0, LoaderConfig(workers=workers, prefetch=2)))
    assert [b.request for b in batches] == REQUESTS
    for batch in batches:
        assert tuple(sample[0] for sample in batch.data) == batch.request.indices
        assert isinstance(batch.data, list if batch.request.task == "a" else tuple)
        assert batch.unreadable == []


def test_a_sample_does_not_depend_on_workers_step_device_or_batch():
    alone = next(load(readers(), [request(9, "a", [5], device=3)], 1, LoaderConfig(workers=0))).data[0]
    beside = next(load(readers(), [request(0, "a", [4, 5, 6])], 1, LoaderConfig(workers=1))).data[1]
    assert alone == beside


def test_a_samples_randomness_depends_on_seed_task_epoch_and_index():
    def one(seed: int, task: str, epoch: int, index: int) -> tuple:
        batches = load(readers(), [request(0, task, [index], epoch)], seed, LoaderConfig(workers=0))
        return next(iter(batches)).data[0][1:]

    keys = [(0, "a", 0, 5), (1, "a", 0, 5), (0, "b", 0, 5), (0, "a", 1, 5), (0, "a", 0, 6), (0, "a", 5, 0)]
    values = [one(*key) for key in keys]
    for column in zip(*values, strict=True):
        assert len(set(column)) == len(keys)


@pytest.mark.parametrize("error", [OSError, SampleError])
def test_an_unreadable_sample_is_replaced_by_the_next_readable_one(error):
    broken = {6: error, 0: error}
    (batch,) = load(readers(b=broken), [request(0, "b", [6, 2])], 0, LoaderConfig(workers=0))
    assert [sample[0] for sample in batch.data] == [1, 2]
    assert len(batch.unreadable) == 2
    assert "b: sample 6: file 6.jpg is truncated" in batch.unreadable[0]


def test_a_programming_error_is_not_swallowed():
    with pytest.raises(KeyError):
        list(load(readers(b={1: KeyError}), [request(0, "b", [1])], 0, LoaderConfig(workers=0)))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_set_without_a_readable_sample_ends_in_one_sentence(workers):
    broken = dict.fromkeys(range(7), OSError)
    with pytest.raises(UserError) as error:
        list(load(readers(b=broken), [request(0, "b", [1])], 0, LoaderConfig(workers=workers)))
    sentence = str(error.value)
    assert f"task 'b': {MAX_ATTEMPTS} samples in a row are unreadable" in sentence
    assert "\n" not in sentence


def batch(read: int, lost: list[str]) -> LoadedBatch:
    return LoadedBatch(request(0, "a", list(range(read))), None, lost)


def test_one_bad_file_early_on_does_not_end_the_run(caplog):
    counter = UnreadableSamples(LoaderConfig(max_unreadable_share=0.01))
    with caplog.at_level(logging.WARNING):
        counter.observe(batch(4, ["a: sample 1: x"]))
        counter.observe(batch(4, ["a: sample 1: x"]))
    assert len(caplog.records) == 1
    with pytest.raises(UserError, match=r"3 of 12 samples.*loader\.max_unreadable_share \(1\.0%\)"):
        counter.observe(batch(4, ["a: sample 2: y"]))


def test_the_share_counts_in_the_long_run():
    counter = UnreadableSamples(LoaderConfig(max_unreadable_share=0.01))
    for _ in range(50):
        counter.observe(batch(100, ["bad"]))
    assert (counter.read, counter.lost) == (5000, 50)
    with pytest.raises(UserError):
        counter.observe(batch(10, ["bad"]))


def test_a_share_of_zero_accepts_nothing():
    with pytest.raises(UserError):
        UnreadableSamples(LoaderConfig(max_unreadable_share=0.0)).observe(batch(1000, ["bad"]))
