"""Every sample of a task once per epoch of that task, whatever the ranks do, and no memory of the size of the set."""

from __future__ import annotations

import tracemalloc
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gppf_ds.config import ScheduleConfig
from gppf_ds.errors import UserError
from gppf_ds.seeding import ORDER
from gppf_ds.simt.sampler import Request, Sampler, shuffled
from gppf_ds.simt.schedule import Schedule


@pytest.mark.parametrize("size", range(1, 201))
def test_shuffled_is_a_permutation(size):
    for seed in range(3):
        assert sorted(shuffled(np.arange(size), size, seed, "task", 0).tolist()) == list(range(size))


@settings(deadline=None, max_examples=40)
@given(st.integers(201, 2**40), st.integers(0, 2**31), st.integers(0, 50))
def test_shuffled_is_injective_on_big_sets(size, seed, epoch):
    positions = np.unique(np.random.default_rng(seed).integers(size, size=2000))
    images = shuffled(positions, size, seed, "task", epoch)
    assert images.min() >= 0
    assert images.max() < size
    assert len(np.unique(images)) == len(positions)


@pytest.mark.parametrize("size", [2**16, 2**16 + 1, 2**17 - 1, 99_991])
def test_shuffled_is_a_permutation_of_a_whole_big_set(size):
    assert np.bincount(shuffled(np.arange(size), size, 5, 0), minlength=size).tolist() == [1] * size


def test_shuffled_maps_a_position_alike_however_it_is_asked():
    whole = shuffled(np.arange(1000), 1000, 1, "t", 2)
    parts = np.concatenate([shuffled(np.arange(i, i + 10), 1000, 1, "t", 2) for i in range(0, 1000, 10)])
    np.testing.assert_array_equal(whole, parts)


def test_shuffled_depends_on_seed_task_and_epoch():
    keys = [(0, "a", 0), (1, "a", 0), (0, "b", 0), (0, "a", 1)]
    orders = {shuffled(np.arange(100), 100, seed, *key).tobytes() for seed, *key in keys}
    assert len(orders) == len(keys)


@pytest.mark.parametrize("size", [2, 5, 10, 33, 100])
def test_shuffled_puts_every_index_everywhere_about_equally_often(size):
    """A Feistel network over 2 or 3 bits a side has a bias, up to a third for 5 samples; it is gone at 33."""
    trials = 2000
    first, last = Counter(), Counter()
    for epoch in range(trials):
        images = shuffled(np.array([0, size - 1]), size, 7, epoch)
        first[int(images[0])] += 1
        last[int(images[1])] += 1
    sigma = np.sqrt(trials / size * (1 - 1 / size))
    bound = max(0.45 * trials / size if size < 33 else 0, 4.5 * sigma)
    for counts in (first, last):
        assert max(abs(counts[i] - trials / size) for i in range(size)) < bound


def test_golden_order():
    """A change here changes which samples every existing run reads when it resumes."""
    assert shuffled(np.arange(12), 12, 2208, ORDER, "coco", 3).tolist() == [6, 7, 4, 3, 2, 5, 0, 1, 8, 9, 11, 10]
    assert shuffled(np.array([0, 1, 118_286]), 118_287, 2208, ORDER, "coco", 3).tolist() == [23061, 68010, 97918]


def test_shuffled_leaves_no_trace_of_the_order():
    """Neighbours end up far apart: the mean distance of a random permutation is size / 3."""
    size = 10_000
    distance = np.abs(np.diff(shuffled(np.arange(size), size, 3, 0))).mean()
    assert abs(distance / size - 1 / 3) < 0.01


