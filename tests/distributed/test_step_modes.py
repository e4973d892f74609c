"""The three kinds of step: simt, accumulate (every rank runs every task) and alternate (one task per step)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from distributed.ranks import run_ranks
from distributed.test_families import FAMILIES, verify


def step_of(kind: str, ranks: int, folder: Path) -> dict[str, Any]:
    run_ranks("distributed.modes_case", ranks, kind, str(folder / kind))
    return dict(torch.load(folder / kind, weights_only=True))


def test_accumulate_on_one_rank_is_simt_on_three_up_to_who_is_divided_by_how_many(tmp_path: Path) -> None:
    """With layer norms alone: SIMT's average divides by the users, accumulate by the devices of one task, here 1."""
    summed, simt = step_of("accumulate", 1, tmp_path), step_of("static", 3, tmp_path)
    assert summed["users"] == simt["users"]
    counts = set()
    for name, wanted in summed["gradients"].items():
        users = simt["users"][name]
        owned = "heads.bank" in name or ".routers." in name or "task_embeddings" in name
        assert users == (1 if owned else 3) or ".experts." in name, name
        counts.add((".experts." in name, users))
        got = simt["gradients"][name] * users
        # A gradient was read off a step of one learning rate, so its rounding is that of the parameter.
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=2e-6, msg=lambda text, name=name: f"{name}: {text}")
        assert users == 0 or wanted.norm() > 1e-4, name
    assert {(False, 1), (False, 3), (True, 3)} <= counts


@pytest.mark.parametrize(
    ("schedule", "engine", "routing"),
    [
        pytest.param("accumulate", {"devices_per_rank": 2}, "soft", marks=pytest.mark.long),
        ("accumulate", {"accumulation": 2, "zero_stage": 1}, "hard"),
        ("per_batch", {"devices_per_rank": 2, "zero_stage": 2}, "soft"),
    ],
    ids=str,
)
def test_lego_resnets_with_cross_task_batch_norm_are_exact(
    light_recipe: dict[str, Any], tmp_path: Path, schedule: str, engine: dict[str, int], routing: str
) -> None:
    """Of the ways in which ``gppf-ds verify`` may run them; the MoE backbone's are in ``test_families``."""
    light_recipe["backbone"]["routing"] = routing
    light_recipe["schedule"] = {"kind": schedule}
    light_recipe["engine"] |= engine
    verify(light_recipe, tmp_path)


def test_accumulated_one_after_another_the_moe_backbone_is_exact_too(
    light_recipe: dict[str, Any], tmp_path: Path
) -> None:
    """Groups of one device: the other task's row of the mutual information is the running one."""
    moe = {"mlp_experts": 6, "mlp_top_k": 2, "mutual_information": 0.1}
    light_recipe["backbone"] = {**FAMILIES["vit"], "units": 1, "moe": moe}
    light_recipe["schedule"] = {"kind": "accumulate"}
    light_recipe["engine"] |= {"accumulation": 2}
    verify(light_recipe, tmp_path)
