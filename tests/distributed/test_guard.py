"""The end of a run to which nothing finite comes any more: a sentence, exit code 2 and a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import write_recipe
from safetensors.torch import load_file

from distributed.ranks import end_ranks, environment

STEEP = '''
from gppf_ds.tasks.classification import Classification

class Steep(Classification):
    """Whose loss is finite and has no finite gradient, as that of a root at 0."""
    def build_head(self, features):
        head = super().build_head(features)
        honest = head.loss
        head.loss = lambda maps, targets: {k: v + (0 * v).sqrt() for k, v in honest(maps, targets).items()}
        return head
'''


@pytest.mark.parametrize(("precision", "overflows"), [("fp32", 0), ("fp16", 16)])
def test_a_run_without_finite_gradients_ends_with_a_checkpoint(
    light_recipe: dict[str, Any], tmp_path: Path, precision: str, overflows: int
) -> None:
    """With fp16 the loss scale comes down from 2^16 to 1 before these gradients are to blame."""
    (tmp_path / "steep.py").write_text(STEEP)
    del light_recipe["tasks"]["distance"]
    light_recipe["tasks"]["digits"]["class_path"] = "steep.Steep"
    light_recipe |= {"steps": 100, "guard_limit": 3, "checkpoint": {"every": 1, "keep": 100}}
    light_recipe["engine"].update(precision=precision, zero_stage=2)
    command = ["-m", "gppf_ds", "train", "--config", str(write_recipe(light_recipe, tmp_path))]
    codes, outputs = end_ranks([command] * 2, timeout=120, PYTHONPATH=f"{tmp_path}:{environment()['PYTHONPATH']}")
    assert 2 in codes, outputs
    assert 0 not in codes, outputs
    # Both ranks come to it; the first one tells.
    assert "3 steps in a row had no finite loss or gradient (non_finite_loss" in "\n".join(outputs)

    saved = sorted((tmp_path / "run" / "checkpoints").glob("step-*"))
    assert len(saved) == overflows + 3
    states = [json.loads((folder / "state.json").read_text()) for folder in saved]
    assert [state["unchanged_steps"] for state in states] == [0] * overflows + [1, 2, 3]
    if precision == "fp16":
        assert [state["loss_scale"]["value"] for state in states[:overflows]] == [2.0**k for k in range(15, -1, -1)]
    for rank in (0, 1):
        first, last = (load_file(folder / f"rank-{rank:05d}.safetensors") for folder in (saved[0], saved[-1]))
        assert all(first[key].equal(last[key]) for key in last)
