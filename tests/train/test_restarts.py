"""Launching again: what is tried again, what is not, and how a stop reaches the ranks."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gppf_ds.errors import UserError
from gppf_ds.train import history, record, restarts
from gppf_ds.train.restarts import supervise

LAUNCHER = """
import json, os, pathlib, sys, time
folder, *turns = pathlib.Path(sys.argv[1]), *json.loads(sys.argv[2])
with (folder / "launches").open("a") as file:
    file.write("launch\\n")
number = len((folder / "launches").read_text().splitlines()) - 1
turn = turns[min(number, len(turns) - 1)]
if "checkpoint" in turn:
    made = folder / "checkpoints" / f"step-{turn['checkpoint']:08d}"
    made.mkdir(parents=True)
    (made / "manifest.json").touch()
if "state" in turn:
    (folder / "status.json").write_text(json.dumps({"state": turn["state"]}))
if "waits" in turn:
    (folder / "waiting").touch()
    while not (folder / "stop").exists():
        time.sleep(0.02)
    (folder / "status.json").write_text(json.dumps({"state": "stopped"}))
sys.exit(turn.get("code", 0))
"""
"""Stands for a launcher and its ranks, whose start alone takes seconds; every launch takes the next turn."""


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(restarts, "PAUSE", 0.0)
    monkeypatch.delenv("RANK", raising=False)


@pytest.fixture
def launcher(tmp_path: Path) -> str:
    (tmp_path / "a launcher.py").write_text(LAUNCHER)
    return shlex.join([sys.executable, str(tmp_path / "a launcher.py"), str(tmp_path)])


def launches(folder: Path) -> int:
    return len((folder / "launches").read_text().splitlines())


def test_a_run_is_launched_until_it_is_finished(tmp_path: Path, launcher: str) -> None:
    (tmp_path / "stop").touch()  # of an earlier run
    turns = '[{"code": 1}, {"code": 247, "state": "failed", "checkpoint": 4}, {"code": 0}, {"state": "finished"}]'
    assert supervise([turns], 2, launcher, tmp_path) == 0
    assert launches(tmp_path) == 4
    decisions = history.read(tmp_path / record.DECISIONS)
    assert [line["kind"] for line in decisions] == ["restart"] * 3
    places = ["from the beginning (restart 1", "from step-00000004 (restart 1", "from step-00000004 (restart 2"]
    for line, place in zip(decisions, places, strict=True):
        assert place in line["text"]


def test_restarts_without_a_new_checkpoint_come_to_an_end(
    tmp_path: Path, launcher: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert supervise(['[{"code": 1}, {"code": 0}]'], 2, launcher, tmp_path) == 1
    assert launches(tmp_path) == 3
    assert "given up: 2 restarts" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("turn", "code"), [('{"code": 2, "state": "failed"}', 2), ('{"code": 1, "state": "stopped"}', 0)]
)
def test_what_a_new_start_would_not_mend_is_left(tmp_path: Path, launcher: str, turn: str, code: int) -> None:
    assert supervise([f"[{turn}]"], 5, launcher, tmp_path) == code
    assert launches(tmp_path) == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_reaches_the_ranks_as_a_file(tmp_path: Path, launcher: str, number: int) -> None:
    program = "import sys; from pathlib import Path; from gppf_ds.train.restarts import supervise; "
    program += "sys.exit(supervise([sys.argv[1]], 5, sys.argv[2], Path(sys.argv[3])))"
    command = [sys.executable, "-c", program, '[{"waits": true, "code": 1}]', launcher, str(tmp_path)]
    process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])})
    deadline = time.monotonic() + 60
    while not (tmp_path / "waiting").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(number)
    assert process.wait(timeout=60) == 0
    assert launches(tmp_path) == 1


def test_a_rank_does_not_supervise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(UserError, match="outside of the launcher"):
        supervise([], 1, "true", tmp_path)


def test_a_launcher_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no-such-launcher cannot be started"):
        supervise([], 1, "no-such-launcher", tmp_path)
