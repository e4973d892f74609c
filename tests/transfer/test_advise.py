"""``gppf-ds advise`` on networks whose best path is known by construction."""

from __future__ import annotations

import colorsys
import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import write_recipe
from PIL import Image

from gppf_ds.config import LoaderConfig
from gppf_ds.errors import UserError
from gppf_ds.simt.masked import Fragment
from gppf_ds.tasks.classification import Classification
from gppf_ds.tasks.depth import Depth
from gppf_ds.tasks.detection import Detection
from gppf_ds.tasks.segmentation import Segmentation
from gppf_ds.tasks.task import Task
from gppf_ds.train import recipe
from gppf_ds.train.checkpoint import TrainState
from gppf_ds.train.restore import Trained, build_model, shared_tensors
from gppf_ds.train.saving import save
from gppf_ds.transfer import commands
from gppf_ds.transfer.advise import WIDTH, Advice, Target, _narrowed, advise, table

torch.set_num_threads(1)
CPU = torch.device("cpu")
PATHS = {"sees": (0, 0, 0, 0, 0), "blind": (1, 0, 0, 0, 0), "twin": (0, 0, 0, 0, 0), "grey": (2, 0, 0, 0, 0)}
"""The stems of three units: one as it was made, one whose weights are 0, one that sees brightness but no colour."""


def network(folder: Path) -> Trained:
    """Four tasks, never trained: what a path knows is up to its stem."""
    tasks = {
        name: {
            "class_path": "gppf_ds.tasks.classification.Classification",
            "init_args": {"data": "nowhere", "batch_size": 2, "classes": 3},
        }
        for name in PATHS
    }
    options = {"layers": [1, 1, 1, 1], "channels": [8, 8, 16, 16]}
    content = {"output": str(folder), "steps": 1, "backbone": {"options": options, "units": 3}, "tasks": tasks}
    made = recipe.read(["--config", str(write_recipe(content, folder, "config.yaml"))])
    model, controller = build_model(made.config.backbone, made.tasks, seed=0)
    units: Any = model.backbone.layers[0].units  # type: ignore[union-attr]
    with torch.no_grad():
        for parameter in units["1"].parameters():
            parameter.zero_()
        first = next(parameter for parameter in units["2"].parameters() if parameter.dim() == 4)
        first.copy_(first.mean(1, keepdim=True))
        for name, path in PATHS.items():
            controller.logits[name][range(5), list(path)] = 1.0
    return Trained(folder / "checkpoints", 7, model.eval(), controller, made)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return network(tmp_path_factory.mktemp("run"))


def target(name: str, task: Task, samples: int = 60, seed: int = 0) -> Target:
    return Target(name, task, samples, seed, LoaderConfig(workers=0), CPU)


def demo_task(data: Path, name: str) -> Task:
    scenes = {"data_root": str(data / "scenes"), "train_images": "images/train", "val_images": "images/val"}
    match name:
        case "digits":
            return Classification(str(data / "classification"), 16, image_size=64)
        case "distance":
            return Depth(str(data / "scenes"), 4, max_depth=20.0, flip_test=True)
        case "regions":
            labels = {"train_labels": "labels/train", "val_labels": "labels/val"}
            return Segmentation("upernet_demo.py", 4, classes="classes.json", **labels, **scenes)
    files = {split: f"annotations/instances_{split}.json" for split in ("train", "val")}
    return Detection("mask_rcnn_demo.py", 4, **files, **scenes)


@pytest.fixture(scope="module")
def colours(tmp_path_factory: pytest.TempPathFactory) -> Classification:
    """Red and blue images, with as much noise of their brightness."""
    folder, random = tmp_path_factory.mktemp("colours"), np.random.default_rng(0)
    for split, count in (("train", 30), ("val", 20)):
        for label, name in enumerate(("red", "blue")):
            (folder / split / name).mkdir(parents=True)
            for index in range(count):
                pixels = random.integers(60, 140, (64, 64, 3)) * random.uniform(0.6, 1.4)
                pixels[..., 2 * label] += 40
                pixels[..., 2 - 2 * label] -= 40
                image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
                image.save(folder / split / name / f"{index}.png")
    return Classification(str(folder), 10, image_size=64)


