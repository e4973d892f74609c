"""The prepared sets through the real task and mmdet: training, prediction, the VOC metric, the recipes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from task_steps import batch_of, evaluated
from torch import nn

from gppf_ds.data.sets import uodb
from gppf_ds.data.sets.uodb import SOURCES, places
from gppf_ds.errors import UserError
from gppf_ds.tasks.openmm import scope
from gppf_ds.tasks.task import FeatureInfo
from gppf_ds.tasks.uodb import UODBDetection, VOCMetric
from gppf_ds.train.inherit import resolve

torch.set_num_threads(1)
RECIPES = Path(__file__).parents[2] / "ds_configs" / "recipes" / "uodb"
NARROW = {
    "model.neck.out_channels": 16,
    "model.rpn_head.in_channels": 16,
    "model.rpn_head.feat_channels": 16,
    "model.roi_head.bbox_roi_extractor.out_channels": 16,
    "model.roi_head.bbox_head.in_channels": 16,
    "model.roi_head.bbox_head.fc_out_channels": 32,
    "model.test_cfg.rcnn.score_thr": 0.0,
}


@pytest.mark.parametrize("name", SOURCES)
def test_recipe_trains_and_evaluates_on_the_smoke_set(
    name: str, tmp_path: Path, backbone: nn.Module, info: FeatureInfo
) -> None:
    short = name.removeprefix("uodb_")
    content = resolve([RECIPES / f"{short}.yaml"]).content
    assert list(content["tasks"]) == [short]
    arguments = content["tasks"][short]["init_args"]
    assert arguments["source"] == name
    halved = short in ("widerface", "lisa", "deeplesion")
    assert arguments.get("overrides", {}).get("model.rpn_head.anchor_generator.scales", [8]) == ([4] if halved else [8])
    task = UODBDetection(**arguments | {"overrides": arguments.get("overrides", {}) | NARROW})
    with pytest.raises(UserError, match=f"run gppf-ds prepare-data {name} {arguments['data']} once"):
        task.check()
    SOURCES[name].smoke(tmp_path)
    task.use_data(tmp_path)
    task.shrink()
    task.check()
    assert task.headline == "AP50"
    assert tuple(task.class_names) == uodb.CONVERSIONS[name].classes
    torch.manual_seed(0)
    head = task.build_head(info)
    batch = batch_of(task, "train", training=True)
    assert max(batch.images.shape[2:]) <= 256
    assert sum(len(sample.gt_instances) for sample in batch.targets) > 0
    terms = head.loss(backbone(batch.images), batch.targets)
    sum(terms.values(), torch.zeros(())).backward()
    assert all(torch.isfinite(term) for term in terms.values())
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in head.parameters())
    images = len(task.dataset("val"))
    assert images == len(json.loads(places(name, tmp_path)["val"].read_bytes())["images"])
    assert 0 <= evaluated(task, head, backbone, range(images))["AP50"] <= 1


def test_regions_to_ignore_reach_training_as_such(tmp_path: Path) -> None:
    SOURCES["uodb_kitti"].smoke(tmp_path)
    task = UODBDetection("uodb_kitti", str(tmp_path), 2)
    sample = task.dataset("train")[0]["data_samples"]
    assert len(sample.gt_instances) == 2
    assert len(sample.ignored_instances) == 4  # a van, and a DontCare region for each of the classes


def truth(path: Path, objects: dict[int, list[tuple[int, list[float], int]]]) -> Path:
    """A json with objects (class id, x1 y1 x2 y2, ignored) by image id."""
    entries: list[dict[str, Any]] = []
    for image, listed in objects.items():
        for category, (x1, y1, x2, y2), ignored in listed:
            box = {"bbox": [x1, y1, x2 - x1, y2 - y1], "category_id": category, "iscrowd": ignored}
            entries.append(box | {"id": len(entries) + 1, "image_id": image})
    categories = [{"id": 1, "name": "a"}, {"id": 2, "name": "b"}]
    images = [{"id": image} for image in objects]
    path.write_text(json.dumps({"images": images, "annotations": entries, "categories": categories}))
    return path


def found(image: int, *rows: tuple[float, int, list[float]]) -> dict[str, Any]:
    """Detections (score, label, box)."""
    return {
        "image_id": image,
        "scores": np.array([row[0] for row in rows], dtype=np.float32),
        "labels": np.array([row[1] for row in rows], dtype=np.int64),
        "boxes": np.array([row[2] for row in rows], dtype=np.float32).reshape(-1, 4),
        "masks": None,
    }


def test_metric_by_hand(tmp_path: Path) -> None:
    first, second, hidden = [0.0, 0, 10, 10], [20.0, 0, 30, 10], [40.0, 0, 60, 20]
    path = truth(tmp_path / "val.json", {1: [(1, first, 0), (1, second, 0), (1, hidden, 1)], 2: [(1, first, 0)], 3: []})
    metric = VOCMetric(path, ["a", "b"])
    # By score: right, the same object again (wrong), the one to ignore (does not count), right, wrong.
    metric.update([found(1, (0.9, 0, first), (0.8, 0, first), (0.7, 0, hidden), (0.6, 0, second))])
    metric.update([found(2), found(3, (0.5, 0, first))])
    values = metric.compute()
    # Three objects; precision 1 up to recall 1/3, then 2/3 up to 2/3.
    assert values["AP50"] == values["AP50_a"] == pytest.approx(1 / 3 + 2 / 3 / 3)
    assert np.isnan(values["AP50_b"])
    # A small box inside the region to ignore is wrong here, as in VOC; COCO would forgive it.
    metric.update([found(1, (0.95, 0, [41.0, 1, 46, 6]), (0.9, 0, first), (0.6, 0, second))])
    assert metric.compute()["AP50"] == pytest.approx(2 / 3 * 2 / 3)
    metric.update([found(9)])
    with pytest.raises(UserError, match="does not list the evaluated image with id 9"):
        metric.compute()


def test_metric_sees_more_than_a_hundred_detections(tmp_path: Path) -> None:
    boxes = [[20.0 * (i % 20), 20.0 * (i // 20), 20.0 * (i % 20) + 10, 20.0 * (i // 20) + 10] for i in range(250)]
    metric = VOCMetric(truth(tmp_path / "val.json", {1: [(1, box, 0) for box in boxes]}), ["a", "b"])
    metric.update([found(1, *((0.9 - i / 1000, 0, box) for i, box in enumerate(boxes)))])
    assert metric.compute()["AP50"] == pytest.approx(1)


def test_metric_equals_mmdets_over_ranks(tmp_path: Path) -> None:
    """Random objects and detections, half of the images on each of two ranks and one on both."""
    rng = np.random.default_rng(0)
    objects: dict[int, list[tuple[int, list[float], int]]] = {}
    detections = []
    for image in range(1, 13):
        corners = rng.uniform(0, 60, (int(rng.integers(0, 6)), 2))
        boxes = np.hstack([corners, corners + rng.uniform(10, 30, corners.shape)])
        objects[image] = [(int(rng.integers(1, 3)), box.tolist(), int(rng.random() < 0.2)) for box in boxes]
        guessed = np.vstack([boxes + rng.normal(0, 2, boxes.shape), boxes + 40, boxes + rng.normal(0, 2, boxes.shape)])
        detections.append(found(image, *((float(rng.random()), int(rng.integers(0, 2)), list(b)) for b in guessed)))
    path = truth(tmp_path / "val.json", objects)
    ranks = [VOCMetric(path, ["a", "b"]) for _ in range(2)]
    ranks[0].update(detections[:7])
    ranks[1].update(detections[6:])
    ranks[0].merge([rank.state() for rank in ranks])

    with scope("mmdet"):
        from mmdet.evaluation.functional import eval_map
    results = []
    annotations = []
    for image, entry in zip(objects, detections, strict=True):
        rows = np.hstack([entry["boxes"], entry["scores"][:, None]])
        results.append([rows[entry["labels"] == label] for label in range(2)])
        listed = [(np.array(b, np.float32), c - 1, i) for c, b, i in objects[image]]
        annotation: dict[str, Any] = {}
        for ignored, suffix in ((0, ""), (1, "_ignore")):
            chosen = [(box, label) for box, label, flag in listed if flag == ignored]
            annotation[f"bboxes{suffix}"] = np.array([box for box, _ in chosen], np.float32).reshape(-1, 4)
            annotation[f"labels{suffix}"] = np.array([label for _, label in chosen], np.int64)
        annotations.append(annotation)
    expected, _ = eval_map(results, annotations, iou_thr=0.5, logger="silent", nproc=1)
    assert 0.1 < expected < 0.9
    assert ranks[0].compute()["AP50"] == pytest.approx(expected, abs=1e-6)


def test_table_8(tmp_path: Path) -> None:
    steps = {"kitti": 4000, "widerface": 26000, "voc": 18000, "lisa": 18000, "dota": 26000, "kitchen": 13500}
    steps |= {"watercolor": 1800, "clipart": 1800, "comic": 1800, "deeplesion": 50000}
    assert {path.stem for path in RECIPES.glob("*.yaml")} == {"_base", *steps}
    for name, number in steps.items():
        content = resolve([RECIPES / f"{name}.yaml"]).content
        assert content["steps"] == number
        assert content["output"] == f"runs/uodb/{name}"
        assert yaml.safe_load(yaml.safe_dump(content["optimizer"]))["weight_decay"] == 4e-5
