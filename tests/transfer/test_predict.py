"""``gppf-ds predict``: what each task would predict in evaluation, with common beginnings of paths run once.

The first import of mmdet and mmseg takes seconds.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import write_recipe
from PIL import Image
from pycocotools import mask as rle
from pycocotools.coco import COCO

from gppf_ds.backbone.lego import Pass
from gppf_ds.data.demo import DIGIT_NAMES
from gppf_ds.errors import UserError
from gppf_ds.simt.masked import Fragment
from gppf_ds.tasks.task import Batch
from gppf_ds.train import recipe
from gppf_ds.train.checkpoint import TrainState
from gppf_ds.train.restore import Trained, build_model, load_trained, shared_tensors
from gppf_ds.train.saving import save
from gppf_ds.transfer import commands
from gppf_ds.transfer.predict import predict, require_images

torch.set_num_threads(1)
CPU = torch.device("cpu")
PATHS = {"digits": (0, 0, 0, 0, 0), "objects": (0, 1, 1, 0, 0), "regions": (0, 1, 1, 1, 0), "distance": (0, 1, 1, 0, 0)}
"""Objects and regions see the same input and share three units; digits and distance share paths, but not the input."""


def scenes(data: Path, **more: Any) -> dict[str, Any]:
    return {"data_root": str(data / "scenes"), "train_images": "images/train", "val_images": "images/val"} | more


def tasks(data: Path) -> dict[str, Any]:
    files = {split: f"annotations/instances_{split}.json" for split in ("train", "val")}
    labels = {f"{split}_labels": f"labels/{split}" for split in ("train", "val")}
    every_box = {"model.test_cfg.rcnn.score_thr": 0.0}  # the network is not trained
    kinds = {
        "digits": ("classification.Classification", {"data": str(data / "classification"), "image_size": 64}),
        "objects": (
            "detection.Detection",
            {"config": "mask_rcnn_demo.py", "overrides": every_box, **scenes(data, **files)},
        ),
        "regions": (
            "segmentation.Segmentation",
            {"config": "upernet_demo.py", "classes": "classes.json", **scenes(data, **labels)},
        ),
        "distance": ("depth.Depth", {"data": str(data / "scenes"), "head_channels": 32, "max_depth": 20.0}),
    }
    return {
        name: {"class_path": f"gppf_ds.tasks.{kind}", "init_args": {"batch_size": 2, **arguments}}
        for name, (kind, arguments) in kinds.items()
    }


@pytest.fixture(scope="module")
def run(demo_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder with a checkpoint in which all units, and the paths, have parted ways."""
    folder = tmp_path_factory.mktemp("run")
    content = {
        "output": str(folder),
        "steps": 1,
        "backbone": {"options": {"layers": [1, 1, 1, 1], "channels": [8, 8, 16, 16]}},
        "tasks": tasks(demo_data),
    }
    made = recipe.read(["--config", str(write_recipe(content, folder, "config.yaml"))])
    model, controller = build_model(made.config.backbone, made.tasks, seed=0)
    torch.manual_seed(2)
    with torch.no_grad():
        for tensor in model.backbone.state_dict().values():
            if tensor.is_floating_point():
                tensor += 0.05 * torch.rand_like(tensor)
        for name, path in PATHS.items():
            controller.logits[name][range(5), list(path)] = 1.0
    fragments = [Fragment(name, 0, parameter.detach().flatten(), {}) for name, parameter in model.named_parameters()]
    shared = shared_tensors(model, controller, torch.optim.Adam(controller.parameters()))
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=0, world_size=1)
    save(folder / "checkpoints", TrainState(7, dict.fromkeys(PATHS, 0), 0), fragments, shared, keep=1)
    dist.destroy_process_group()
    return folder