@pytest.fixture(scope="module")
def told_by_colour(demo_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo data with every digit in its own colour: shapes are too much for a network that was never trained."""
    folder = tmp_path_factory.mktemp("told") / "demo"
    shutil.copytree(demo_data, folder)
    for split in ("train", "val"):
        for number, name in enumerate(sorted((folder / "classification" / split).iterdir())):
            for file in name.iterdir():
                tint(file, [(number, (slice(None), slice(None)))])
        boxes = json.loads((folder / f"scenes/annotations/instances_{split}.json").read_text())
        for image in boxes["images"]:
            own = [one for one in boxes["annotations"] if one["image_id"] == image["id"]]
            places = [[round(value) for value in one["bbox"]] for one in own]
            parts = [(slice(y, y + height), slice(x, x + width)) for x, y, width, height in places]
            numbers = [one["category_id"] for one in own]
            tint(folder / "scenes/images" / split / image["file_name"], list(zip(numbers, parts, strict=True)))
    return folder


def tint(file: Path, parts: list[tuple[int, tuple[slice, slice]]]) -> None:
    """Mixes the colour of a number into a part of the image, for each of ``parts``."""
    pixels = np.array(Image.open(file).convert("RGB")).astype(float)
    for number, part in parts:
        pixels[part] = 0.3 * pixels[part] + 0.7 * 255 * np.array(colorsys.hsv_to_rgb(number / 10, 1.0, 1.0))
    Image.fromarray(pixels.astype(np.uint8)).save(file)


def score(advice: Advice, task: str) -> float:
    return next(row.score for row in advice.rows if task in row.tasks)


@pytest.mark.parametrize("name", ["digits", "objects", "regions", "distance"])
def test_for_every_kind_of_task_the_blind_path_knows_nothing(trained: Trained, told_by_colour: Path, name: str) -> None:
    before = {key: value.clone() for key, value in trained.model.state_dict().items()}
    # With seed 0 the class that the blind path names for every object is none of the five validation images': error 0.
    found = advise(trained, target(name, demo_task(told_by_colour, name), seed=1))
    assert [row.score for row in found.rows] == sorted((row.score for row in found.rows), reverse=True)
    assert score(found, "blind") == found.rows[-1].score
    chance = {"digits": 0.1, "objects": 0.2, "regions": 0.34, "distance": 0.01}[name]
    assert score(found, "blind") <= chance
    assert score(found, "sees") > chance + 0.1
    assert ["sees", "twin"] in [row.tasks for row in found.rows]
    assert (found.task, found.kind) == (name, type(demo_task(told_by_colour, name)).__name__)
    assert found.measure == ("R^2" if name == "distance" else "balanced accuracy")
    assert found.images == ({"train": 60, "val": 20} if name == "digits" else {"train": 16, "val": 5})
    assert all(value > 0 for row in found.rows for value in (row.error, row.parameters, row.flops, row.seconds))
    assert all(torch.equal(before[key], value) for key, value in trained.model.state_dict().items())


def test_the_path_that_sees_colours_is_advised_for_colours(trained: Trained, colours: Classification) -> None:
    found = advise(trained, target("colours", colours))
    assert found.rows[0].tasks == ["sees", "twin"]
    assert found.rows[0].score > 0.95
    assert found.rows[0].first == 1
    assert score(found, "grey") < 0.75
    assert score(found, "blind") == 0.5
    assert not any(row.tied for row in found.rows)
    printed = table(found)
    assert "Advice: the path of sees, twin." in printed
    assert "fitted to 60 vectors of 60 training images, judged on 40 of 40 validation images" in printed
    own, units = found.rows[0], trained.model.backbone.layers
    per_path = [sum(p.numel() for p in layer.units["0"].parameters()) for layer in units]  # type: ignore[union-attr,operator]
    assert own.parameters == sum(per_path)
    assert list(own.path.values()) == [0] * 5


def test_advice_is_a_function_of_the_seed(trained: Trained, demo_data: Path) -> None:
    task = demo_task(demo_data, "distance")

    def rows(seed: int) -> list[dict[str, Any]]:
        return [asdict(row) | {"seconds": 0} for row in advise(trained, target("distance", task, 8, seed)).rows]

    assert rows(0) == rows(0)
    torch.manual_seed(4)
    assert rows(0) != rows(1)


def test_paths_that_nothing_tells_apart_are_tied(trained: Trained, demo_data: Path) -> None:
    """Noise for labels: no path is better, and the table says so."""
    digits = demo_task(demo_data, "digits")

    class Guess(Classification):
        def probe(self, features: Any, targets: Any) -> Any:
            found = super().probe(features, targets)
            found.labels.random_(0, 3)
            return found

    found = advise(trained, target("guess", Guess(str(digits.data_folder()), 16, image_size=64)))
    assert all(row.tied for row in found.rows[1:])
    assert "not surely better (=) than that of" in table(found)


def test_wide_maps_are_narrowed_alike() -> None:
    vectors = torch.randn(5, 3 * WIDTH)
    narrow = _narrowed(vectors)
    assert narrow.shape == (5, WIDTH)
    assert torch.allclose(torch.cdist(narrow, narrow), torch.cdist(vectors, vectors), rtol=0.15)
    assert torch.allclose(_narrowed(vectors[2:]), narrow[2:], atol=1e-4)
    assert torch.equal(_narrowed(vectors[:, :WIDTH]), vectors[:, :WIDTH])


@pytest.fixture(scope="module")
def run(trained: Trained) -> Path:
    """The network as a run's folder."""
    folder = trained.path.parent
    model, controller = trained.model, trained.controller
    fragments = [Fragment(name, 0, parameter.detach().flatten(), {}) for name, parameter in model.named_parameters()]
    shared = shared_tensors(model, controller, torch.optim.Adam(controller.parameters()))
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=0, world_size=1)
    save(trained.path, TrainState(7, dict.fromkeys(PATHS, 0), 0), fragments, shared, keep=1)
    dist.destroy_process_group()
    return folder


