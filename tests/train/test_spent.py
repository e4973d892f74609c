"""Where the time of a run goes."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from gppf_ds.train import history
from gppf_ds.train.spent import FILE, Spent


def test_each_line_has_what_came_since_the_one_before(tmp_path: Path) -> None:
    spent = Spent(tmp_path, main=True, start=7)
    with spent.on("evaluation"):
        time.sleep(0.02)
    spent.step(2.0, data=0.5, images=12)
    spent.step(1.0, data=0.25, images=12)
    spent.write()
    spent.write()  # nothing since: no line
    spent.step(4.0, data=0.0, images=6)
    spent.write()
    first, second = history.read(tmp_path / FILE)
    assert first["seconds"].pop("evaluation") == pytest.approx(0.02, abs=0.5)
    assert first == {"step": 9, "images": 24, "seconds": {"step": 2.25, "data": 0.75}}
    assert second == {"step": 10, "images": 6, "seconds": {"step": 4.0, "data": 0.0}}


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    spent = Spent(tmp_path, main=False, start=0)
    spent.step(1.0, 0.0, 1)
    spent.write()
    assert not (tmp_path / FILE).exists()
