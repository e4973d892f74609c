"""The sparse phase: controllers frozen, units on no path dropped, the same training otherwise."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from conftest import write_recipe
from safetensors.torch import load_file
from torch import Tensor

from distributed.ranks import run_ranks


def tensors(checkpoint: Path) -> dict[str, Tensor]:
    return {key: t for file in checkpoint.glob("*.safetensors") for key, t in load_file(file).items()}


def train(recipe: Path, output: Path, mode: str = "drop", ranks: int = 2) -> str:
    return run_ranks("distributed.sparse_case", ranks, str(recipe), str(output), mode, timeout=240)[0]


@pytest.fixture
def sparse_recipe(light_recipe: dict[str, Any]) -> dict[str, Any]:
    light_recipe["backbone"]["units"] = 3
    light_recipe["controller"] = {"sparse": True, "decay_share": 0.4, "learning_rate": 0.5}
    light_recipe["checkpoint"] = {"every": 6, "keep": 9}
    return light_recipe


@pytest.mark.parametrize("stage", [0, pytest.param(2, marks=pytest.mark.long), 3])
def test_dropping_units_changes_nothing_else_and_a_resumed_run_stays_sparse(
    sparse_recipe: dict[str, Any], tmp_path: Path, stage: int
) -> None:
    sparse_recipe["engine"]["zero_stage"] = stage
    recipe = write_recipe(sparse_recipe, tmp_path)
    said = train(recipe, tmp_path / "drop")
    train(recipe, tmp_path / "keep", "keep")
    assert "sparse phase from step 4: the controllers are frozen" in said

    folder = tmp_path / "drop" / "checkpoints"
    state = json.loads((folder / "step-00000008" / "state.json").read_text())
    assert len(state["kept"]) == 5
    assert all(1 <= len(units) <= 2 for units in state["kept"])
    sparse, dense = tensors(folder / "step-00000008"), tensors(tmp_path / "keep" / "checkpoints" / "step-00000008")
    if stage == 0:  # elsewhere ranks own other slices when there are fewer parameters
        assert set(sparse) < set(dense)
        assert all(sparse[key].equal(dense[key]) for key in sparse)
    values = {
        name: sum(t.numel() for key, t in found.items() if "@master" in key)
        for name, found in {"sparse": sparse, "dense": dense}.items()
    }
    assert values["sparse"] < values["dense"]

    before = tensors(folder / "step-00000004")
    rows = [key for key in sparse if key.startswith("controller.")]
    assert rows
    assert all(sparse[key].equal(before[key]) for key in rows)

    for start in ("step-00000004", "step-00000006"):
        resumed = tmp_path / f"from-{start}"
        shutil.copytree(folder / start, resumed / "checkpoints" / start)
        assert "sparse phase" not in train(recipe, resumed)
        again = tensors(resumed / "checkpoints" / "step-00000008")
        assert again.keys() == sparse.keys()
        assert all(again[key].equal(sparse[key]) for key in sparse)
