"""Who of several ranks says what all of them have to say."""

from __future__ import annotations

from pathlib import Path

import pytest

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