@pytest.fixture(scope="module")
def trained(run: Path) -> Trained:
    return load_trained(run, None, recipe.read_run(run))


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image that is in no data set, of a size that no task has seen."""
    pixels = np.random.default_rng(0).integers(0, 255, (9, 13, 3), dtype=np.uint8)
    path = tmp_path_factory.mktemp("foreign") / "street.png"
    Image.fromarray(pixels).resize((113, 75)).save(path)
    return path


def batch_of(trained: Trained, name: str, sample: Any) -> Batch:
    task = trained.recipe.tasks[name]
    return task.preprocess(task.collate([sample]), CPU, training=False)


def equal(one: Any, other: Any) -> bool:
    """Equality of predictions of any kind, to the last bit."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one.keys() - {"image_id"})
    return bool(np.array_equal(one, other))


@pytest.mark.parametrize("name", PATHS)
def test_an_image_file_is_read_and_predicted_as_in_evaluation(trained: Trained, demo_data: Path, name: str) -> None:
    task = trained.recipe.tasks[name]
    samples: Any = task.dataset("val")
    image = samples.entries[1][0] if name == "digits" else demo_data / "scenes/images/val/000002.jpg"
    theirs = batch_of(trained, name, samples[1])
    ours = batch_of(trained, name, task.sample(Path(image)))
    assert torch.equal(ours.images, theirs.images)

    route = trained.controller.fixed_route(name)
    [expected] = trained.model.predict(name, theirs, Pass(theirs.images, route))
    [found] = trained.model.predict(name, ours, Pass(ours.images, route))
    assert equal(found, expected)


def test_predictions_are_those_of_each_task_alone(trained: Trained, foreign: Path) -> None:
    together = predict(trained, list(PATHS), foreign, CPU)
    assert list(together.found) == list(PATHS)
    for name in PATHS:
        alone = predict(trained, [name], foreign, CPU)
        assert alone.units_run == alone.units_alone == 5
        assert equal(alone.found[name], together.found[name])
    assert together.units_alone == 20
    assert together.units_run == 17


def test_only_equal_inputs_share(trained: Trained, foreign: Path) -> None:
    """Distance has the path of objects, and digits begins like both, but their images are normalised differently."""
    assert predict(trained, ["objects", "distance"], foreign, CPU).units_run == 10
    assert predict(trained, ["digits", "regions"], foreign, CPU).units_run == 10
    assert predict(trained, ["regions", "objects"], foreign, CPU).units_run == 7


def expected(trained: Trained, name: str, image: Path) -> Any:
    """The task's prediction by :meth:`SimtModel.predict`."""
    batch = batch_of(trained, name, trained.recipe.tasks[name].sample(image))
    [prediction] = trained.model.predict(name, batch, Pass(batch.images, trained.controller.fixed_route(name)))
    return prediction


