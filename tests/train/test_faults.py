"""Who of several ranks says what all of them have to say."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from distributed.ranks import environment

from gppf_ds.train.faults import first_of_launch


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))


def test_one_rank_of_a_launch_is_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_PORT", "1000")
    claims = []
    for rank in ("1", "0", "2"):
        monkeypatch.setenv("RANK", rank)
        claims.append(first_of_launch("no such folder"))
    assert claims == [True, False, False]
    assert first_of_launch("another sentence")
    monkeypatch.setenv("MASTER_PORT", "1001")
    assert first_of_launch("no such folder")


def test_without_a_launcher_everybody_is_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    assert first_of_launch("topic")
    assert first_of_launch("topic")


def test_a_folder_that_cannot_be_written_hides_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr("tempfile.tempdir", "/dev/null/nowhere")
    assert first_of_launch("topic")


FAIL = """
import sys
from pathlib import Path
from gppf_ds.train import faults
input()
faults.fail(ArithmeticError("of this rank"), Path(sys.argv[1]))
"""


def start(rank: int, folder: Path, temporary: Path) -> subprocess.Popen[str]:
    """A rank of the one launch that is about to fail."""
    variables = {"RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1000", "TMPDIR": str(temporary)}
    command = [sys.executable, "-c", FAIL, str(folder)]
    pipes: dict[str, int] = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    return subprocess.Popen(command, env=environment(**variables), text=True, **pipes)


def failed(rank: subprocess.Popen[str]) -> str:
    """What it prints when it fails."""
    said = rank.communicate("\n", timeout=60)[1]
    assert rank.returncode == 1
    return said


def test_the_second_rank_to_fail_names_the_file_with_the_cause(tmp_path: Path) -> None:
    one, other = (start(rank, tmp_path / "run", tmp_path) for rank in (1, 0))
    assert "ArithmeticError: of this rank" in failed(one)
    cause = tmp_path / "run" / "cause.txt"
    assert "rank 1 failed:" in cause.read_text()
    sentence = f"rank 0 stops because another rank failed; the cause is in {cause}\n"
    assert failed(other) == sentence


def test_no_file_is_named_where_none_could_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    one, other = (start(rank, tmp_path / "file" / "run", tmp_path) for rank in (1, 0))
    assert "ArithmeticError: of this rank" in failed(one)
    assert failed(other) == "rank 0 stops because another rank failed\n"


def test_a_launch_with_the_address_of_an_earlier_one_tells_its_own_cause(tmp_path: Path) -> None:
    for folder in ("first", "second"):
        assert "ArithmeticError: of this rank" in failed(start(0, tmp_path / folder, tmp_path))
