"""Ranks that were not started alike end with one sentence, soon, and all of them."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path
from typing import Any

from conftest import write_recipe

from distributed.ranks import end_ranks, environment
from distributed.test_run import launcher

TASK = """
import os
from torch import nn
from gppf_ds.tasks.classification import Classification

class ExtraParameter(Classification):
    def build_head(self, features):
        head = super().build_head(features)
        if os.environ["RANK"] == "1":
            head.extra = nn.Linear(3, 2)
        return head

class NoDataOnRank1(Classification):
    def check(self):
        if os.environ["RANK"] == "1":
            self.data = self.data / "nowhere"
        super().check()
"""


def path_with(folder: Path) -> str:
    (folder / "planted.py").write_text(TASK)
    return f"{folder}{os.pathsep}{environment()['PYTHONPATH']}"


def errors(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("error: ")]


def test_another_seed_on_one_rank(light_recipe: dict[str, Any], tmp_path: Path) -> None:
    command = ["-m", "gppf_ds", "train", "--config", str(write_recipe(light_recipe, tmp_path))]
    codes, outputs = end_ranks([command, [*command, "--seed", "4"]], timeout=90)
    assert codes == [2, 2], outputs
    (sentence,) = errors("\n".join(outputs))
    assert "rank 1 has seed 4 where rank 0 has seed 0" in sentence
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_an_extra_parameter_on_one_rank(light_recipe: dict[str, Any], tmp_path: Path) -> None:
    light_recipe["tasks"]["digits"]["class_path"] = "planted.ExtraParameter"
    command = ["-m", "gppf_ds", "train", "--config", str(write_recipe(light_recipe, tmp_path))]
    codes, outputs = end_ranks([command, command], timeout=90, PYTHONPATH=path_with(tmp_path))
    assert codes == [2, 2], outputs
    (sentence,) = errors("\n".join(outputs))
    assert "parameter heads.bank.digits.extra.weight" in sentence


def test_a_data_set_missing_on_one_rank(light_recipe: dict[str, Any], tmp_path: Path) -> None:
    """Rank 1 never joins the process group; the launcher ends rank 0, which waits there."""
    light_recipe["tasks"]["digits"]["class_path"] = "planted.NoDataOnRank1"
    started = time.monotonic()
    done = subprocess.run(
        launcher(write_recipe(light_recipe, tmp_path)),
        env=environment(PYTHONPATH=path_with(tmp_path)),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=90,
        check=False,
    )
    assert done.returncode == 2, done.stdout
    assert time.monotonic() - started < 60  # engine.timeout of the recipe
    (sentence,) = errors(done.stdout)
    assert "nowhere" in sentence
