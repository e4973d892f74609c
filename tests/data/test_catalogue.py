"""The catalogue knows every data set that a recipe names, and tells a whole copy from a broken one."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from gppf_ds.cli import main
from gppf_ds.data.catalogue import SOURCES, examine, find
from gppf_ds.errors import UserError
from gppf_ds.train.inherit import resolve
from gppf_ds.train.recipe import Recipe, from_content
from gppf_ds.train.reproduce import recipes

# A file with an underscore in front is what others inherit, and no recipe by itself.
FILES = {path.relative_to(recipes()).as_posix(): path for path in sorted(recipes().rglob("[!_]*.yaml"))}
NAMES = {
    *("imagenet21k", "imagenet1k", "coco", "lvis", "objects365", "openimages"),
    *("ade20k", "voc2012aug", "cocostuff164k", "kitti_depth"),
    *(f"uodb_{name}" for name in ("kitti", "widerface", "voc", "lisa", "dota", "watercolor", "clipart", "comic")),
    *("uodb_kitchen", "uodb_deeplesion"),
    *(f"cls_{name}" for name in ("aircraft", "caltech101", "cars", "cifar10", "cifar100", "dtd", "flowers")),
    *("cls_food101", "cls_pets", "cls_sun397"),
}


@pytest.fixture(scope="module")
def parsed() -> dict[str, Recipe]:
    """As they stand: those that start from a finished run without what that one decides."""
    return {name: from_content(resolve([path]).content) for name, path in FILES.items()}


def test_the_catalogue_has_every_data_set_of_the_paper() -> None:
    assert SOURCES.keys() == NAMES


@pytest.mark.parametrize("name", sorted(SOURCES))
def test_a_source_says_what_a_user_needs(name: str) -> None:
    source = SOURCES[name]
    assert source.title
    assert re.search(r"\w\.\w+", source.home), "a place to download it from"
    assert source.layout
    assert all(number > 0 for number in source.counts.values())


def test_every_recipe_reads_and_every_source_in_it_exists(parsed: dict[str, Recipe]) -> None:
    for name, recipe in parsed.items():
        assert recipe.tasks, name
        for task_name, task in recipe.tasks.items():
            assert (task.source is None) == ("demo" in name), f"{name}: {task_name}"
            if task.source is not None:
                find(task.source)


def test_every_recipe_has_an_output_of_its_own(parsed: dict[str, Recipe]) -> None:
    places = {name: recipe.config.output for name, recipe in parsed.items()}
    assert places.pop("ablations/units2.yaml") == places["gppf15m_r50.yaml"]
    assert {name: f"runs/{name.removesuffix('.yaml')}" for name in places} == places


def test_a_joint_recipe_and_its_baselines_share_one_budget(parsed: dict[str, Recipe]) -> None:
    joint = parsed["gppf15m_r50.yaml"]
    singles = {name: parsed[f"single/{name}.yaml"] for name in joint.tasks}
    assert sum(single.config.steps for single in singles.values()) == pytest.approx(
        joint.config.steps, abs=len(singles)
    )
    weights = sum(task.weight for task in joint.tasks.values())
    for name, single in singles.items():
        assert list(single.tasks) == [name]
        assert single.tasks[name].batch_size == joint.tasks[name].batch_size
        assert single.config.steps == pytest.approx(joint.config.steps * joint.tasks[name].weight / weights, abs=1)


@pytest.mark.parametrize("backbone", ["r50", "swin_t"])
@pytest.mark.parametrize("gpus", [1, 8])
def test_small_clusters_follow_the_stated_rule(parsed: dict[str, Recipe], backbone: str, gpus: int) -> None:
    whole, small = parsed[f"gppf15m_{backbone}.yaml"], parsed[f"gppf15m_{backbone}_{gpus}gpu.yaml"]
    [share] = {task.batch_size / whole.tasks[name].batch_size for name, task in small.tasks.items()}
    scale = gpus * small.config.engine.devices_per_rank / 56 * share
    rate = small.config.optimizer.learning_rate / whole.config.optimizer.learning_rate
    assert rate == pytest.approx(scale if backbone == "r50" else scale**0.5, rel=0.01)
    assert small.config.steps == pytest.approx(whole.config.steps / scale / {1: 200, 8: 10}[gpus])
    assert small.config.optimizer.warmup_steps == small.config.steps // 10


def test_a_source_that_is_not_there_is_refused_with_the_choices() -> None:
    with pytest.raises(UserError, match=r"'coca'.*coco"):
        find("coca")


@pytest.mark.parametrize("name", sorted(SOURCES))
def test_a_smoke_set_has_the_layout_and_no_fault(name: str, tmp_path: Path) -> None:
    source = find(name)
    source.smoke(tmp_path)
    finding = examine(source, tmp_path, 5)
    assert finding.missing == []
    assert finding.faults == []
    assert all(here is None or here > 0 for here, _ in finding.counts.values())
    assert not finding.complete or not source.counts, "a tiny set is no official one"


def test_check_data_says_what_is_missing_and_where_to_get_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "recipe.yaml"
    task = {
        "class_path": "gppf_ds.tasks.depth.Depth",
        "init_args": {"data": str(tmp_path / "kitti"), "batch_size": 1, "source": "kitti_depth"},
    }
    recipe.write_text(yaml.safe_dump({"output": "run", "steps": 1, "tasks": {"depth": task}}))
    assert main(["check-data", str(recipe)]) == 2
    said = capsys.readouterr().out
    for words in ("depth: KITTI", "missing: eigen_train_files_with_gt.txt", "get it: https", str(tmp_path / "kitti")):
        assert words in said

    find("kitti_depth").smoke(tmp_path / "kitti")
    [image, *_] = sorted((tmp_path / "kitti").rglob("image_02/data/*.png"))
    image.unlink()
    assert main(["check-data", str(recipe)]) == 2
    said = capsys.readouterr().out
    for words in ("train pairs: ", "of 23,158", "broken: ", image.name):
        assert words in said


def test_check_data_of_data_of_ones_own(tmp_path: Path, demo_data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    task = {
        "class_path": "gppf_ds.tasks.classification.Classification",
        "init_args": {"data": str(demo_data / "classification"), "batch_size": 1},
    }
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({"output": "run", "steps": 1, "tasks": {"digits": task}}))
    assert main(["check-data", str(recipe)]) == 0
    assert "digits: data of your own, fine" in capsys.readouterr().out
    task["init_args"]["data"] = str(tmp_path / "nowhere")  # type: ignore[index]
    recipe.write_text(yaml.safe_dump({"output": "run", "steps": 1, "tasks": {"digits": task}}))
    assert main(["check-data", str(recipe)]) == 2
    assert "nowhere" in capsys.readouterr().out
