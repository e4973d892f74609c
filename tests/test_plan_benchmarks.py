"""The benchmarks of planning: what they simulate and count, never how fast this machine is."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import benchmark_run
import pytest
from benchmark_run import BENCHMARKS


def results(name: str, folder: Path, *arguments: str) -> Any:
    return benchmark_run.results(name, folder, *arguments)["result"]


def test_busy_share_knows_the_papers_and_passes_the_aim(tmp_path: Path) -> None:
    found = results("busy_share", tmp_path, "--ranks", "56", "--steps", "50")["56"]
    assert found["independent draws"]["busy"] == pytest.approx(0.61, abs=0.015)
    best = found["balanced, 4 per rank, batches / 4"]
    assert best["busy"] > 0.9
    assert best["step"] < 0.7


def test_scale_measures_every_piece_for_every_number_of_devices(tmp_path: Path) -> None:
    found = results("scale", tmp_path, "--devices", "8", "64", "--steps", "2")
    assert list(found) == ["8", "64"]
    for pieces in found.values():
        assert {"tasks, balanced", "usage, soft", "usage, hard", "plan, a step"} <= set(pieces)
        assert all(0 < one["min"] <= one["median"] <= one["max"] for one in pieces.values())


@pytest.mark.long
def test_plan_accuracy_compares_every_schedule(tmp_path: Path) -> None:
    small = ["--ranks", "2", "--rounds", "1", "--steps", "1", "--repeats", "1", "--limit", "250"]
    found = results("plan_accuracy", tmp_path, *small)["schedules"]
    assert len(found) == 3
    for one in found.values():
        assert one["ratio"]["median"] == pytest.approx(one["said"]["median"] / one["real"]["median"])
        assert 0 < one["busy"]["median"] <= 1


def test_startup_waits_for_a_line_and_tells_when_it_does_not_come(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    startup = importlib.import_module("startup")
    script = "import sys, time; print('first'); print('second'); sys.stdout.flush(); time.sleep(600)"
    wall, cpu = startup.wait_for(["-c", script], "second", 60.0)
    assert 0 < wall < 60
    assert cpu > 0
    with pytest.raises(SystemExit, match="did not print 'third'"):
        startup.wait_for(["-c", "print('first')"], "third", 60.0)
