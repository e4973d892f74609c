"""How many experts a task gets: the rule, what it changes in a backbone, what it is judged on, and a whole run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import write_recipe
from distributed.test_run import last_checkpoint, losses, train

from gppf_ds.backbone.lego import LegoBackbone
from gppf_ds.config import BackboneConfig
from gppf_ds.config.moe import AdaptiveConfig, MoeConfig
from gppf_ds.errors import UserError
from gppf_ds.train.capacity import Trial, adapt, experts_of, judge
from gppf_ds.train.held_out import split_off

torch.set_num_threads(1)

RULE = AdaptiveConfig(start=2, maximum=4, every=10, patience=20)


def course(values: list[float], k: int = 2) -> list[int]:
    """k after each of these losses, ten steps apart."""
    trial, found = Trial(), []
    for turn, loss in enumerate(values, start=1):
        trial, k = judge(trial, k, 10 * turn, loss, RULE)
        found.append(k)
    return found


def test_a_task_that_improves_keeps_its_experts() -> None:
    assert course([5.0 - i / 10 for i in range(12)]) == [2] * 12


def test_one_that_does_not_gets_one_more_and_gives_it_back_if_that_does_not_help() -> None:
    # Best at step 10. More than 20 steps later, at 40, k grows; at 70 it is taken back, for good.
    assert course([1.0] * 14) == [2, 2, 2, 3, 3, 3, 2, 2, 2, 2, 2, 2, 2, 2]


def test_one_that_improves_with_more_experts_keeps_them_and_may_get_more_up_to_the_maximum() -> None:
    assert course([1.0, 1.0, 1.0, 1.0, 0.9, 0.9, 0.9, 0.9, 0.8, 0.8, 0.8, 0.8, 0.7, 0.7]) == [
        *(2, 2, 2, 3, 3, 3, 3, 4, 4, 4, 4, 4, 4, 4)
    ]


def test_once_settled_nothing_changes_any_more() -> None:
    trial, k = Trial(best=1.0, since=10, grown=True), 3
    trial, k = judge(trial, k, 40, 1.0, RULE)
    assert (trial.settled, k) == (True, 2)
    assert judge(trial, k, 500, 0.1, RULE) == (trial, 2)


def test_a_loss_that_is_no_number_is_no_improvement() -> None:
    trial, k = judge(Trial(), 2, 10, float("nan"), RULE)
    assert (trial, k) == (Trial(), 2)
    assert judge(trial, k, 30, float("inf"), RULE)[1] == 3


def test_all_mlps_of_that_task_change_and_nothing_else() -> None:
    moe = MoeConfig(mlp_experts=6, mlp_blocks="every", attention_experts=4, adaptive=RULE)
    options = {"embed_dim": 48, "depth": 2, "num_heads": 3}
    config = BackboneConfig(name="vit_tiny_patch16_224", options=options, units=1, moe=moe)
    backbone = LegoBackbone(config, tasks=["digits", "scenes"])
    assert experts_of(backbone, "digits") == 2  # where the search starts, not mlp_top_k
    before = {"digits": Trial(best=1.0, since=0), "scenes": Trial(best=1.0, since=0)}
    after = adapt(before, {"digits": 1.0, "scenes": 0.5}, backbone, 30, RULE)
    assert after == {"digits": Trial(best=1.0, since=30, grown=True), "scenes": Trial(best=0.5, since=30)}
    assert backbone.layout is not None
    for name, layer in backbone.moe_layers().items():
        assert layer.top_k == ({"digits": 3, "scenes": 2} if name.endswith("mlp") else {"digits": 3, "scenes": 3})
        assert {task: own.top_k[name] for task, own in backbone.layout.tasks.items()} == layer.top_k


@pytest.mark.parametrize(("size", "images", "held"), [(1000, 64, 64), (1000, 5000, 96), (40, 64, 8), (16, 1, 8)])
def test_the_parts_of_a_training_set_do_not_overlap(size: int, images: int, held: int) -> None:
    learnt, out = split_off(list(range(size)), images, 8, seed=3, name="digits")  # type: ignore[arg-type]
    assert len(out) == held
    drawn = [part[i] for part in (learnt, out) for i in range(len(part))]
    assert sorted(drawn) == list(range(size))
    assert len(learnt) < 50 or max(out[i] for i in range(held)) > size // 2  # folders are sorted by class


def test_a_training_set_that_is_too_small_is_refused() -> None:
    with pytest.raises(UserError, match=r"tasks\.digits: a training set of 15 .* adaptive"):
        split_off(list(range(15)), 8, 8, seed=3, name="digits")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "settings", [{"start": 0}, {"start": 5, "maximum": 4}, {"every": 0}, {"patience": -1}], ids=str
)
def test_bad_settings_are_refused(settings: dict[str, int]) -> None:
    with pytest.raises(UserError, match=r"backbone\.moe\.adaptive\."):
        AdaptiveConfig(**settings)


def test_more_than_there_are_is_refused() -> None:
    with pytest.raises(UserError, match="at most mlp_experts"):
        MoeConfig(mlp_experts=6, adaptive=AdaptiveConfig(maximum=8))


@pytest.mark.parametrize("stage", [0, pytest.param(3, marks=pytest.mark.long)])
def test_a_run_grows_and_resumes_bit_for_bit(light_recipe: dict[str, Any], tmp_path: Path, stage: int) -> None:
    light_recipe["backbone"] = {
        "name": "vit_tiny_patch16_224",
        "options": {"embed_dim": 48, "depth": 2, "num_heads": 3},
        "units": 1,
        "moe": {"mlp_experts": 6, "adaptive": {"start": 1, "maximum": 3, "every": 2, "patience": 0, "images": 4}},
    }
    # Far too high a learning rate: losses go up and down.
    light_recipe["optimizer"] = {"name": "adamw", "learning_rate": 0.1}
    light_recipe["schedule"] = {"kind": "accumulate"}
    light_recipe["engine"] |= {"devices_per_rank": 2, "zero_stage": stage}
    whole = tmp_path / "run"
    recipe = write_recipe(light_recipe, tmp_path)
    done = train(recipe)
    assert done.returncode == 0, done.stdout
    lines = [json.loads(line) for line in (whole / "capacity.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4, 6, 8]
    assert {k for line in lines for k in line["experts"].values()} > {1}
    expected, expected_losses = last_checkpoint(whole), losses(whole)
    state = json.loads((whole / "checkpoints/step-00000008/state.json").read_text())
    assert {own["top_k"]["2.mlp"] for own in state["layout"]["tasks"].values()} == set(lines[-1]["experts"].values())

    shutil.rmtree(whole / "checkpoints/step-00000008")  # as if the run had ended after step 4
    again = train(recipe)
    assert "resuming from" in again.stdout, again.stdout
    got = last_checkpoint(whole)
    assert got.keys() == expected.keys()
    assert all(got[key].equal(expected[key]) for key in got)
    assert json.loads((whole / "checkpoints/step-00000008/state.json").read_text()) == state
    assert {step: losses(whole)[step] for step in (5, 6, 7, 8)} == {s: expected_losses[s] for s in (5, 6, 7, 8)}
    resumed = [json.loads(line) for line in (whole / "capacity.jsonl").read_text().splitlines()]
    assert resumed[4:] == lines[2:]
