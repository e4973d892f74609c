"""schedule.kind balanced: the tasks of the stratified schedule, placed where they even out the ranks."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gppf_ds.config import ScheduleConfig
from gppf_ds.errors import UserError
from gppf_ds.seeding import generator
from gppf_ds.simt.balance import balanced, cost_matrix
from gppf_ds.simt.schedule import Schedule

# GPPF appendix D.1: sampling weights; seconds of a device by estimate, here as the sum of two phases.
PAPER = {"in21k": 4.0, "coco": 2.5, "lvis": 2.5, "o365": 4.0, "oi": 4.0, "ade": 1.0, "stuff": 2.0, "voc": 1.0}
SECONDS = {"in21k": 0.27, "coco": 1.03, "lvis": 1.03, "o365": 1.55, "oi": 1.55, "ade": 0.3, "stuff": 0.3, "voc": 0.3}
PHASES: dict[str, float | list[float]] = {name: [0.6 * s, 0.4 * s] for name, s in SECONDS.items()}

cost_lists = st.lists(st.lists(st.floats(0.01, 10), min_size=2, max_size=2), min_size=1, max_size=8)


def make(costs: dict[str, float | list[float]] | None, per_rank: int, seed: int = 0) -> Schedule:
    config = ScheduleConfig(kind="balanced", costs=costs) if costs else ScheduleConfig(kind="stratified")
    return Schedule.from_weights(PAPER, config, seed, per_rank)


def loads(order: np.ndarray, costs: np.ndarray, per_rank: int) -> np.ndarray:
    """(groups, phases)"""
    return costs[order].reshape(len(order) // per_rank, per_rank, -1).sum(1)


def one_by_one(tasks: Sequence[int], costs: np.ndarray, per_rank: int) -> np.ndarray:
    """The rule without any shortcut: device by device, where the squared load grows least; (groups, phases)."""
    groups = len(tasks) // per_rank
    load, held = np.zeros((groups, costs.shape[1])), np.zeros(groups, dtype=int)
    for task in sorted(tasks, key=lambda t: -(costs[t] ** 2).sum()):
        growth = ((load + costs[task]) ** 2).sum(1) - (load**2).sum(1)
        growth[held == per_rank] = np.inf
        chosen = int(growth.argmin())
        load[chosen] += costs[task]
        held[chosen] += 1
    return load


@settings(deadline=None, max_examples=60)
@given(cost_lists, st.integers(1, 12), st.integers(1, 5), st.integers(0, 10**6))
def test_a_permutation_that_is_a_function_of_its_arguments(costs, groups, per_rank, key):
    tasks = generator(key, "tasks").integers(len(costs), size=groups * per_rank)
    orders = [balanced(tasks, np.array(costs), per_rank, generator(key, "order")) for _ in range(2)]
    np.testing.assert_array_equal(*orders)
    assert orders[0].dtype == np.int64
    np.testing.assert_array_equal(np.sort(orders[0]), np.sort(tasks))


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10**6), st.integers(1, 6), st.integers(1, 3), st.integers(1, 12), st.integers(1, 5))
def test_the_same_loads_as_device_by_device(key, tasks, phases, groups, per_rank):
    random = generator(key, "case")
    costs = random.uniform(0.5, 5.0, (tasks, phases))
    drawn = random.integers(tasks, size=groups * per_rank)
    found = loads(balanced(drawn, costs, per_rank, random), costs, per_rank)
    wanted = one_by_one(drawn.tolist(), costs, per_rank)
    assert (found**2).sum() == pytest.approx((wanted**2).sum(), rel=1e-4)
    assert sorted(found.sum(1)) == pytest.approx(sorted(wanted.sum(1)), rel=1e-4)


def test_known_placements():
    costs = np.array([[4.0], [3.0], [2.0], [1.0]])
    found = balanced(np.array([0, 1, 2, 3]), costs, 2, generator(0, "a"))
    assert sorted(loads(found, costs, 2).ravel()) == [5, 5]
    # By totals 0 with 3 and 1 with 2 would do as well as 0 with 2 and 1 with 3; phase by phase only one evens both.
    costs = np.array([[3.0, 0.0], [0.0, 3.0], [2.9, 0.0], [0.0, 2.9]])
    found = balanced(np.array([0, 1, 2, 3]), costs, 2, generator(0, "b"))
    assert loads(found, costs, 2).max(0).sum() <= 6


def test_one_device_per_rank_has_nothing_to_place():
    """Then all that can be done is to deal the tasks at random."""
    schedule = make(PHASES, 1)
    draws = np.array([schedule(step, 4) for step in range(50)])
    assert len({draw.tobytes() for draw in draws}) > 40


@pytest.mark.parametrize("per_rank", [1, 2, 4])
def test_counts_are_the_stratified_ones(per_rank):
    schedule, stratified = make(PHASES, per_rank), make(None, per_rank)
    for step in (0, 1, 77, 499_999):
        for groups in (1, 2, 14, 56):
            found, wanted = schedule(step, groups * per_rank), stratified(step, groups * per_rank)
            np.testing.assert_array_equal(np.bincount(found, minlength=8), np.bincount(wanted, minlength=8))


@pytest.mark.parametrize("per_rank", [2, 4])
def test_marginals_of_every_device_are_those_of_the_weights(per_rank):
    schedule, steps = make(PHASES, per_rank), 6000
    draws = np.array([schedule(step, 8) for step in range(steps)])
    for index, weight in enumerate(PAPER.values()):
        p = weight / sum(PAPER.values())
        hits = (draws == index).sum(0)
        assert (np.abs(hits - p * steps) <= 4 * np.sqrt(steps * p * (1 - p))).all()


def test_ranks_are_even_step_by_step():
    costs = cost_matrix(list(PAPER), PHASES)
    schedule, stratified = make(PHASES, 4), make(None, 4)
    own = longest = 0.0
    for step in range(100):
        even, chance = (loads(s(step, 56 * 4), costs, 4) for s in (schedule, stratified))
        assert even.max(0).sum() <= chance.max(0).sum()
        own, longest = own + even.mean(0).sum(), longest + even.max(0).sum()
    assert own / longest > 0.9


def test_only_ratios_of_costs_matter():
    thousand: dict[str, float | list[float]] = {name: 1000 * seconds for name, seconds in SECONDS.items()}
    for step in range(20):
        np.testing.assert_array_equal(make({**SECONDS}, 2)(step, 8), make(thousand, 2)(step, 8))


GOLDEN = [
    [1, 2, 0, 3, 4, 0, 4, 6],
    [7, 4, 0, 3, 1, 2, 6, 4],
    [4, 5, 3, 6, 1, 2, 0, 3],
    [0, 3, 3, 7, 1, 2, 4, 5],
]


def test_golden_list():
    """A change here changes what every existing run does when it resumes."""
    schedule = make(PHASES, 2, seed=2208)
    assert [schedule(step, 8).tolist() for step in (0, 1, 2, 499_999)] == GOLDEN


def test_bad_costs_are_refused():
    for costs in ({"a": 0.0}, {"a": -1.0}, {"a": []}, {"a": [1.0, -1.0]}, {"a": float("inf")}):
        with pytest.raises(UserError, match=r"schedule\.costs\.a"):
            ScheduleConfig(kind="balanced", costs=costs)
    with pytest.raises(UserError, match=r"schedule\.costs has no 'b'"):
        Schedule.from_weights({"a": 1.0, "b": 1.0}, ScheduleConfig(kind="balanced", costs={"a": 1.0}), 0)
    config = ScheduleConfig(kind="balanced", costs={"a": 1.0, "b": [1.0, 2.0]})
    with pytest.raises(UserError, match=r"schedule\.costs\.b has 2 phases"):
        Schedule.from_weights({"a": 1.0, "b": 1.0}, config, 0)


def test_costs_of_tasks_that_are_not_there_do_not_matter():
    """A recipe that inherits a balanced one may remove a task."""
    config = ScheduleConfig(kind="balanced", costs={"a": 1.0, "gone": 2.0})
    assert Schedule.from_weights({"a": 1.0}, config, 0)(0, 2).tolist() == [0, 0]
