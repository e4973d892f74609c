"""Running statistics measured anew: the plain average over the task's own batches, and nothing else changes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import write_recipe

from gppf_ds.backbone.lego import LegoBackbone
from gppf_ds.config import ScheduleConfig
from gppf_ds.train import recipe
from gppf_ds.train.feed import Feed
from gppf_ds.transfer.batch_norms import reestimate
from gppf_ds.transfer.extract import ChosenPath

CPU = torch.device("cpu")
BATCHES = 3


@pytest.fixture
def run(light_recipe: dict[str, Any], tmp_path: Path) -> recipe.Recipe:
    light_recipe["loader"]["workers"] = 0
    light_recipe["schedule"] = {"kind": "static", "static": ["digits", "distance"]}
    return recipe.read(["--config", str(write_recipe(light_recipe, tmp_path))])


def some_path(run: recipe.Recipe) -> ChosenPath:
    backbone = LegoBackbone(run.config.backbone, seed=3)
    return ChosenPath(backbone, [index % 2 for index in range(len(backbone.layers))])


def statistics(path: ChosenPath) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in path.state().items() if "running" in name}


@pytest.mark.parametrize("task", ["digits", "distance"])
def test_statistics_are_the_average_over_the_tasks_batches(run: recipe.Recipe, task: str) -> None:
    path = some_path(run)
    weights = [parameter.clone() for parameter in path.parameters()]
    assert reestimate(path, run, task, BATCHES, CPU) == 1 + 4 * 4
    assert all(torch.equal(before, after) for before, after in zip(weights, path.parameters(), strict=True))
    assert not any(module.training for module in path.modules())
    means, variances = [], []
    feed = Feed(replace(run.config, schedule=ScheduleConfig()), {task: run.tasks[task]})
    for loaded in feed.batches(0, BATCHES, {task: 0}, [0], 1):
        assert loaded.request.task == task
        x = path.units[0].conv1(feed.prepare(loaded, CPU).images)  # type: ignore[operator, union-attr]
        means.append(x.mean((0, 2, 3)))
        variances.append(x.var((0, 2, 3), unbiased=True))
    found = path.state()
    torch.testing.assert_close(found["bn1.running_mean"], torch.stack(means).mean(0), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found["bn1.running_var"], torch.stack(variances).mean(0), rtol=1e-4, atol=1e-6)
    assert int(found["bn1.num_batches_tracked"]) == BATCHES


def test_statistics_are_a_function_of_the_seed_and_the_batches(run: recipe.Recipe) -> None:
    found = []
    for seed, batches in ((0, 2), (0, 2), (1, 2), (0, 1)):
        path = some_path(run)
        reestimate(path, replace(run, config=replace(run.config, seed=seed)), "digits", batches, CPU)
        found.append(statistics(path))
    first, again, other_seed, fewer = found
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other_seed[name]) for name in first)
    assert not any(torch.equal(first[name], fewer[name]) for name in first)


def test_a_model_without_batch_norms_reads_nothing(run: recipe.Recipe) -> None:
    run.tasks.clear()
    options = {"depth": 1, "embed_dim": 8, "num_heads": 1}
    backbone = LegoBackbone(replace(run.config.backbone, name="vit_tiny_patch16_224", options=options), seed=3)
    assert reestimate(ChosenPath(backbone, [0, 1]), run, "digits", BATCHES, CPU) == 0