def new_recipe(colours: Classification, folder: Path, data: str | None = None) -> Path:
    tasks = {
        name: {
            "class_path": "gppf_ds.tasks.classification.Classification",
            "init_args": {"data": data or str(colours.data), "batch_size": 10, "image_size": 64},
        }
        for name in ("colours", "again")
    }
    start = {"source": "nowhere", "mode": "fixed", "path": "sees"}  # that it is not there yet is no matter
    return write_recipe(
        {"output": "runs/new", "steps": 5, "loader": {"workers": 1}, "tasks": tasks, "finetune": start}, folder
    )


def test_the_command_prints_and_writes(
    run: Path, colours: Classification, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = new_recipe(colours, tmp_path)
    arguments = ["--run", str(run), "--config", str(file), "--tasks", "colours", "--samples", "30"]
    assert commands.advise([*arguments, "--output", str(tmp_path / "advice")]) == 0
    printed = capsys.readouterr().out
    assert "Advice: the path of sees, twin." in printed
    assert str(tmp_path / "advice/advise.json") in printed
    written = json.loads((tmp_path / "advice/advise.json").read_text())
    assert (written["checkpoint"], written["step"]) == ("step-00000007", 7)
    assert list(written["targets"]) == ["colours"]
    found = written["targets"]["colours"]
    assert found["images"] == {"train": 30, "val": 30}
    assert found["rows"][0]["tasks"] == ["sees", "twin"]
    assert set(written["notes"]) <= set(found["rows"][0])


def test_mistakes_are_one_sentence(run: Path, trained: Trained, colours: Classification, tmp_path: Path) -> None:
    file = str(new_recipe(colours, tmp_path))
    with pytest.raises(UserError, match=r"has no task 'colour': choose from again, colours"):
        commands.advise(["--run", str(run), "--config", file, "--tasks", "colour"])
    missing = str(new_recipe(colours, tmp_path, data="nowhere"))
    with pytest.raises(UserError, match=r"tasks\.again: .*nowhere"):
        commands.advise(["--run", str(run), "--config", missing])
    with pytest.raises(UserError, match="is no run"):
        commands.advise(["--run", str(tmp_path), "--config", file])
    with pytest.raises(SystemExit):
        commands.advise(["--run", str(run), "--config", file, "--samples", "0"])
    with pytest.raises(UserError, match=r"tasks\.colours: .*raise --samples"):
        advise(trained, target("colours", colours, samples=1))

    class Bare(Classification):
        probe = Task.probe  # type: ignore[assignment]

    with pytest.raises(UserError, match="Bare cannot be probed"):
        advise(trained, target("bare", Bare(str(colours.data), 4, image_size=64)))


def test_a_diverged_path_is_one_sentence(colours: Classification, tmp_path: Path) -> None:
    broken = network(tmp_path)
    units: Any = broken.model.backbone.layers[0].units  # type: ignore[union-attr]
    with torch.no_grad():
        next(units["2"].parameters()).fill_(float("nan"))
    with pytest.raises(UserError, match="the path of grey gives values that are not finite"):
        advise(broken, target("colours", colours, samples=10))
