"""SIMT steps on real ranks against the single-process reference: relative error of every parameter and buffer."""

from __future__ import annotations

import itertools
import json

import pytest

from distributed.ranks import run_ranks

TOLERANCE = 1e-6
"""Of the relative error (norm of the difference over norm) after 5 steps in fp32."""


def worst_error(world_size: int, **case: object) -> float:
    outputs = run_ranks("distributed.simt_case", world_size, json.dumps(case))
    lines = [line.removeprefix("RESULT ") for line in outputs[0].splitlines() if line.startswith("RESULT ")]
    result = json.loads(lines[-1])
    assert result["sometimes_idle"] > 0, "the case must contain parameters that nobody uses in some step"
    print(case, result)
    return float(result["error"])


@pytest.mark.parametrize(
    ("world_size", "case"),
    [
        (2, {"stage": 0}),
        (2, {"stage": 1, "routing": "hard", "clip": 0.5, "optimizer": "adamw", "learning_rate": 0.001}),
        (2, {"stage": 2, "devices": 2, "checkpoint": True}),
        (2, {"stage": 3, "routing": "hard", "clip": 0.5, "accumulation": 2}),
        (3, {"stage": 1, "offload": True, "routing": "hard", "clip": 0.5}),
        (1, {"stage": 0, "devices": 4, "routing": "hard", "checkpoint": True}),
    ],
    ids=str,
)
def test_a_run_equals_the_reference(world_size: int, case: dict[str, object]) -> None:
    assert worst_error(world_size, **case) < TOLERANCE


@pytest.mark.long
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("routing", ["soft", "hard"])
@pytest.mark.parametrize(
    ("accumulation", "devices", "optimizer", "clip"),
    list(itertools.product([1, 2], [1, 2], ["sgd", "adamw"], [0.0, 0.5])),
)
def test_the_whole_matrix(
    stage: int, routing: str, accumulation: int, devices: int, optimizer: str, clip: float
) -> None:
    case = {"stage": stage, "routing": routing, "accumulation": accumulation, "devices": devices, "clip": clip}
    rate = 0.02 if optimizer == "sgd" else 0.001
    assert worst_error(2, **case, optimizer=optimizer, learning_rate=rate) < TOLERANCE
