"""The benchmarks of the usual ways and of batch norm: what their arms compute and send, never how fast they are."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import benchmark_run
import pytest
from benchmark_run import BENCHMARKS

SAME_UPDATE = """
import arms, harness, torch
import torch.distributed as dist
from dataclasses import replace
from exactness_rank import CONFIG, update, compare
from gppf_ds.config import BackboneConfig, EngineConfig, ScheduleConfig
from gppf_ds.simt.job import start_distributed
from step_overhead_rank import Settings, batches, heads

device = start_distributed(60.0)
options = {"layers": [1, 1, 1, 1], "channels": [8, 8, 16, 16]}
# Neither noise nor batch statistics depend on which device runs what.
backbone = BackboneConfig(options=options, units=1, norm_sync="none")
config = replace(CONFIG, backbone=backbone, optimizer=replace(CONFIG.optimizer, learning_rate=0.1))
data = batches(Settings(2, 1, 0, 2, 64, options), device)
accumulating = replace(
    config, engine=EngineConfig(precision="fp32", devices_per_rank=2), schedule=ScheduleConfig(kind="accumulate")
)
before = arms.Simt(config, heads, device).parameters()

every, ours = arms.EveryTaskDdp(config, heads, device), arms.Simt(accumulating, heads, device)
every.step_tasks(0, data)
ours.step_devices(0, [*data] * 2, [*data.values()])

one, single = arms.OneTaskDdp(config, heads, device), arms.Simt(config, heads, device)
for number, task in enumerate(data):
    for arm in (one, single):
        arm.step(number, [task] * 2, data[task])

found = {}
for name, theirs, own in (("every task", every, ours), ("one task", one, single)):
    got, wanted = theirs.parameters(), own.parameters()
    for prefix in ("backbone.", "heads.bank.classification.", "heads.bank.depth."):
        found[name + ", " + prefix] = compare(update(before, got, prefix), update(before, wanted, prefix))
harness.hand_over(found)
dist.barrier()
dist.destroy_process_group()
"""


def results(name: str, folder: Path, *arguments: str) -> dict[str, Any]:
    small = ["--ranks", "2", "--warmup", "0", "--batch-size", "2", "--image-size", "64"]
    found = benchmark_run.results(name, folder, *small, *arguments)
    return {**found["result"], "table": found["printed"]}


def test_ddp_with_every_task_or_one_computes_what_ours_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setenv("PYTHONPATH", str(BENCHMARKS))
    script = tmp_path / "rank.py"
    script.write_text(SAME_UPDATE)
    outcome = importlib.import_module("harness").run_ranks(script, "", 2, limit=120.0)
    assert outcome.verdict == "ends", outcome.reason
    assert len(outcome.result) == 6
    for one in outcome.result.values():
        assert one["ratio"] == pytest.approx(1, abs=1e-4)
        assert one["error"] < 1e-4


def test_usual_ways_judges_only_arms_that_compute_the_same_update(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    usual_ways = importlib.import_module("usual_ways")
    arms = {name: {"seconds": [1.0, 2.0, 3.0], "memory": 2**20} for name in usual_ways.STEPS}
    arms["ours"]["seconds"] = [0.5, 4.0, 1.0]
    result = usual_ways.summary({"arms": arms, "memory": "counted"}, 16)
    assert result["arms"]["ours"]["images/s"] == 16
    assert result["ratios"]["DDP, dummy loss"]["ours"] == {"median": 2.0, "min": 0.5, "max": 3.0}
    lines = usual_ways.report(result).splitlines()
    verdicts = [line for line in lines if "(0.500 - 3.000)" in line]
    assert [line.split(" | ")[-1].strip() for line in verdicts[:2]] == ["met", "met"]
    assert "| no " in verdicts[2]
    assert "met" not in verdicts[2]
    assert sum("not met" in line for line in lines) == 3  # equally fast is not faster


@pytest.mark.long
def test_usual_ways_compares_every_arm_with_ours(tmp_path: Path) -> None:
    found = results("usual_ways", tmp_path, "--rounds", "1")
    assert len(found["arms"]) == 7
    for name, arm in found["arms"].items():
        assert arm["images/s"] == pytest.approx(8 / arm["seconds"]["median"])
        assert arm["memory"] > 2**20
        assert name in found["table"]
    assert sum(len(ratios) for ratios in found["ratios"].values()) == 7
    for theirs, ratios in found["ratios"].items():
        for ours, ratio in ratios.items():
            seconds = [found["arms"][name]["seconds"]["median"] for name in (theirs, ours)]
            assert ratio["median"] == pytest.approx(seconds[0] / seconds[1])


def test_cross_task_batch_norm_talks_once_per_position_and_direction(tmp_path: Path) -> None:
    found = results("cross_task_bn", tmp_path, "--steps", "1", "--units", "2")
    for devices in ("1", "2"):
        sent = {name: arm["collectives"] for name, arm in found[devices].items()}
        assert sent["ours"] == {"forward": 1.0, "backward": 1.0}
        assert sent["none (torch.nn.BatchNorm2d)"] == {"forward": 0.0, "backward": 0.0}
        assert all(arm["seconds"]["min"] > 0 for arm in found[devices].values())
    assert "has no CPU version: left out" in found["table"]
