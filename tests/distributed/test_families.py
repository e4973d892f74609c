"""Every family of backbones in real steps on two ranks, against the single-process reference."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from conftest import write_recipe

from distributed.ranks import end_ranks

FAMILIES: dict[str, dict[str, Any]] = {
    "swin": {
        "name": "swin_tiny_patch4_window7_224",
        "options": {"embed_dim": 24, "depths": [1, 2, 1, 1], "num_heads": [1, 2, 4, 8], "drop_path_rate": 0.2},
    },
    "vit": {"name": "vit_tiny_patch16_224", "options": {"embed_dim": 48, "depth": 3, "num_heads": 3}},
    "convnext": {"name": "convnext_atto", "options": {"depths": [1, 1, 2, 1], "dims": [8, 16, 24, 32]}},
    "deformable": {
        "name": "resnet18",
        "options": {"layers": [1, 1, 1, 1], "channels": [8, 8, 16, 16]},
        "unit_blocks": ["plain", "deformable"],
    },
}


@pytest.mark.parametrize(
    ("family", "stage", "routing"),
    [("swin", 3, "soft"), ("vit", 2, "hard"), ("convnext", 1, "soft"), ("deformable", 3, "hard")],
)
def test_a_step_is_exact(light_recipe: dict[str, Any], tmp_path: Path, family: str, stage: int, routing: str) -> None:
    light_recipe["backbone"] = {**FAMILIES[family], "routing": routing}
    light_recipe["engine"]["zero_stage"] = stage
    light_recipe["optimizer"] = {"name": "adamw", "learning_rate": 0.001}
    command = ["-m", "gppf_ds", "verify", "--config", str(write_recipe(light_recipe, tmp_path)), "--verify_steps", "2"]
    codes, outputs = end_ranks([command, command], timeout=180)
    assert codes == [0, 0], outputs[0]
    assert outputs[0].count("| ok") == 7, outputs[0]
