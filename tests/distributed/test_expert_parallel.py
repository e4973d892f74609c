"""Checkpoints of experts that are spread over ranks: by logical name, for any number of ranks."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from conftest import write_recipe

from distributed.ranks import end_ranks
from distributed.simt_case import relative
from gppf_ds.train.checkpoint import CheckpointReader

BACKBONE: dict[str, Any] = {
    "name": "vit_tiny_patch16_224",
    "options": {"embed_dim": 48, "depth": 2, "num_heads": 3},
    "units": 1,
    "moe": {"mlp_experts": 5, "mlp_top_k": 2, "attention_experts": 4},
}


def final(folder: Path) -> CheckpointReader:
    return CheckpointReader(folder / "checkpoints" / "step-00000008")


def test_a_run_goes_on_with_its_experts_on_other_ranks(light_recipe: dict[str, Any], tmp_path: Path) -> None:
    light_recipe |= {"backbone": BACKBONE, "optimizer": {"name": "adamw", "learning_rate": 0.001}}
    light_recipe["schedule"] = {"kind": "static", "static": ["digits", "distance"]}
    light_recipe["engine"] |= {"zero_stage": 1, "expert_parallel": 2}
    train = ["-m", "gppf_ds", "train", "--config"]
    spread = [*train, str(write_recipe(light_recipe, tmp_path, "spread.yaml"))]
    codes, outputs = end_ranks([spread, spread], timeout=240)
    assert codes == [0, 0], outputs

    alone = tmp_path / "alone"
    shutil.copytree(tmp_path / "run" / "checkpoints" / "step-00000004", alone / "checkpoints" / "step-00000004")
    light_recipe |= {"output": str(alone), "engine": {"devices_per_rank": 2, "timeout": 60}}
    codes, outputs = end_ranks([[*train, str(write_recipe(light_recipe, tmp_path, "alone.yaml"))]], timeout=240)
    assert codes == [0], outputs
    assert "resuming from" in outputs[0]

    got, wanted = final(tmp_path / "run"), final(alone)
    assert got.sizes() == wanted.sizes()
    assert sum(".mlp.experts." in name for name in got.sizes()) == 5 * 4
    for name in wanted.sizes():
        for kind in ("master", *wanted.kinds(name)):
            assert relative(got.whole(name, kind), wanted.whole(name, kind)) < 1e-4, (name, kind)
    assert got.state.layout == wanted.state.layout


@pytest.mark.parametrize(
    ("ranks", "engine", "sentence"),
    [
        (2, {"expert_parallel": 2, "zero_stage": 3}, "engine.expert_parallel spreads experts over ranks, as ZeRO 3"),
        (3, {"expert_parallel": 2}, "engine.expert_parallel is 2, which does not divide the 3 ranks"),
    ],
)
def test_what_does_not_divide_is_refused(
    light_recipe: dict[str, Any], tmp_path: Path, ranks: int, engine: dict[str, Any], sentence: str
) -> None:
    light_recipe |= {"backbone": BACKBONE}
    light_recipe["engine"] |= engine
    command = ["-m", "gppf_ds", "train", "--config", str(write_recipe(light_recipe, tmp_path))]
    codes, outputs = end_ranks([command] * ranks, timeout=120)
    assert 0 not in codes
    assert any(sentence in output for output in outputs), outputs
