"""COCO, LVIS, Objects365 and Open Images through the real task: stock and own configurations on the smoke sets."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from task_steps import batch_of, evaluated, features_of, smoke_roots
from torch import nn

from gppf_ds.data.sets.detection import SOURCES
from gppf_ds.errors import UserError
from gppf_ds.tasks.class_balance import class_balanced_weights
from gppf_ds.tasks.detection import Detection
from gppf_ds.tasks.task import FeatureInfo

torch.set_num_threads(1)
CONFIGS = [
    ("mask_rcnn_lsj_coco.py", "coco", "segm_AP"),
    ("mask-rcnn_r50_fpn_seesaw-loss_sample1e-3-ms-2x_lvis-v1.py", "lvis", "segm_AP"),
    ("faster_rcnn_lsj_objects365.py", "objects365", "bbox_AP"),
    ("cascade_rcnn_lsj_openimages.py", "openimages", "AP50"),
]
OWN = {
    "mask_rcnn_lsj_lvis.py": "lvis",
    "cascade_mask_rcnn_lsj_coco.py": "coco",
    "cascade_mask_rcnn_lsj_lvis.py": "lvis",
    "cascade_rcnn_lsj_objects365.py": "objects365",
    "faster_rcnn_lsj_openimages.py": "openimages",
}


@pytest.fixture(scope="module")
def roots(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return smoke_roots(tmp_path_factory, SOURCES)


def smoke(config: str, name: str, roots: dict[str, Path], **more: Any) -> Detection:
    task = Detection(config, 4, data_root="/nowhere", source=name, **more)
    task.use_data(roots[name])
    task.shrink()
    return task


@pytest.mark.parametrize(("config", "name", "headline"), CONFIGS)
def test_one_step_and_one_evaluation(
    config: str, name: str, headline: str, roots: dict[str, Path], backbone: nn.Module, info: FeatureInfo
) -> None:
    task = smoke(config, name, roots)
    task.check()
    assert task.headline == headline
    assert task.batch_size == 2
    head = task.build_head(info)
    batch = batch_of(task, "train", training=True)
    assert min(batch.images.shape[2:]) >= 64
    assert max(batch.images.shape[2:]) <= 224
    terms = head.loss(features_of(backbone, batch.images), batch.targets)
    assert all(torch.isfinite(term) for term in terms.values())
    sum(terms.values(), torch.zeros(())).backward()
    assert [name for name, p in head.named_parameters() if p.grad is None] == []
    assert len(task.dataset("val")) == 4
    assert 0 <= evaluated(task, head, backbone, (0, 3))[headline] <= 1  # the last image has no objects


@pytest.mark.parametrize("config", OWN)
def test_own_configurations_fit_their_data(config: str, roots: dict[str, Path]) -> None:
    smoke(config, OWN[config], roots).check()


@pytest.mark.parametrize(("config", "name", "headline"), CONFIGS)
def test_the_truth_as_prediction_scores_one(config: str, name: str, headline: str, roots: dict[str, Path]) -> None:
    task = smoke(config, name, roots)
    metric, samples = task.metric(), task.dataset("val")
    for index in range(len(samples)):
        sample = samples[index]["data_samples"]
        truth = sample.gt_instances  # of the original image: mmdet reads it after resizing
        boxes = truth.bboxes.tensor
        found: dict[str, Any] = {"image_id": sample.img_id, "boxes": boxes.numpy(), "labels": truth.labels.numpy()}
        metric.update([found | {"scores": np.ones(len(boxes), np.float32), "masks": []}], [sample])
    task.iou_types = ["bbox"]
    if hasattr(metric, "iou_types"):
        metric.iou_types = ("bbox",)
    assert metric.compute()["AP50" if headline == "AP50" else "bbox_AP"] == pytest.approx(1, abs=0.02)


def test_open_images_reads_the_published_files(roots: dict[str, Path]) -> None:
    task = smoke("faster_rcnn_lsj_openimages.py", "openimages", roots)
    assert len(task.class_names) == 500
    inner: Any = task.dataset("val").inner  # type: ignore[attr-defined]
    relations = inner.metainfo["RELATION_MATRIX"]
    assert [np.flatnonzero(relations[label]).tolist() for label in (0, 3, 4)] == [[0, 3], [3], [4]]
    entries = [inner.get_data_info(index) for index in range(len(inner))]
    assert [len(entry["instances"]) > 0 for entry in entries] == [True, True, True, False]
    assert entries[3]["image_level_labels"].tolist() == [4]  # nothing in it, and one class looked for
    assert sum(one["is_group_of"] for entry in entries for one in entry["instances"]) == 1
    boxes = inner[0]["data_samples"].instances
    assert all(8 < one["bbox"][2] <= 128 for one in boxes)  # pixels of the original image


def test_open_images_in_mmdets_files(roots: dict[str, Path], tmp_path: Path) -> None:
    """Boxes as txt, classes with numbers, the hierarchy as an array; the pickle of image sizes is not read."""
    source = roots["openimages"]
    image = sorted((source / "OpenImages/validation").iterdir())[0]
    (tmp_path / "boxes.txt").write_text(f"validation/{image.name}\n# 1\n2\n2 0.1 0.2 0.5 0.6 0\n1 0.2 0.2 0.4 0.4 1\n")
    (tmp_path / "classes.csv").write_text("/m/b,bus,2\n/m/a,car,1\n")
    with (tmp_path / "tree.np").open("wb") as file:
        np.save(file, np.eye(3))
    places = {
        "ann_file": str(tmp_path / "boxes.txt"),
        "label_file": str(tmp_path / "classes.csv"),
        "hierarchy_file": str(tmp_path / "tree.np"),
        "image_level_ann_file": None,
    }
    overrides = {f"val_dataloader.dataset.{key}": value for key, value in places.items()}
    config = "faster-rcnn_r50_fpn_32xb2-1x_openimages-challenge.py"
    task = Detection(config, 2, data_root=str(source), overrides=overrides)
    assert task.class_names == ["car", "bus"]
    instances = task.dataset("val")[0]["data_samples"].instances
    assert [(one["bbox_label"], one["is_group_of"]) for one in instances] == [(1, False), (0, True)]
    np.testing.assert_allclose(instances[0]["bbox"], [12.8, 19.2, 64, 57.6])
    (tmp_path / "tree.np").write_bytes(b"\x80\x04K\x01.")
    with pytest.raises(UserError, match=r"tree\.np"):
        task.metric()
    with (tmp_path / "tree.np").open("wb") as file:
        np.save(file, np.eye(3))
    (tmp_path / "boxes.txt").write_text("a.jpg\n# 1\n1\n1 0.1 0.2\n")
    with pytest.raises(UserError, match=r"boxes\.txt:\d"):
        task.dataset("val")


def test_a_bad_row_stops_with_its_line(roots: dict[str, Path], tmp_path: Path) -> None:
    SOURCES["openimages"].smoke(tmp_path)
    path = tmp_path / "challenge2019/challenge-2019-train-detection-bbox.csv"
    path.write_text(path.read_text() + "x,/m/none,0,1,0,1,0\n")
    task = smoke("faster_rcnn_lsj_openimages.py", "openimages", {"openimages": tmp_path})
    with pytest.raises(UserError, match=rf"bbox\.csv:{len(path.read_text().splitlines())} "):
        task.dataset("train")


def test_class_balanced_loss(roots: dict[str, Path], info: FeatureInfo) -> None:
    assert class_balanced_weights([5, 5], 0.9)[:-1] == [1.0, 1.0]
    rare, common, background = class_balanced_weights([1, 1000], 0.999)
    assert rare / common == pytest.approx((1 - 0.999**1000) / (1 - 0.999))
    assert rare / background == pytest.approx(1 / (1 - 0.999))
    task = smoke("mask_rcnn_lsj_lvis.py", "lvis", roots, class_balance=0.999)
    weights = task.build_head(info).model.roi_head.bbox_head.loss_cls.class_weight
    assert len(weights) == 1204
    content = json.loads((roots["lvis"] / "annotations/lvis_v1_train.json").read_text())
    seen = {one["category_id"] - 1 for one in content["annotations"]}
    assert max(weights[label] for label in seen) <= weights[1000]
    assert math.isclose(sum(weights[:-1]) / 1203, 1)
    with pytest.raises(UserError, match="class_balance"):
        Detection("mask_rcnn_lsj_lvis.py", 2, class_balance=1.0)
    with pytest.raises(UserError, match="softmax"):
        smoke("retinanet_r50_fpn_1x_coco.py", "coco", roots, class_balance=0.9).build_head(info)


def test_another_data_set_class_is_refused(roots: dict[str, Path]) -> None:
    with pytest.raises(UserError, match="CityscapesDataset"):
        Detection("faster-rcnn_r50_fpn_1x_cityscapes.py", 2, data_root=str(roots["coco"])).check()


def test_photographs_in_the_official_layout(tmp_path: Path) -> None:
    """COCO photographs with crowds: the truth moved a little scores as pycocotools itself scores it."""
    real = Path(__file__).parents[3] / "shared/data/coco200"
    if not real.is_dir():
        pytest.skip("no photographs in ../shared/data/coco200")
    (tmp_path / "annotations").mkdir()
    for split in ("train", "val"):
        annotations = real / f"annotations/instances_{split}.json"
        (tmp_path / f"annotations/instances_{split}2017.json").write_bytes(annotations.read_bytes())
        (tmp_path / f"{split}2017").symlink_to(real / "images" / split)
    assert SOURCES["coco"].count(tmp_path) == {"train images": 100, "val images": 100}
    assert SOURCES["coco"].faults(tmp_path, 3) == []
    task = Detection("mask_rcnn_lsj_coco.py", 2, data_root=str(tmp_path), source="coco")
    task.check()
    assert len(task.dataset("val")) == 100
    content = json.loads((tmp_path / "annotations/instances_val2017.json").read_text())
    ids = [category["id"] for category in content["categories"]]
    rng, metric, entries = np.random.default_rng(0), task.metric(), []
    metric.iou_types = ("bbox",)  # type: ignore[attr-defined]
    for image in content["images"]:
        truth = [one for one in content["annotations"] if one["image_id"] == image["id"]]
        boxes = np.array([one["bbox"] for one in truth], np.float32).reshape(-1, 4)
        boxes += rng.normal(0, 4, boxes.shape).astype(np.float32)
        scores = rng.random(len(boxes)).astype(np.float32)
        kinds = [one["category_id"] for one in truth]
        entries += [
            {"image_id": image["id"], "category_id": kind, "bbox": box.tolist(), "score": float(score)}
            for kind, box, score in zip(kinds, boxes, scores, strict=True)
        ]
        corners = np.hstack([boxes[:, :2].astype(float), boxes[:, :2].astype(float) + boxes[:, 2:].astype(float)])
        labels = np.array([ids.index(kind) for kind in kinds], int)
        found = {"image_id": image["id"], "boxes": corners, "scores": scores, "labels": labels, "masks": None}
        metric.update([found], None)
    expected = _pycocotools(tmp_path / "annotations/instances_val2017.json", entries)
    values = metric.compute()
    for name, value in zip(("AP", "AP50", "AP75", "APs", "APm", "APl"), expected, strict=False):
        assert values[f"bbox_{name}"] == pytest.approx(value, abs=1e-6)
    assert 0.2 < values["bbox_AP"] < 0.9


def _pycocotools(annotations: Path, entries: list[dict[str, Any]]) -> list[float]:
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    truth = COCO(str(annotations))
    evaluation = COCOeval(truth, truth.loadRes(entries), "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    return list(evaluation.stats)
