"""Naming the first difference between ranks."""

from __future__ import annotations

from torch import nn

from gppf_ds.simt.agreement import describe, first_difference


def test_equal_facts_have_no_difference() -> None:
    assert first_difference([{"seed": "3"}, {"seed": "3"}, {"seed": "3"}]) is None


def test_the_first_difference_is_named_with_its_ranks() -> None:
    facts = [{"torch": "2.11", "seed": "3"}, {"torch": "2.11", "seed": "4"}]
    assert first_difference(facts) == "rank 1 has seed 4 where rank 0 has seed 3"
    many = [{"seed": "3"}, {"seed": "4"}, {"seed": "3"}, {"seed": "4"}]
    assert first_difference(many) == "ranks 1, 3 have seed 4 where rank 0 has seed 3"


def test_a_missing_fact_is_a_difference_on_either_side() -> None:
    assert first_difference([{}, {"extra": "1"}]) == "rank 1 has extra 1 where rank 0 has no extra"
    assert first_difference([{"extra": "1"}, {}]) == "rank 1 has no extra where rank 0 has extra 1"


def test_models_differ_in_names_shapes_and_types() -> None:
    wide, narrow, half = nn.Linear(3, 2), nn.Linear(2, 2), nn.Linear(3, 2).half()
    assert first_difference([describe(wide, {"a": 5}), describe(narrow, {"a": 5})]) == (
        "rank 1 has parameter weight of shape (2, 2), float32 where rank 0 has parameter weight of shape "
        "(2, 3), float32"
    )
    assert "float16" in str(first_difference([describe(wide, {}), describe(half, {})]))
    assert "rank 1 has no parameter weight" in str(first_difference([describe(wide, {}), describe(nn.Identity(), {})]))
    assert "samples of tasks.a: 6" in str(first_difference([describe(wide, {"a": 5}), describe(wide, {"a": 6})]))
