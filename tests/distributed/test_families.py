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
MOE: dict[str, Any] = {"mlp_experts": 6, "mlp_top_k": 1, "attention_experts": 6, "mutual_information": 0.1}
"""Few tokens and one choice of each: in most steps some expert gets none."""


@pytest.mark.parametrize(
    ("family", "stage", "routing"),
    [
        ("swin", 3, "soft"),
        ("vit", 2, "hard"),
        pytest.param("convnext", 1, "soft", marks=pytest.mark.long),
        pytest.param("deformable", 3, "hard", marks=pytest.mark.long),
    ],
)
def test_a_step_is_exact(light_recipe: dict[str, Any], tmp_path: Path, family: str, stage: int, routing: str) -> None:
    light_recipe["backbone"] = {**FAMILIES[family], "routing": routing}
    light_recipe["engine"]["zero_stage"] = stage
    verify(light_recipe, tmp_path)


@pytest.mark.parametrize(
    ("family", "stage", "schedule", "settings"),
    [
        pytest.param("vit", 0, "iid", {"shared_experts": 1}, marks=pytest.mark.long),
        pytest.param(
            "vit", 1, "accumulate", {"mutual_information_source": "gates", "mlp_top_k": 2}, marks=pytest.mark.long
        ),
        ("swin", 2, "iid", {"token_mutual_information": 0.05, "concentration": 0.05}),
        ("vit", 3, "iid", {"task_mlp_top_k": {"digits": 3}}),
        pytest.param("swin", 3, "per_batch", {"task_embedding": False}, marks=pytest.mark.long),
    ],
)
def test_a_step_with_token_level_experts_is_exact(
    light_recipe: dict[str, Any], tmp_path: Path, family: str, stage: int, schedule: str, settings: dict[str, Any]
) -> None:
    light_recipe["backbone"] = {**FAMILIES[family], "units": 1, "moe": MOE | settings}
    light_recipe["schedule"] = {"kind": schedule}
    light_recipe["engine"] |= {"zero_stage": stage, "devices_per_rank": len(light_recipe["tasks"])}
    table = verify(light_recipe, tmp_path)
    if schedule == "iid":  # some devices' tokens left some experts out
        idle = next(line for line in table.splitlines() if line.startswith("idle"))
        assert int(idle.split("0.0e+00")[1].split()[0]) > 20, table


@pytest.mark.parametrize(
    ("ranks", "stage", "clip", "offload"),
    [
        pytest.param(2, 0, 0.1, False, marks=pytest.mark.long),
        pytest.param(2, 1, 0.0, False, marks=pytest.mark.long),
        pytest.param(4, 0, 0.0, False, marks=pytest.mark.long),
        (2, 1, 0.1, True),
        (4, 2, 0.1, False),
    ],
)
def test_a_step_with_experts_spread_over_ranks_is_exact(
    light_recipe: dict[str, Any], tmp_path: Path, ranks: int, stage: int, clip: float, offload: bool
) -> None:
    """Two ranks hold every expert once; they run other tasks, with other numbers of tokens."""
    light_recipe["backbone"] = {**FAMILIES["vit"], "units": 1, "moe": MOE | {"mlp_top_k": 2, "mlp_blocks": "every"}}
    light_recipe["schedule"] = {"kind": "static", "static": ["digits", "distance", "distance"]}
    light_recipe["engine"] |= {"zero_stage": stage, "expert_parallel": 2, "offload_optimizer": offload}
    verify(light_recipe, tmp_path, ranks, {"clip_norm": clip})


@pytest.mark.parametrize(
    ("family", "stage", "precision", "more"),
    [
        ("vit", 3, "bf16", {"units": 1, "moe": MOE}),
        ("swin", 2, "fp16", {}),
        pytest.param("swin", 1, "bf16", {"units": 1, "moe": MOE}, marks=pytest.mark.long),
        pytest.param("vit", 0, "fp16", {"units": 1, "moe": MOE}, marks=pytest.mark.long),
        pytest.param("convnext", 3, "fp16", {"routing": "hard"}, marks=pytest.mark.long),
        pytest.param("convnext", 2, "bf16", {}, marks=pytest.mark.long),
        pytest.param("deformable", 3, "bf16", {}, marks=pytest.mark.long),
        pytest.param("deformable", 1, "fp16", {"routing": "hard"}, marks=pytest.mark.long),
    ],
)
def test_a_step_with_16_bits_is_that_of_one_process(
    light_recipe: dict[str, Any], tmp_path: Path, family: str, stage: int, precision: str, more: dict[str, Any]
) -> None:
    """Routers compute in fp32: a stage that sends their weights in 16 bits lets tokens choose other experts."""
    light_recipe["backbone"] = {**FAMILIES[family], **more}
    light_recipe["engine"] |= {"zero_stage": stage, "precision": precision, "devices_per_rank": 2}
    print(verify(light_recipe, tmp_path))


def verify(recipe: dict[str, Any], folder: Path, ranks: int = 2, optimizer: dict[str, Any] | None = None) -> str:
    """The table of ``gppf-ds verify``, after every rule has been seen to hold."""
    recipe["optimizer"] = {"name": "adamw", "learning_rate": 0.001, **(optimizer or {})}
    command = ["-m", "gppf_ds", "verify", "--config", str(write_recipe(recipe, folder)), "--verify_steps", "2"]
    codes, outputs = end_ranks([command] * ranks, timeout=90.0 * ranks)
    assert codes == [0] * ranks, outputs[0]
    assert outputs[0].count("| ok") == 7, outputs[0]
    return outputs[0]
