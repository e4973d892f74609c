"""``gppf-ds verify`` on two ranks: the table, its verdict and the exit code; faults that it must find."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from conftest import write_recipe

from distributed.ranks import end_ranks, environment

RULES = ["losses", "gradients", "parameter updates", "controller updates", "running", "idle", "ranks hold"]

ANOTHER_LOSS = """
class Planted(Classification):
    '''Whose loss is a thousandth too large on rank 1.'''
    def build_head(self, features):
        head = super().build_head(features)
        honest = head.loss
        factor = 1.001 if os.environ["RANK"] == "1" else 1.0
        head.loss = lambda maps, targets: {k: factor * v for k, v in honest(maps, targets).items()}
        return head
"""

WORLD_AVERAGE = """
from gppf_ds.simt import engine

def world_counts(owners, tasks, valid, chosen):
    counts = honest(owners, tasks, valid, chosen)
    return {owner: len(valid) if count else 0 for owner, count in counts.items()}

honest, engine.usage_counts = engine.usage_counts, world_counts

class Planted(Classification):
    '''Comes with a fault in the task average: gradients are divided by the number of all devices.'''
"""

IDLE_DECAY = """
import torch
from gppf_ds.simt import engine

honest = engine.SimtEngine.step

def step(self, step, tasks, groups):
    report = honest(self, step, tasks, groups)
    with torch.no_grad():
        for name, parameter in self.model.named_parameters():
            if report.counts[self.owners[name]] == 0:
                parameter.mul_(1 - 1e-7)
    return report

engine.SimtEngine.step = step

class Planted(Classification):
    '''Comes with a fault in what nobody uses: it decays, by one part in ten million.'''
"""


def verify(recipe: dict[str, Any], folder: Path, plant: str | None = None) -> tuple[list[int], dict[str, str]]:
    """Exit codes, and the table's rows by the beginning of their rule."""
    path = environment()["PYTHONPATH"]
    if plant is not None:
        source = f"import os\nfrom gppf_ds.tasks.classification import Classification\n{plant}"
        (folder / "planted.py").write_text(source)
        recipe["tasks"]["digits"]["class_path"] = "planted.Planted"
        path = f"{folder}{os.pathsep}{path}"
    command = ["-m", "gppf_ds", "verify", "--config", str(write_recipe(recipe, folder)), "--verify_steps", "2"]
    codes, outputs = end_ranks([command, command], timeout=120, PYTHONPATH=path)
    rows = {rule: line for rule in RULES for line in outputs[0].splitlines() if line.startswith(rule)}
    assert list(rows) == RULES, "\n".join(outputs)
    assert not (folder / "run").exists()
    return codes, rows


@pytest.mark.parametrize(
    ("stage", "precision"), [(0, "fp32"), (3, "fp32"), (2, "fp16"), pytest.param(1, "bf16", marks=pytest.mark.long)]
)
def test_an_honest_run_passes(light_recipe: dict[str, Any], tmp_path: Path, stage: int, precision: str) -> None:
    light_recipe["engine"].update(zero_stage=stage, accumulation=2, audit=True, precision=precision)
    if stage == 3:
        light_recipe["optimizer"] = {"name": "adamw", "learning_rate": 0.001}
        light_recipe["backbone"]["routing"] = "hard"
        light_recipe["seed"] = 1  # with 0 an activation of this tiny network lies on the kink of a ReLU, at every stage
    codes, rows = verify(light_recipe, tmp_path)
    assert codes == [0, 0], rows
    assert all(row.endswith("| ok") and f"| {stage}, {precision}" in row for row in rows.values()), rows
    print("\n".join(rows.values()))


@pytest.mark.parametrize(
    ("plant", "broken", "whole"),
    [
        (ANOTHER_LOSS, ["losses", "gradients"], ["idle", "ranks hold"]),
        (WORLD_AVERAGE, ["gradients", "parameter updates"], ["losses", "idle", "ranks hold"]),
        (IDLE_DECAY, ["idle"], ["losses", "gradients", "ranks hold"]),
    ],
    ids=["another loss on one rank", "world average", "idle decay"],
)
def test_a_fault_is_found(
    light_recipe: dict[str, Any], tmp_path: Path, plant: str, broken: list[str], whole: list[str]
) -> None:
    light_recipe["schedule"] = {"kind": "static", "static": ["distance", "digits"]}
    if plant == IDLE_DECAY:
        light_recipe["backbone"]["routing"] = "hard"
    codes, rows = verify(light_recipe, tmp_path, plant)
    assert codes == [1, 1], rows
    assert all("MISMATCH" in rows[rule] for rule in broken), rows
    assert all("MISMATCH" not in rows[rule] for rule in whole), rows
