"""The benchmarks run, hand over what their README says, and see the difference that they are there to show."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import benchmark_run
import pytest
from benchmark_run import BENCHMARKS
from conftest import write_recipe


def results(name: str, folder: Path, *arguments: str) -> dict[str, Any]:
    """The result of a benchmark of 2 ranks."""
    found = benchmark_run.results(name, folder, "--ranks", "2", *arguments)
    assert found["backend"] == "gloo"
    assert found["settings"]["ranks"] == 2
    assert set(found["versions"]) == {"torch", "deepspeed", "timm"}
    return found["result"]


def results_of_one_process(name: str, folder: Path, *arguments: str) -> dict[str, Any]:
    """The result of a benchmark that has no ranks."""
    return benchmark_run.results(name, folder, *arguments)["result"]


def test_exactness_tells_the_task_average_from_the_world_average(tmp_path: Path) -> None:
    ours, ddp = "ours, ZeRO-2", "DDP, find_unused_parameters=True"
    found = results("exactness", tmp_path, "--drift-steps", "2", "--arms", ours, ddp)
    assert list(found) == [ours, ddp]
    for group in ("trunk", "A", "B"):
        assert found[ours][group]["ratio"] == pytest.approx(1, abs=1e-5)
        assert found[ours][group]["error"] < 1e-5
    for key in ("idle", "drift_a", "drift_c"):
        assert found[ours][key] == 0
    assert found[ddp]["trunk"]["ratio"] == pytest.approx(1, abs=1e-5)
    for group in ("A", "B"):  # one user among two ranks
        assert found[ddp][group]["ratio"] == pytest.approx(0.5, abs=1e-5)


def test_step_overhead_measures_both_arms_of_every_comparison(tmp_path: Path) -> None:
    small = ["--warmup", "0", "--batch-size", "2", "--image-size", "64"]
    found = results("step_overhead", tmp_path, "--steps", "1", *small)
    assert list(found["comparisons"]) == [
        "mixed tasks, DDP",
        "mixed tasks, clipped, DDP",
        "one task, DeepSpeed ZeRO-0",
        "one task, DeepSpeed ZeRO-1",
    ]
    for comparison in found["comparisons"].values():
        ours, theirs = comparison["ours"], comparison["theirs"]
        assert comparison["ratio"]["median"] == pytest.approx(ours["seconds"]["median"] / theirs["seconds"]["median"])
        for arm in (ours, theirs):
            assert 0 < arm["seconds"]["min"] <= arm["seconds"]["median"] <= arm["seconds"]["max"]
            assert arm["memory"] > 2**20


def test_backbones_measures_every_comparison_and_checkpointing(tmp_path: Path) -> None:
    small = ["--steps", "1", "--warmup", "0", "--batch-size", "1", "--image-size", "64", "--models", "resnet50"]
    found = results_of_one_process("backbones", tmp_path, *small)["resnet50"]
    assert len(found["ratios"]) == 6
    assert all(ratio["min"] > 0 for ratio in found["ratios"].values())
    assert 0 < found["memory"]["checkpoint"] < 0.5 * found["memory"]["plain"]


def test_levers_measures_each_against_the_step_without_it(tmp_path: Path) -> None:
    small = ["--steps", "1", "--warmup", "0", "--batch-size", "1", "--image-size", "64", "--models", "resnet50"]
    found = results_of_one_process("levers", tmp_path, *small)["resnet50"]
    assert found["ratios"].keys() == {"channels last", "bf16", "bf16, channels last", "fused"}  # parts at batch norms
    assert all(ratio["min"] > 0 for ratio in found["ratios"].values())


def test_moe_layer_measures_every_comparison_of_layers_that_compute_the_same(tmp_path: Path) -> None:
    small = ["--steps", "1", "--warmup", "0", "--batch-size", "1", "--tokens", "20", "--width", "48", "--threads", "1"]
    found = results_of_one_process("moe_layer", tmp_path, *small)
    assert len(found["milliseconds"]) == 6
    assert len(found["ratios"]) == 4
    assert all(ratio["min"] > 0 for ratio in found["ratios"].values())
    assert found["difference"] < 1e-6


def test_data_start_measures_every_start(tmp_path: Path) -> None:
    found = results("data_start", tmp_path, "--images", "2000", "--boxes", "5", "--repeats", "1")
    assert list(found["arms"]) == ["mmdet alone", "first start", "second start"]
    seconds = {arm: runs["seconds"]["median"] for arm, runs in found["arms"].items()}
    assert 0 < seconds["second start"] < 0.5 * seconds["mmdet alone"]
    assert 0 < found["bytes"]["kept"] < found["bytes"]["json"]


def test_data_wait_measures_every_number_of_workers(tmp_path: Path, light_recipe: dict[str, Any]) -> None:
    recipe = write_recipe(light_recipe, tmp_path)
    options = ["--config", str(recipe), "--workers", "0", "1", "--steps", "3", "--warmup", "1"]
    found = results("data_wait", tmp_path, *options)
    assert list(found) == ["0", "1"]
    for one in found.values():
        assert 0 < one["wait"]["min"] <= one["wait"]["median"] < one["step"]["median"]
        assert 0 < one["share"] < 1


def test_metrics_cost_measures_the_same_steps_twice(tmp_path: Path, light_recipe: dict[str, Any]) -> None:
    recipe = write_recipe(light_recipe, tmp_path)
    found = results("metrics_cost", tmp_path, "--config", str(recipe), "--steps", "3", "--warmup", "1")
    assert 0 < found["bare"]["min"] <= found["watched"]["max"]
    assert found["difference"]["min"] <= found["difference"]["median"] <= found["difference"]["max"]
    assert 0 < found["told"]["mean"] < 0.5 * found["bare"]["max"]
    assert found["scrape"]["bytes"] > 2**10


def test_async_save_tells_what_saving_costs(tmp_path: Path) -> None:
    found = results("async_save", tmp_path, "--mib", "4", "--repeats", "2", "--batch-size", "1")
    assert found["share of writing that copying took"]["median"] > 0
    assert found["writing alone"]["min"] <= found["writing alone"]["median"] <= found["writing alone"]["max"]
    assert found["a step"]["median"] > 0
    assert found["a step beside a checkpoint"]["min"] > 0
    assert found["copying to host memory"]["min"] > 0


@pytest.mark.parametrize(
    ("script", "verdict", "reason"),
    [
        (
            "import os, time\nif os.environ['RANK'] == '1':\n    raise OSError('no room')\ntime.sleep(600)",
            "aborts",
            "no room",
        ),
        ("import time\ntime.sleep(600)", "hangs", ""),
        ("import harness\nharness.hand_over([1.5])", "ends", ""),
    ],
    ids=["aborts", "hangs", "ends"],
)
def test_how_a_group_of_ranks_ended_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, verdict: str, reason: str
) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    harness = importlib.import_module("harness")
    monkeypatch.setenv("PYTHONPATH", str(BENCHMARKS))
    path = tmp_path / "rank.py"
    path.write_text(script)
    outcome = harness.run_ranks(path, "", 2, limit=2.0 if verdict == "hangs" else 60.0)
    assert outcome.verdict == verdict
    assert reason in outcome.reason
    assert outcome.result == ([1.5] if verdict == "ends" else None)