def test_the_command_writes_what_the_tasks_find(
    run: Path, trained: Trained, foreign: Path, demo_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scene = demo_data / "scenes/images/val/000001.jpg"
    code = commands.predict(["--run", str(run), str(foreign), str(scene), "--output", str(tmp_path / "out")])
    printed = capsys.readouterr().out
    assert code == 0
    assert printed.count("units run: 17 (20 without sharing)") == 2
    assert all(printed.count(f"  {name}: ") == 2 for name in PATHS)
    for image, size in ((foreign, (75, 113)), (scene, (128, 128))):
        written = json.loads((tmp_path / "out" / f"{image.stem}.json").read_text())
        assert (written["image"], written["checkpoint"], written["step"]) == (str(image), "step-00000007", 7)
        found = written["tasks"]

        ranked = expected(trained, "digits", image).tolist()
        assert [entry["name"] for entry in found["digits"]["classes"]] == [str(k) for k in ranked]
        scores = [entry["score"] for entry in found["digits"]["classes"]]
        assert scores == sorted(scores, reverse=True)
        assert 0 < sum(scores) < 1

        detections = expected(trained, "objects", image)
        objects = found["objects"]["objects"]
        assert len(objects) == len(detections["boxes"]) > 0
        order = np.argsort(-detections["scores"], kind="stable")
        assert [one["box"] for one in objects] == detections["boxes"][order].tolist()
        assert [one["score"] for one in objects] == detections["scores"][order].tolist()
        assert [one["label"] for one in objects] == detections["labels"][order].tolist()
        assert all(one["class"] == DIGIT_NAMES[one["label"]] for one in objects)
        for one, index in zip(objects, order, strict=True):
            assert rle.decode(one["mask"]).shape == size
            assert np.array_equal(rle.decode(one["mask"]), rle.decode(detections["masks"][index]))

        labels = Image.open(tmp_path / "out" / found["regions"]["labels"])
        assert labels.mode == "L"
        assert np.array_equal(np.array(labels), expected(trained, "regions", image))
        assert np.array(labels).shape == size
        assert found["regions"]["classes"] == trained.recipe.tasks["regions"].class_names  # type: ignore[attr-defined]

        drawn = Image.open(tmp_path / "out" / f"{image.stem}.drawn.png")
        assert drawn.width > 4 * drawn.height  # the image and what four tasks find in it, in a row

        depth = expected(trained, "distance", image).numpy()
        stored = np.array(Image.open(tmp_path / "out" / found["distance"]["depth"]))
        assert stored.dtype == np.uint16
        assert stored.shape == size
        assert found["distance"]["metres_per_unit"] == 0.001
        assert np.abs(stored * 0.001 - depth).max() <= 0.00051
        assert found["distance"]["min"] == pytest.approx(depth.min())
        assert found["distance"]["max"] == pytest.approx(depth.max())

    both = COCO(str(tmp_path / "out" / "objects.coco.json"))
    assert [(one["file_name"], one["width"], one["height"]) for one in both.loadImgs([1, 2])] == [
        ("street.png", 113, 75),
        ("000001.jpg", 128, 128),
    ]
    theirs = both.loadAnns(both.getAnnIds(imgIds=2))
    assert [one["score"] for one in theirs] == [one["score"] for one in objects]
    assert all(one["category_id"] == other["label"] + 1 for one, other in zip(theirs, objects, strict=True))
    assert both.annToMask(theirs[0]).sum() == theirs[0]["area"]


@pytest.mark.parametrize("name", PATHS)
def test_image_files_are_spread_over_the_split(trained: Trained, name: str) -> None:
    task = trained.recipe.tasks[name]
    everything = task.image_files("val", 10**6)
    assert len(everything) == len(set(everything)) == len(task.dataset("val"))
    assert all(file.is_file() for file in everything)
    some = task.image_files("val", 2)
    assert [everything.index(file) for file in some] == [len(everything) // 4, 3 * len(everything) // 4]


def test_some_tasks_and_the_usual_place(run: Path, foreign: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert commands.predict(["--run", str(run), str(foreign), "--task", "distance", "digits"]) == 0
    assert "objects" not in capsys.readouterr().out
    written = json.loads((run / "predictions/street.json").read_text())
    assert list(written["tasks"]) == ["distance", "digits"]


@pytest.mark.parametrize("name", PATHS)
def test_a_file_that_is_no_image_is_one_sentence(trained: Trained, tmp_path: Path, name: str) -> None:
    bad = tmp_path / "bad.jpg"
    bad.write_bytes(b"no image")
    with pytest.raises(UserError, match=rf"task '{name}' cannot read the image: .*bad\.jpg"):
        predict(trained, [name], bad, CPU)


def test_wrong_names_are_one_sentence(run: Path, foreign: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no task 'object'.*objects"):
        commands.predict(["--run", str(run), str(foreign), "--task", "object"])
    with pytest.raises(UserError, match=r"nowhere\.jpg: there is no such file"):
        commands.predict(["--run", str(run), "nowhere.jpg"])
    twin = tmp_path / "street.jpg"
    twin.touch()
    with pytest.raises(UserError, match=r"both be written to street\.json"):
        require_images([foreign, twin])


def test_depth_beyond_16_bits_of_millimetres_has_a_coarser_unit(trained: Trained) -> None:
    from gppf_ds.tasks.depth import Depth

    class Far(torch.nn.Module):
        def predict(self, *_: Any) -> list[torch.Tensor]:
            return [torch.tensor([[0.004, 79.996]])]

    [found] = Depth("nowhere", 1, max_depth=80.0).describe(Far(), [], None)  # type: ignore[arg-type]
    assert found["metres_per_unit"] == 0.01
    assert found["depth"].tolist() == [[0, 8000]]
