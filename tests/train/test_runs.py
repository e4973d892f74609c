"""The list of runs, and the record that it is read from."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path

import pytest
import yaml

from gppf_ds.cli import main
from gppf_ds.train import history, record, runs


def write(folder: Path, steps: int = 10, step: int = 0, state: record.State = "running") -> Path:
    config = {"output": str(folder), "steps": steps, "optimizer": {"name": "sgd"}}
    record.write_record(folder, yaml.safe_dump(config), 0, step, 2)
    record.write_state(folder, state)
    return folder


def test_every_run_is_listed_with_state_step_and_metrics(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    done = write(tmp_path / "a run", state="finished")
    history.append(done / "metrics.jsonl", {"step": 10, "losses": {"digits": 1.0}})
    (done / "results.json").write_text(json.dumps([{"step": 10, "metrics": {"digits": {"top1": 0.5, "top5": 1.0}}}]))
    (done / "checkpoints" / "inner").mkdir(parents=True)
    inside = write(tmp_path / "grid" / "cell")
    with (inside / "metrics.jsonl").open("w") as file:
        file.write(json.dumps({"step": 4, "losses": {"digits": 2.0}}) + '\n{"step": 5, "los')
    (tmp_path / "grid" / "no run").mkdir()
    assert main(["runs", str(tmp_path)]) == 0
    first, second = capsys.readouterr().out.splitlines()[1:]
    assert first.split()[:5] == ["a", "run", "finished", "10/10", "0"]
    assert first.endswith("digits top1 0.5000")
    assert second.split()[:3] == ["grid/cell", "running", "4/10"]
    assert second.endswith("digits loss 2.0000")


def test_a_run_that_is_gone_does_not_count_as_running(tmp_path: Path) -> None:
    write(tmp_path)
    status = record.read_state(tmp_path)
    assert status["process"] == os.getpid()
    assert status["host"] == socket.gethostname()
    assert runs._state(status, 1e6) == "running"
    assert runs._state({**status, "process": 2**22 + 1}, 0) == "killed"
    assert runs._state({**status, "host": "elsewhere"}, runs.SILENT / 2) == "running"
    assert runs._state({**status, "host": "elsewhere"}, 2 * runs.SILENT) == "silent"
    assert runs._state({}, 0) == "unknown"


def test_a_folder_without_runs_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["runs", str(tmp_path)]) == 0
    assert "no runs" in capsys.readouterr().out
    assert main(["runs", str(tmp_path / "nowhere")]) == 2
    assert "there is no folder" in capsys.readouterr().err


def test_the_record_holds_what_a_later_launch_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NCCL_DEBUG", "WARN")
    monkeypatch.setenv("HF_TOKEN", "secret")
    write(tmp_path)
    assert history.read(tmp_path / record.DECISIONS) == []
    write(tmp_path, steps=20, step=6)
    resume, change = history.read(tmp_path / record.DECISIONS)
    assert (resume["kind"], resume["step"]) == ("resume", 6)
    assert (change["kind"], change["text"]) == ("setting", "steps: 10 -> 20")
    launch = history.read(tmp_path / record.LAUNCHES)[-1]
    assert launch["environment"]["NCCL_DEBUG"] == "WARN"
    assert "secret" not in json.dumps(launch)
    assert {"time", "command", "host", "versions", "git", "seed", "step", "ranks"} <= set(launch)