def test_shuffled_needs_no_memory_of_the_size_of_the_set():
    tracemalloc.start()
    shuffled(np.arange(64), 10**12, 0, "task", 0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 200_000


def make(sizes: list[int], batches: list[int], weights: list[float], kind: str = "iid", seed: int = 0) -> Sampler:
    named = {f"t{i}": w for i, w in enumerate(weights)}
    return Sampler(Schedule.from_weights(named, ScheduleConfig(kind=kind), seed), sizes, batches)


@st.composite
def runs(draw: st.DrawFn) -> tuple[Sampler, list[tuple[int, int]]]:
    """A sampler, and the (ranks, devices per rank) of every step: they change in mid-run."""
    tasks = draw(st.integers(1, 3))

    def values(element):
        return draw(st.lists(element, min_size=tasks, max_size=tasks))

    kind = draw(st.sampled_from(["iid", "stratified", "per_batch"]))
    sampler = make(
        values(st.integers(1, 40)),
        values(st.integers(1, 17)),
        values(st.floats(0.2, 5)),
        kind,
        draw(st.integers(0, 99)),
    )
    return sampler, draw(st.lists(st.tuples(st.integers(1, 4), st.integers(1, 3)), min_size=1, max_size=25))


def play(sampler: Sampler, plan, cursors: list[int], first: int = 0) -> tuple[list[Request], list[list[int]]]:
    """All ranks' requests in device order, and the cursors before every step and after the last."""
    dealt, history = [], [cursors]
    for step, (ranks, per_rank) in enumerate(plan, start=first):
        step_requests = []
        for rank in reversed(range(ranks)):
            mine = [rank * per_rank + k for k in range(per_rank)]
            requests, after = sampler.requests(step, cursors, mine, ranks * per_rank)
            assert [r.device for r in requests] == mine
            step_requests.extend(requests)
            assert rank == ranks - 1 or after == history[-1]
            if rank == ranks - 1:
                history.append(after)
        dealt.extend(sorted(step_requests, key=lambda r: r.device))
        cursors = history[-1]
    return dealt, history


@settings(deadline=None, max_examples=120)
@given(runs())
def test_every_epoch_holds_every_sample_exactly_once(run):
    sampler, plan = run
    dealt, history = play(sampler, plan, [0] * len(sampler.sizes))
    for task, (size, batch) in enumerate(zip(sampler.sizes, sampler.batch_sizes, strict=True)):
        mine = [r for r in dealt if r.task == f"t{task}"]
        assert all(len(r.indices) == len(r.epochs) == batch for r in mine)
        pairs = [pair for r in mine for pair in zip(r.epochs, r.indices, strict=True)]
        assert len(pairs) == history[-1][task]
        assert [epoch for epoch, _ in pairs] == sorted(epoch for epoch, _ in pairs)
        epochs, rest = divmod(len(pairs), size)
        counts = Counter(pairs)
        assert set(counts.values()) <= {1}
        assert {(e, i) for e in range(epochs) for i in range(size)} <= set(counts)
        assert sum(e == epochs for e, _ in counts) == rest


@settings(deadline=None, max_examples=60)
@given(runs(), st.data())
def test_a_resumed_run_continues_alike(run, data):
    sampler, plan = run
    dealt, history = play(sampler, plan, [0] * len(sampler.sizes))
    stop = data.draw(st.integers(0, len(plan)))
    fresh = Sampler(sampler.schedule, sampler.sizes, sampler.batch_sizes)
    again, _ = play(fresh, plan[stop:], history[stop], first=stop)
    assert again == [r for r in dealt if r.step >= stop]


@settings(deadline=None, max_examples=30)
@given(runs(), st.integers(1, 6))
def test_iteration_is_the_same_as_step_by_step(run, num_devices):
    sampler, plan = run
    dealt, history = play(sampler, [(num_devices, 1)] * len(plan), [0] * len(sampler.sizes))
    middle = len(plan) // 2
    devices = range(num_devices)
    iterated = list(sampler(0, middle, history[0], devices, num_devices))
    iterated += sampler(middle, len(plan), history[middle], devices, num_devices)
    assert iterated == dealt


def test_the_samples_of_a_task_do_not_depend_on_the_ranks():
    few = make([11], [4], [1.0])
    alone = [i for r in play(few, [(1, 1)] * 12, [0])[0] for i in r.indices]
    together = [i for r in play(few, [(3, 2)] * 2, [0])[0] for i in r.indices]
    assert alone == together


def test_a_batch_straddles_epochs():
    (one, two), _ = make([5], [3], [1.0]).requests(0, [0], [0, 1], 2)
    assert one.epochs == (0, 0, 0)
    assert two.epochs == (0, 0, 1)
    assert set(one.indices + two.indices[:2]) == set(range(5))


def test_a_batch_larger_than_the_set_spans_several_epochs():
    (one,), after = make([3], [10], [1.0]).requests(0, [2], [0], 1)
    assert after == [12]
    assert one.epochs == (0, 1, 1, 1, 2, 2, 2, 3, 3, 3)
    assert set(one.indices[1:4]) == set(one.indices[4:7]) == set(one.indices[7:]) == {0, 1, 2}


def test_an_empty_training_set_is_refused_by_name():
    with pytest.raises(UserError, match="t1"):
        make([4, 0], [2, 2], [1.0, 1.0])


def test_every_epoch_and_task_has_its_own_order():
    requests, _ = make([30, 30], [90, 90], [1.0, 1.0], "stratified").requests(0, [0, 0], range(2), 2)
    orders = {r.indices[start : start + 30] for r in requests for start in (0, 30, 60)}
    assert len(orders) == 6
