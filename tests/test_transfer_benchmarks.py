"""The benchmarks of transfer: what they train, that they do not train it twice, and what they make of the numbers."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
from benchmark_run import BENCHMARKS, run

from gppf_ds.train import recipe
from gppf_ds.train.inherit import resolve


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Imports a script of the folder."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


@pytest.mark.long
def test_a_finished_cell_is_not_trained_again(tmp_path: Path, demo_data: Path) -> None:
    place = tmp_path / "pack/classification"
    place.mkdir(parents=True)
    (place / "clothing").symlink_to(demo_data / "classification")
    common = ["--folder", str(tmp_path / "runs"), "--pack", str(tmp_path / "pack"), "--results", str(tmp_path)]
    short = ["--targets", "clothing", "--seeds", "1", "--pretrain-steps", "2", "--steps", "2"]

    def found() -> Any:
        return json.loads((tmp_path / "transfer_table.json").read_text())["result"]["clothing"]

    first = run("transfer_table", *common, *short, "--arms", "scratch")
    assert first.count("gppf-ds train") == 1
    scratch = found()["values"]["scratch"]["1"]
    both = ["--arms", "scratch", "single-task"]
    # What is missing: the pre-training on digits alone, and the fine-tuning from it.
    second = run("transfer_table", *common, *short, *both)
    assert [line for line in second.splitlines() if line.startswith("gppf-ds")] == [
        "gppf-ds train --config seed1/pretrained_digits.yaml",
        "gppf-ds finetune --config seed1/clothing_single.yaml",
    ]
    assert found()["values"]["scratch"]["1"] == scratch
    gain = found()["values"]["single-task"]["1"] - scratch
    assert found()["gains"]["single-task"] == {"mean": pytest.approx(gain), "deviation": None, "seeds": 1}
    assert "gppf-ds" not in run("transfer_table", *common, *short, *both, "--finished")


def test_every_recipe_of_the_plan_can_be_read(load: Any, tmp_path: Path) -> None:
    runs, table = load("transfer_runs"), load("transfer_table")
    plan = runs.Plan(3, runs.Settings(pretrain_steps=20, steps=10), tmp_path)

    def content(one: Any) -> recipe.Recipe:
        file = tmp_path / f"{one.name.replace('/', '_')}.yaml"
        file.write_text(json.dumps(one.content))
        return recipe.from_content({k: v for k, v in resolve([file]).content.items() if k != "finetune"})

    for target in runs.TARGETS.values():
        for arm, make in table.ARMS.items():
            one = make(plan, target)
            read = content(one)
            assert (list(read.tasks), read.config.steps, read.config.seed) == ([target.name], 10, 3)
            assert (one.command == "train") == (arm == "scratch")
            for earlier in one.after:
                content(earlier)
        retrain = plan.retrain(target)
        assert retrain.content["finetune"]["path"] == plan.dynamic(target).name
        assert [earlier.name for earlier in retrain.after] == ["seed3/pretrained", plan.dynamic(target).name]
    alone = content(plan.pretrained("regions"))
    assert (list(alone.tasks), alone.config.engine.devices_per_rank, alone.config.backbone.units) == (["regions"], 1, 1)
    together = content(plan.pretrained())
    assert together.config.engine.devices_per_rank == len(together.tasks) == 4


def test_gains_are_over_scratch_of_the_same_seed(load: Any) -> None:
    table = load("transfer_table")
    found = table.summary({"scratch": {0: 0.1, 1: 0.3}, "dynamic": {0: 0.2, 1: 0.5, 2: 0.9}, "retrain": {}})
    assert found["arms"]["dynamic"] == {
        "mean": pytest.approx(1.6 / 3),
        "deviation": pytest.approx(0.3512, abs=1e-4),
        "seeds": 3,
    }
    assert found["gains"] == {
        "dynamic": {"mean": pytest.approx(0.15), "deviation": pytest.approx(0.05 * 2**0.5), "seeds": 2}
    }
    text = table.report({"cells": {"metric": "bbox_AP", **found}})
    assert "20.0 +- 14.1 (2)" in text
    assert "15.0 +- 7.1 (2)" in text


def test_settings_of_a_folder_stay(load: Any, tmp_path: Path) -> None:
    runs = load("transfer_runs")
    runs.Workplace(tmp_path, runs.Settings(4, 2), 1.0)
    runs.Workplace(tmp_path, runs.Settings(4, 2), 1.0)
    with pytest.raises(SystemExit, match="other settings"):
        runs.Workplace(tmp_path, runs.Settings(4, 3), 1.0)


def test_advice_is_summed_up_over_seeds(load: Any) -> None:
    advice = load("transfer_advice")

    def ranking(spearman: float, regret: float, values: tuple[float, ...]) -> dict[str, Any]:
        return {"spearman": spearman, "regret": regret, "paths": [{"tuned": {"mean": value}} for value in values]}

    found = advice.summary([ranking(1.0, 0.0, (0.5, 0.4)), ranking(float("nan"), 0.1, (0.2, 0.3, 0.2, 0.1))])
    assert found == pytest.approx(
        {"rankings": 2, "spearman": 1, "best named": 0.5, "by chance": 0.375, "regret": 0.05, "spread": 0.15}
    )
    assert "50% (38%)" in advice.report(
        {"cells": [ranking(1.0, 0.0, (0.5, 0.4)), ranking(0.0, 0.1, (0.2, 0.3, 0.2, 0.1))]}
    )


def test_fixed_path_compares_the_same_network(tmp_path: Path) -> None:
    small = ["--steps", "2", "--warmup", "0", "--batch-size", "2", "--image-size", "64", "--models", "resnet50"]
    assert "ours / timm" in run("fixed_path", "--results", str(tmp_path), *small)
    found = json.loads((tmp_path / "fixed_path.json").read_text())["result"]["resnet50"]
    assert set(found["milliseconds"]) == {"ours", "timm", "again"}
    for ratio in found["ratios"].values():
        assert 0 < ratio["min"] <= ratio["median"] <= ratio["max"]
