"""Smoke runs of recipes: tiny imitations of the data sets, the real launcher, two ranks, then evaluate and export."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import write_recipe
from distributed.ranks import ROOT
from distributed.test_demo import gppf_ds
from distributed.test_run import train

from gppf_ds.backbone.lego import FAMILIES
from gppf_ds.errors import UserError
from gppf_ds.train import smoke
from gppf_ds.train.inherit import resolve
from gppf_ds.train.recipe import read

RECIPES = sorted(path for path in (ROOT / "ds_configs/recipes").rglob("[!_]*.yaml") if "demo" not in path.name)


def names(paths: list[Path]) -> list[str]:
    return [str(path.relative_to(ROOT / "ds_configs/recipes").with_suffix("")) for path in paths]


def run_smoke(recipe: Path, output: Path) -> dict[str, Any]:
    """The metrics of a smoke run, after each of its tasks was trained and evaluated.

    A recipe that starts from a finished run starts from the smoke run of that one's recipe.
    """
    source = resolve([recipe]).content.get("finetune", {}).get("source")
    start = []
    if source is not None:
        run_smoke(ROOT / "ds_configs/recipes" / f"{Path(source).name}.yaml", output.with_name("source"))
        start = ["--finetune.source", str(output.with_name("source"))]
    done = train(recipe, "--smoke", "--output", str(output), *start, timeout=280)
    assert done.returncode == 0, done.stdout
    assert not output.exists()
    folder = output.with_name(f"{output.name}-smoke")
    before, after = json.loads((folder / "results.json").read_text())
    assert (before["step"], after["step"]) == (0, 2)
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert after["metrics"].keys() == config["tasks"].keys()
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert not any(line["skipped"] for line in lines)
    if config["schedule"]["kind"] != "per_batch":
        assert all(count > 0 for line in lines for count in line["tasks"].values())
    return dict(after["metrics"])


def test_every_family_of_backbones_can_be_made_tiny() -> None:
    assert smoke.NARROW.keys() == FAMILIES.keys()


def test_what_a_recipe_is_about_stays(tmp_path: Path) -> None:
    run = read(["--config", str(ROOT / "ds_configs/recipes/ablations/hard.yaml"), "--backbone.units", "[3,2,2]"])
    small = smoke.reduced(run)
    assert (small.config.backbone.units, small.config.backbone.routing) == (3, "hard")
    assert small.config.steps == smoke.STEPS
    assert small.config.output != run.config.output
    assert small.config.optimizer.learning_rate == run.config.optimizer.learning_rate
    assert small.tasks.keys() == run.tasks.keys()
    assert small.config.engine.devices_per_rank * 1 == len(run.tasks)  # one rank here


def test_a_task_without_a_source_has_no_smoke_run(light_recipe: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"tasks\.digits.*source"):
        smoke.reduced(read(["--config", str(write_recipe(light_recipe, tmp_path))]))


def test_a_smoke_run_through_the_launcher_and_what_follows_it(tmp_path: Path) -> None:
    found = run_smoke(ROOT / "ds_configs/recipes/kitti_depth.yaml", tmp_path / "run")
    folder = tmp_path / "run-smoke"
    again = json.loads(gppf_ds("evaluate", "--run", str(folder)))["metrics"]
    for task, values in again.items():
        assert values == pytest.approx({key: found[task][key] for key in values}, rel=1e-3)
    exports = gppf_ds("export", "--run", str(folder)).split()
    assert any(file.endswith("model.safetensors") for file in exports)


@pytest.mark.long
@pytest.mark.parametrize("recipe", RECIPES, ids=names(RECIPES))
def test_every_recipe_has_a_smoke_run(recipe: Path, tmp_path: Path) -> None:
    run_smoke(recipe, tmp_path / "run")
