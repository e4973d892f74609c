"""Values of a run in the trackers of DeepSpeed's monitor: csv files always, TensorBoard where it is installed."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from conftest import write_recipe
from distributed.ranks import environment


def run(recipe: dict[str, Any], folder: Path, settings: dict[str, Any]) -> None:
    (folder / "ds.json").write_text(json.dumps(settings))
    recipe["engine"]["deepspeed"] = str(folder / "ds.json")
    recipe |= {"steps": 4, "log_every": 2}
    command = [sys.executable, "-m", "gppf_ds", "train", "--config", str(write_recipe(recipe, folder))]
    done = subprocess.run(command, env=environment(), cwd=folder, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr


def test_values_reach_csv_files_and_deepspeed_adds_none(light_recipe: dict[str, Any], tmp_path: Path) -> None:
    recipe = light_recipe | {"schedule": {"kind": "static", "static": ["digits"]}}
    run(recipe, tmp_path, {"csv_monitor": {"enabled": True}})
    rows = {
        file.stem: [(int(step), float(value)) for step, value in list(csv.reader(file.open()))[1:]]
        for file in (tmp_path / "run/csv_monitor").glob("*.csv")
    }
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert rows["task_digits_loss"] == [(line["step"], line["losses"]["digits"]) for line in lines]
    assert rows["time_compute"] == [(line["step"], line["split"]["compute"]) for line in lines]
    assert [step for step, _ in rows["task_digits_top1"]] == [0, 4]
    assert [step for step, _ in rows["temperature"]] == [2, 4]
    assert not [name for name in rows if name.startswith("Train")]


@pytest.mark.skipif(find_spec("tensorboard") is None, reason="tensorboard is not installed")
def test_values_reach_tensorboard(light_recipe: dict[str, Any], tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run(light_recipe, tmp_path, {"tensorboard": {"enabled": True, "output_path": str(tmp_path), "job_name": "board"}})
    events = EventAccumulator(str(tmp_path / "board"))
    events.Reload()
    tags = set(events.Tags()["scalars"])
    assert {"temperature", "learning_rate", "time/step", "time/straggler_wait"} <= tags
    assert any(tag.endswith("/loss") for tag in tags)
    assert [event.step for event in events.Scalars("temperature")] == [2, 4]


@pytest.mark.skipif(find_spec("wandb") is None, reason="wandb is not installed")
def test_values_reach_wandb(light_recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    run(light_recipe, tmp_path, {"wandb": {"enabled": True, "project": "gppf"}})
    [file] = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    written = file.read_bytes()
    for name in ("temperature", "learning_rate", "time/step", "time/straggler_wait", "task/digits/top1"):
        assert name.encode() in written
    assert b"Train/Samples" not in written
