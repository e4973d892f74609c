"""What a step's time is spent on: the rank that comes late computes, the other one waits for it."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from distributed.ranks import run_ranks

from gppf_ds.monitor import split
from gppf_ds.monitor.metrics import Metrics

LATE = 0.2  # of split_case.py


def test_the_punctual_rank_waits_for_the_late_one() -> None:
    outputs = run_ranks("monitor.split_case", 2)
    results = [next(line for line in text.splitlines() if line.startswith("RESULT ")) for text in outputs]
    (punctual, waited), (late, _) = (json.loads(line.removeprefix("RESULT ")) for line in results)
    # Rank 1 is late to the blocking call of both steps, to the second one also for what kept it in the first.
    assert punctual["straggler_wait"] == pytest.approx(1.5 * LATE, abs=0.1)
    assert late["straggler_wait"] < 0.05
    assert late["compute"] == pytest.approx(2 * LATE, abs=0.1)
    assert punctual["communication"] == pytest.approx(late["communication"], abs=1e-4)
    assert waited == pytest.approx(2 * punctual["straggler_wait"], abs=1e-3)


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("alone")
def test_the_parts_sum_to_the_step_and_nothing_is_held_for_long() -> None:
    metrics = Metrics({})
    timed = split.TimeSplit(metrics, torch.device("cpu"))
    for _ in range(split.MAX_UNSETTLED + 1):
        with timed.clock.step():
            time.sleep(1e-4)
        timed.step(["digits"], 0.5, 0.1)
    assert len(timed._steps) == 1
    assert timed.settle() == {"compute": 0.4, "data_wait": 0.1, "straggler_wait": 0.0, "communication": 0.0}
    value = metrics.registry.get_sample_value
    steps = split.MAX_UNSETTLED + 1
    assert value("gppf_ds_step_time_seconds_total", {"part": "compute"}) == pytest.approx(0.4 * steps)
    assert value("gppf_ds_task_compute_duration_seconds_count", {"task": "digits"}) == steps
