"""The schedule as a pure function: marginals, stratification, and a golden list that must never change silently."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gppf_ds.config import ScheduleConfig
from gppf_ds.errors import UserError
from gppf_ds.simt.schedule import Schedule

# GPPF appendix D.1.
PAPER = {"in21k": 4.0, "coco": 2.5, "lvis": 2.5, "o365": 4.0, "oi": 4.0, "ade": 1.0, "stuff": 2.0, "voc": 1.0}

weight_lists = st.lists(st.floats(0.1, 10), min_size=1, max_size=9)
kinds = st.sampled_from(["iid", "stratified", "per_batch", "static"])


def make(weights: dict[str, float] | list[float], kind: str, seed: int = 0) -> Schedule:
    if isinstance(weights, list):
        weights = {f"t{i}": w for i, w in enumerate(weights)}
    static = list(weights) if kind == "static" else []
    return Schedule.from_weights(weights, ScheduleConfig(kind=kind, static=static), seed)


@settings(deadline=None, max_examples=60)
@given(weight_lists, kinds, st.integers(0, 2**31), st.lists(st.integers(0, 10**7), min_size=2), st.integers(1, 70))
def test_a_pure_function_of_seed_and_step(weights, kind, seed, steps, num_devices):
    schedule, other = make(weights, kind, seed), make(weights, kind, seed)
    forward = [schedule(step, num_devices) for step in steps]
    backward = [other(step, num_devices) for step in reversed(steps)][::-1]
    for one, two in zip(forward, backward, strict=True):
        assert one.shape == (num_devices,)
        assert one.dtype == np.int64
        assert one.min() >= 0
        assert one.max() < len(weights)
        np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize("kind", ["iid", "per_batch", "stratified"])
def test_seeds_and_steps_give_different_draws(kind):
    draws = {make(PAPER, kind, seed)(step, 56).tobytes() for seed in range(5) for step in range(20)}
    assert len(draws) > (5 if kind == "per_batch" else 95)


@pytest.mark.parametrize("kind", ["iid", "per_batch"])
@pytest.mark.parametrize("seed", [0, 1])
def test_marginals_within_three_sigma(kind, seed):
    schedule = make(PAPER, kind, seed)
    steps, devices = 3000, 8 if kind == "iid" else 1
    counts = sum(np.bincount(schedule(step, devices), minlength=len(PAPER)) for step in range(steps))
    n, p = steps * devices, np.array(list(PAPER.values())) / sum(PAPER.values())
    assert (np.abs(counts - n * p) <= 3 * np.sqrt(n * p * (1 - p))).all()


def test_iid_devices_and_steps_are_independent():
    schedule = make({"a": 1.0, "b": 1.0}, "iid")
    draws = np.array([schedule(step, 4) for step in range(4000)]) * 2 - 1
    sigma = 1 / math.sqrt(len(draws))
    assert abs((draws[:, 0] * draws[:, 1]).mean()) < 3 * sigma
    assert abs((draws[1:, 0] * draws[:-1, 0]).mean()) < 3 * sigma


@settings(deadline=None, max_examples=40)
@given(weight_lists, st.integers(0, 1000), st.integers(0, 10**6), st.integers(1, 30), st.integers(0, 30))
def test_iid_draw_of_a_device_does_not_depend_on_how_many_there_are(weights, seed, step, few, more):
    schedule = make(weights, "iid", seed)
    np.testing.assert_array_equal(schedule(step, few), schedule(step, few + more)[:few])


@settings(deadline=None, max_examples=40)
@given(weight_lists, st.integers(0, 1000), st.integers(0, 10**6), st.integers(1, 30))
def test_per_batch_gives_all_devices_one_task(weights, seed, step, num_devices):
    assert len(set(make(weights, "per_batch", seed)(step, num_devices).tolist())) == 1


@settings(deadline=None, max_examples=200)
@given(weight_lists, st.integers(0, 1000), st.integers(0, 10**7), st.integers(1, 100))
def test_stratified_counts_are_within_one_of_the_expectation(weights, seed, step, num_devices):
    counts = np.bincount(make(weights, "stratified", seed)(step, num_devices), minlength=len(weights))
    expected = np.array(weights) / sum(weights) * num_devices
    assert (np.abs(counts - expected) < 1 + 1e-6).all()


@pytest.mark.parametrize("num_devices", [1, 3, 8])
def test_stratified_marginals_of_every_device(num_devices):
    schedule, steps = make(PAPER, "stratified"), 6000
    draws = np.array([schedule(step, num_devices) for step in range(steps)])
    for index, weight in enumerate(PAPER.values()):
        p = weight / sum(PAPER.values())
        hits = draws == index
        # Over all devices the golden-ratio offsets are far more even than independent draws ...
        assert abs(hits.sum() - p * hits.size) <= 0.5 * np.sqrt(hits.size * p * (1 - p)) + 1
        # ... and one device sees them through a random permutation.
        assert (np.abs(hits.sum(0) - p * steps) <= 4 * np.sqrt(steps * p * (1 - p))).all()


@settings(deadline=None, max_examples=150)
@given(weight_lists, st.integers(0, 1000), st.integers(0, 10**6), st.integers(1, 16))
def test_stratified_visits_every_task_in_every_window(weights, seed, start, num_devices):
    """The docstring promises ceil(2.62 / (p V)) steps; by the three-distance theorem ceil(2 / (p V)) are enough."""
    schedule = make(weights, "stratified", seed)
    p = np.array(weights) / sum(weights)
    windows = [math.ceil(2 / (share * num_devices)) for share in p]
    draws = [schedule(step, num_devices) for step in range(start, start + max(windows))]
    for task, window in enumerate(windows):
        assert any(task in draw for draw in draws[:window]), (task, window)


def test_stratified_window_for_the_rarest_of_many_tasks():
    schedule = make({"rare": 0.01, "common": 0.99}, "stratified")
    visited = [step for step in range(3000) if 0 in schedule(step, 2)]
    assert np.diff([-1, *visited, 3000]).max() <= math.ceil(2 / (0.01 * 2))


def test_static_deals_the_list_in_turn():
    config = ScheduleConfig(kind="static", static=["b", "a", "b"])
    schedule = Schedule.from_weights({"a": 1.0, "b": 1.0, "c": 1.0}, config, 0)
    for step in (0, 7):
        assert schedule(step, 7).tolist() == [1, 0, 1, 1, 0, 1, 1]


def test_static_and_its_list_come_together():
    for values in ({"kind": "static"}, {"kind": "iid", "static": ["a"]}):
        with pytest.raises(UserError, match=r"schedule\.static"):
            ScheduleConfig(**values)


def test_bad_tasks_are_refused():
    with pytest.raises(UserError, match="tasks is empty"):
        Schedule.from_weights({}, ScheduleConfig(), 0)
    with pytest.raises(UserError, match=r"schedule\.static.*'b'"):
        Schedule.from_weights({"a": 1.0}, ScheduleConfig(kind="static", static=["b"]), 0)


GOLDEN = {
    "iid": [
        [2, 2, 1, 1, 0, 2, 4, 1],
        [7, 1, 1, 4, 4, 1, 4, 2],
        [3, 6, 0, 6, 5, 1, 3, 3],
        [4, 4, 0, 0, 4, 4, 7, 0],
    ],
    "stratified": [
        [4, 2, 3, 1, 4, 6, 0, 0],
        [6, 7, 4, 0, 2, 1, 3, 4],
        [6, 4, 2, 5, 3, 1, 3, 0],
        [0, 3, 2, 4, 1, 3, 7, 5],
    ],
    "per_batch": [
        [2, 2, 2, 2, 2, 2, 2, 2],
        [7, 7, 7, 7, 7, 7, 7, 7],
        [3, 3, 3, 3, 3, 3, 3, 3],
        [4, 4, 4, 4, 4, 4, 4, 4],
    ],
}


@pytest.mark.parametrize("kind", list(GOLDEN))
def test_golden_list(kind):
    """A change here changes what every existing run does when it resumes."""
    schedule = make(PAPER, kind, seed=2208)
    assert [schedule(step, 8).tolist() for step in (0, 1, 2, 499_999)] == GOLDEN[kind]
