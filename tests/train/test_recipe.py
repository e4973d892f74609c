"""Recipes: what is right arrives; each mistake ends in one sentence that names the key."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from gppf_ds.errors import UserError
from gppf_ds.train.inherit import resolve
from gppf_ds.train.recipe import Recipe, check, read, read_run

CLASS_PATH = "gppf_ds.tasks.classification.Classification"


@pytest.fixture
def recipe(tmp_path: Path) -> dict[str, Any]:
    for split in ("train", "val"):
        for label in ("cat", "dog"):
            folder = tmp_path / "data" / split / label
            folder.mkdir(parents=True)
            Image.new("RGB", (8, 8)).save(folder / "0.png")
    task = {"class_path": CLASS_PATH, "init_args": {"data": str(tmp_path / "data"), "batch_size": 2}}
    return {
        "output": str(tmp_path / "run"),
        "steps": 10,
        "backbone": {"name": "resnet18", "options": {"channels": [4, 4, 4, 4]}},
        "tasks": {"pets": task, "farm": copy.deepcopy(task)},
    }


def write(recipe: dict[str, Any], folder: Path, name: str = "recipe.yaml") -> str:
    path = folder / name
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return str(path)


def change(recipe: dict[str, Any], key: str, value: Any) -> None:
    """Sets a/b/c of nested dictionaries."""
    *parents, last = key.split("/")
    for parent in parents:
        recipe = recipe.setdefault(parent, {})
    recipe[last] = value


def judge(recipe: dict[str, Any], folder: Path) -> Recipe:
    made = read(["--config", write(recipe, folder)])
    check(made)
    return made


def test_a_good_recipe(recipe, tmp_path):
    recipe["schedule"] = {"kind": "static", "static": ["pets", "farm"]}
    change(recipe, "tasks/farm/init_args/weight", 2.5)
    made = judge(recipe, tmp_path)
    assert list(made.tasks) == ["pets", "farm"]
    assert made.tasks["farm"].weight == 2.5
    assert made.config.steps == 10
    assert made.config.backbone.options == {"channels": [4, 4, 4, 4]}
    assert made.config.schedule.static == ["pets", "farm"]


def test_the_line_overrides_files_and_later_files_win(recipe, tmp_path):
    first = write(recipe, tmp_path)
    second = write({"steps": 20, "seed": 3}, tmp_path, "second.yaml")
    made = read(["--config", first, "--config", second, "--seed", "4", "--engine.zero_stage", "2"])
    assert (made.config.steps, made.config.seed, made.config.engine.zero_stage) == (20, 4, 2)
    assert list(made.tasks) == ["pets", "farm"]


def test_the_resolved_text_reads_back_alike(recipe, tmp_path):
    made = read(["--config", write(recipe, tmp_path)])
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.yaml").write_text(made.text)
    again = read_run(folder)
    assert again.config == made.config
    assert again.text == made.text
    assert {n: vars(t) for n, t in again.tasks.items()} == {n: vars(t) for n, t in made.tasks.items()}


def test_a_folder_that_is_no_run(tmp_path):
    with pytest.raises(UserError, match=r"config\.yaml"):
        read_run(tmp_path)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("tasks/pets/class_path", "gppf_ds.tasks.nowhere.Nothing", ["tasks", "gppf_ds.tasks.nowhere"]),
        ("tasks/pets/class_path", "gppf_ds.tasks.classification.Clasification", ["tasks", "Clasification"]),
        ("tasks/pets/class_path", "collections.OrderedDict", ["tasks", "OrderedDict"]),
        ("tasks/pets/init_args/weight", 0, ["tasks.pets", "weight"]),
        ("tasks/pets/init_args/weight", -1.0, ["tasks.pets", "weight"]),
        ("tasks/pets/init_args/batch_size", 0, ["tasks.pets", "batch_size"]),
        ("tasks/pets/init_args/batch_size", "many", ["batch_size", "many"]),
        ("tasks/pets/init_args/loss_weight", 0, ["tasks.pets", "loss_weight"]),
        ("tasks/pets/init_args/bogus", 1, ["bogus"]),
        ("tasks/pets/init_args/data", "/no/such/folder", ["tasks.pets", "/no/such/folder"]),
        ("tasks/a.b", {"class_path": CLASS_PATH, "init_args": {"data": "d", "batch_size": 1}}, ["a.b"]),
        ("tasks/a b", {"class_path": CLASS_PATH, "init_args": {"data": "d", "batch_size": 1}}, ["a b"]),
        # Names that torch's containers of modules keep for themselves.
        (
            "tasks/train",
            {"class_path": CLASS_PATH, "init_args": {"data": "d", "batch_size": 1}},
            ["tasks.train", "name"],
        ),
        ("tasks/keys", {"class_path": CLASS_PATH, "init_args": {"data": "d", "batch_size": 1}}, ["tasks.keys", "name"]),
        ("tasks", {}, ["tasks"]),
        ("tasks", 3, ["tasks"]),
        ("bogus", 1, ["bogus"]),
        ("engine/bogus", 1, ["engine", "bogus"]),
        ("steps", "many", ["steps", "many"]),
        ("steps", 0, ["steps"]),
        ("seed", -1, ["seed"]),
        ("backbone/units", 0, ["backbone.units"]),
        ("backbone/routing", "firm", ["backbone.routing", "firm"]),
        ("engine/zero_stage", 4, ["engine.zero_stage", "4"]),
        ("engine/devices_per_rank", 0, ["engine.devices_per_rank"]),
        ("optimizer/warmup_steps", 10, ["optimizer.warmup_steps", "steps"]),
        ("optimizer/name", "lion", ["optimizer.name", "lion"]),
        ("controller/decay_share", 0.0, ["controller.decay_share"]),
        ("schedule/kind", "static", ["schedule.static"]),
        ("schedule", {"kind": "static", "static": ["pets", "zoo"]}, ["schedule.static", "zoo"]),
        ("loader/prefetch", 0, ["loader.prefetch"]),
        ("checkpoint/keep", 0, ["checkpoint.keep"]),
    ],
)
def test_each_mistake_is_one_sentence_that_names_the_key(recipe, tmp_path, key, value, words):
    change(recipe, key, value)
    with pytest.raises(UserError) as error:
        judge(recipe, tmp_path)
    sentence = str(error.value)
    assert "\n" not in sentence
    assert len(sentence) < 600
    for word in words:
        assert word in sentence


@pytest.mark.parametrize(("key", "value"), [("class_path", "no.such.Task"), ("init_args/batch_size", "many")])
def test_a_mistake_inside_a_task_names_the_task(recipe, tmp_path, key, value):
    change(recipe, f"tasks/farm/{key}", value)
    with pytest.raises(UserError, match="farm"):
        judge(recipe, tmp_path)


@pytest.mark.parametrize("key", ["steps", "output", "tasks"])
def test_what_is_missing_is_named(recipe, tmp_path, key):
    del recipe[key]
    with pytest.raises(UserError, match=key):
        judge(recipe, tmp_path)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"train_batch_size": 8}, ["train_batch_size", "tasks.*.batch_size"]),
        ({"zero_optimization": {"stage": 2}}, ["stage 2", "engine.zero_stage"]),
        ({"zero_optimization": {"round_robin_gradients": True}}, ["round_robin_gradients"]),
    ],
)
def test_a_contradicting_deepspeed_json_is_refused(recipe, tmp_path, settings, words):
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(settings))
    recipe["engine"] = {"deepspeed": str(path)}
    with pytest.raises(UserError) as error:
        judge(recipe, tmp_path)
    for word in words:
        assert word in str(error.value)


def test_files_that_are_missing_or_no_yaml(recipe, tmp_path):
    with pytest.raises(UserError, match=r"nowhere\.yaml") as error:
        read(["--config", str(tmp_path / "nowhere.yaml")])
    assert "\n" not in str(error.value)
    broken = tmp_path / "broken.yaml"
    broken.write_text("steps: [1\ntasks: }")
    with pytest.raises(UserError) as error:
        read(["--config", str(broken)])
    assert "\n" not in str(error.value)


# Inheritance.


def test_a_recipe_inherits_key_by_key_through_a_chain(recipe, tmp_path):
    write(recipe, tmp_path, "base.yaml")
    (tmp_path / "variants").mkdir()
    middle = {"inherit": "../base.yaml", "steps": 20, "tasks": {"farm": {"init_args": {"batch_size": 4}}}}
    write(middle, tmp_path / "variants", "middle.yaml")
    last = {
        "inherit": "middle.yaml",
        "seed": 3,
        "backbone": {"options": {"channels": [8, 8]}},
        "tasks": {"pets": None, "farm": {"init_args": {"weight": 2.0}}},
    }
    made = read(["--config", write(last, tmp_path / "variants", "last.yaml"), "--seed", "4"])
    assert (made.config.steps, made.config.seed, made.config.backbone.name) == (20, 4, "resnet18")
    assert made.config.backbone.options == {"channels": [8, 8]}  # lists replace
    assert list(made.tasks) == ["farm"]
    farm = made.tasks["farm"]
    assert (farm.batch_size, farm.weight) == (4, 2.0)
    assert "inherit" not in yaml.safe_load(made.text)
    assert yaml.safe_load(made.text)["tasks"]["farm"]["init_args"]["batch_size"] == 4


def test_another_class_drops_the_old_arguments(recipe, tmp_path):
    write(recipe, tmp_path, "base.yaml")
    depth = {"class_path": "gppf_ds.tasks.depth.Depth", "init_args": {"data": "d", "batch_size": 3}}
    content = {"inherit": "base.yaml", "tasks": {"farm": depth}}
    recipe["tasks"]["farm"]["init_args"]["image_size"] = 64  # which Depth would refuse
    write(recipe, tmp_path, "base.yaml")
    made = read(["--config", write(content, tmp_path)])
    assert type(made.tasks["farm"]).__name__ == "Depth"
    assert list(made.tasks) == ["pets", "farm"]


def test_another_backbone_drops_the_old_options_and_nothing_else(tmp_path):
    old = {"name": "resnet50", "options": {"layers": [1, 1, 1, 1]}, "units": 3}
    base = {"backbone": old, "optimizer": {"name": "sgd", "momentum": 0.5}}
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(base))
    heir = {"inherit": "base.yaml", "backbone": {"name": "resnet18"}, "optimizer": {"name": "adamw"}}
    (tmp_path / "heir.yaml").write_text(yaml.safe_dump(heir))
    content = resolve([tmp_path / "heir.yaml"]).content
    assert content["backbone"] == {"name": "resnet18", "units": 3}
    assert content["optimizer"] == {"name": "adamw", "momentum": 0.5}


def test_a_removed_task_comes_back_afresh(recipe, tmp_path):
    recipe["tasks"]["farm"]["init_args"]["image_size"] = 64
    write(recipe, tmp_path, "base.yaml")
    write({"inherit": "base.yaml", "tasks": {"farm": None}}, tmp_path, "without.yaml")
    task = {"class_path": CLASS_PATH, "init_args": {"data": "d", "batch_size": 1}}
    made = read(["--config", write({"inherit": "without.yaml", "tasks": {"farm": task}}, tmp_path)])
    assert made.tasks["farm"].image_size == 224


def test_several_files_merge_inside_tasks(recipe, tmp_path):
    first = write(recipe, tmp_path)
    second = write({"tasks": {"pets": None, "farm": {"init_args": {"weight": 3.0}}}}, tmp_path, "second.yaml")
    made = read(["--config", first, f"--config={second}"])
    assert list(made.tasks) == ["farm"]
    assert made.tasks["farm"].weight == 3.0


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"inherit": "nowhere.yaml"}, ["recipe.yaml", "inherit", "nowhere.yaml"]),
        ({"inherit": ["base.yaml"]}, ["recipe.yaml", "inherit"]),
        ({"inherit": "recipe.yaml"}, ["recipe.yaml", "circle"]),
        ({"inherit": "loop.yaml"}, ["loop.yaml", "circle", "recipe.yaml"]),
        ({"inherit": "list.yaml"}, ["list.yaml", "mapping"]),
        ({"inherit": "base.yaml", "tasks": {"pest": None}}, ["recipe.yaml", "tasks.pest", "pets"]),
        ({"inherit": "base.yaml", "engine": {"zero_stage": 9}}, ["engine.zero_stage", "recipe.yaml"]),
        ({"inherit": "base.yaml", "steps": 10}, ["optimizer.warmup_steps", "base.yaml"]),
        ({"inherit": "base.yaml", "tasks": {"pets": {"init_args": {"weight": -1}}}}, ["tasks.pets", "recipe.yaml"]),
    ],
)
def test_each_mistake_in_inheriting_names_the_file_and_the_key(recipe, tmp_path, content, words):
    recipe |= {"steps": 100, "optimizer": {"warmup_steps": 50}}
    write(recipe, tmp_path, "base.yaml")
    write({"inherit": "recipe.yaml"}, tmp_path, "loop.yaml")
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(UserError) as error:
        read(["--config", write(content, tmp_path)])
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)
