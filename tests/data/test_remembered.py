"""Answers about big files are asked for once, until a file changes."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from gppf_ds.data import remembered as module
from gppf_ds.data.remembered import remembered


class Asked:
    """Counts how often it is asked."""

    def __init__(self) -> None:
        self.times = 0

    def __call__(self) -> list[str]:
        self.times += 1
        return ["cat", "dog"]


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An old file that counts as big, and an empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(module, "WORTH_KEEPING", 4)
    path = tmp_path / "a.json"
    path.write_text("12345")
    os.utime(path, (1e9, 1e9))
    return path


def test_the_same_files_are_asked_once(file: Path) -> None:
    asked = Asked()
    assert [remembered("names", [file], asked) for _ in range(3)] == [["cat", "dog"]] * 3
    assert asked.times == 1
    remembered("other", [file], asked)
    assert asked.times == 2


def test_a_file_that_changes_is_asked_again(file: Path) -> None:
    asked = Asked()
    remembered("names", [file], asked)
    file.write_text("54321")
    os.utime(file, (1e9, 1e9 + 1))
    remembered("names", [file], asked)
    assert asked.times == 2


def test_a_file_that_was_written_only_now_is_not_trusted(file: Path) -> None:
    asked = Asked()
    os.utime(file)
    for _ in range(2):
        remembered("names", [file], asked)
    assert asked.times == 2


def test_small_files_and_caches_that_cannot_be_written_cost_time_only(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = Asked()
    (tmp_path / "blocked").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "blocked"))
    for _ in range(2):
        assert remembered("names", [file], asked) == ["cat", "dog"]
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    file.write_text("1")
    for _ in range(2):
        remembered("names", [file], asked)
    assert asked.times == 4


def test_a_failure_is_not_remembered(file: Path) -> None:
    def fails() -> list[str]:
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        remembered("names", [file], fails)
    asked = Asked()
    remembered("names", [file], asked)
    assert asked.times == 1


def test_a_damaged_answer_is_asked_again(file: Path, tmp_path: Path) -> None:
    asked = Asked()
    remembered("names", [file], asked)
    [answer] = (tmp_path / "cache").rglob("*.json")
    answer.write_text('["ca')
    assert remembered("names", [file], asked) == ["cat", "dog"]
    assert asked.times == 2
