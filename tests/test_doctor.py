"""gppf-ds doctor: the table, the exit code, and that a failing probe is a row."""

import os
import re
import socket
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from gppf_ds import doctor
from gppf_ds.doctor import Row, machine

ROOT = Path(__file__).parents[1]


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the import of DeepSpeed, which takes seconds and is not what the test is about."""
    monkeypatch.setattr(machine, "_deepspeed_import", lambda: iter(()))


def rows_by_name() -> dict[str, Row]:
    return {row.name: row for row in machine.report()}


def plant_versions(monkeypatch: pytest.MonkeyPatch, planted: dict[str, str | None]) -> None:
    """Let the distributions in ``planted`` appear with another version, or (None) as not installed."""
    real = metadata.version

    def version(name: str) -> str:
        if name not in planted:
            return real(name)
        found = planted[name]
        if found is None:
            raise metadata.PackageNotFoundError(name)
        return found

    monkeypatch.setattr(metadata, "version", version)


def test_this_environment_can_train(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.main([]) == 0
    printed = capsys.readouterr().out
    for name in ("Python", "deepspeed", "onedl-mmdetection", "mmcv operators", "accelerator", "collectives"):
        assert name in printed
    assert "keeps training from running" not in printed


def test_ranges_are_those_of_the_package() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    ranges = {r.name: r.specifier for r in map(Requirement, project["dependencies"])}
    assert machine.SpecifierSet(project["requires-python"]) == machine.SpecifierSet(machine.PYTHON)
    assert {name: machine.SpecifierSet(text) for name, text in machine.SUPPORTED.items()} == {
        name: ranges[name] for name in machine.SUPPORTED
    }


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    ("planted", "name", "words"),
    [
        ({"deepspeed": "0.16.4"}, "deepspeed", "Supported are versions >=0.19.8,<0.20"),
        ({"timm": None}, "timm", "pip install 'timm>=1.0.20'"),
        ({"mmdet": "3.3.0"}, "onedl-mmdetection", "shares a folder with mmdet 3.3.0"),
    ],
)
def test_a_wrong_package_is_a_problem(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    planted: dict[str, str | None],
    name: str,
    words: str,
) -> None:
    plant_versions(monkeypatch, planted)
    assert doctor.main([]) == 1
    sentences = capsys.readouterr().out.split("keeps training from running")[1]
    assert f"{name}: " in sentences
    assert words in sentences


@pytest.mark.usefixtures("quick")
def test_limits_are_notes_and_do_not_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    plant_versions(monkeypatch, {"deepspeed": "0.19.9", "onedl-mmcv": None, "mmcv": "2.1.0"})
    rows = rows_by_name()
    assert rows["deepspeed"].state == "note"
    assert "0.19.8" in rows["deepspeed"].why
    assert rows["onedl-mmcv"].state == "note"
    assert rows["onedl-mmcv"].value == "mmcv 2.1.0"


@pytest.mark.usefixtures("quick")
def test_wrong_python_and_broken_compiled_parts_are_problems(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "version_info", (3, 13, 1))
    monkeypatch.setitem(sys.modules, "torchvision.ops", None)  # makes the import raise, as a mismatch does
    monkeypatch.setitem(sys.modules, "cv2", None)
    rows = rows_by_name()
    assert rows["Python"].state == "problem"
    assert rows["torchvision operators"].state == "problem"
    assert "headless" in rows["OpenCV"].why


@pytest.mark.usefixtures("quick")
def test_torch_without_distributed_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.distributed.is_available", lambda: False)
    assert rows_by_name()["collectives"].state == "problem"


@pytest.mark.usefixtures("quick")
def test_cpu_on_request_says_what_it_is_good_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    rows = rows_by_name()
    assert rows["collectives"].value == "gloo"
    assert "small networks" in rows["accelerator"].why


def test_deepspeed_that_cannot_be_imported_is_a_problem(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "deepspeed.py").write_text("raise ImportError('built for another torch')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    row = rows_by_name()["deepspeed import"]
    assert row.state == "problem"
    assert row.why.endswith("ImportError: built for another torch")


@pytest.mark.usefixtures("quick")
def test_a_probe_that_fails_becomes_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise OSError("no such thing\nand more")

    monkeypatch.setattr("os.sched_getaffinity", broken)
    row = rows_by_name()["machine"]
    assert row.state == "note"
    assert row.why == "The probe failed: OSError: no such thing"


def test_a_clock_that_is_off_is_a_note(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What stands for ssh starts the program here, with a clock of its own."""
    (tmp_path / "sitecustomize.py").write_text("import time\nreal = time.time\ntime.time = lambda: real() + 5.0\n")
    ssh = tmp_path / "ssh"
    ssh.write_text(f'#!/bin/sh\nfor command; do :; done\nPYTHONPATH={tmp_path} exec sh -c "$command"\n')
    ssh.chmod(0o755)
    (tmp_path / "hosts").write_text("node-1 slots=1\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    with socket.socket() as taken:  # so that no all-reduce is tried
        taken.bind(("", 0))
        taken.listen()
        monkeypatch.setenv("MASTER_PORT", str(taken.getsockname()[1]))
        assert doctor.main(["--hostfile", "hosts"]) == 1
    printed = capsys.readouterr().out
    assert re.search(r"node-1: clock: Its clock is \+[45]\.\d s off ours", printed), printed
    assert "node-1: ports: In use" in printed
