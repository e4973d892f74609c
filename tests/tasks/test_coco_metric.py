"""CocoMetric against pycocotools used directly, and on ground truth given as predictions."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pycocotools import mask as rle
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from gppf_ds.errors import UserError
from gppf_ds.tasks.coco_metric import CocoMetric

COCO200 = Path(__file__).parents[2].parent / "shared" / "data" / "coco200" / "annotations" / "instances_val.json"
SIZE = 64


def box_mask(box: list[int]) -> dict[str, Any]:
    x, y, width, height = box
    mask = np.zeros((SIZE, SIZE), dtype=np.uint8, order="F")
    mask[y : y + height, x : x + width] = 1
    return rle.encode(mask)


@pytest.fixture
def truth(tmp_path: Path) -> Path:
    """Six images with two boxes each, the last without any; category ids with gaps."""
    rng = np.random.default_rng(0)
    annotations = []
    for image in range(1, 6):
        for _ in range(2):
            box = [*rng.integers(0, 20, 2).tolist(), *rng.integers(26, 40, 2).tolist()]
            x, y, w, h = box
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image,
                    "category_id": int(rng.choice([3, 7])),
                    "bbox": box,
                    "area": w * h,
                    "iscrowd": 0,
                    "segmentation": [[x, y, x + w, y, x + w, y + h, x, y + h]],
                }
            )
    path = tmp_path / "truth.json"
    images = [{"id": i, "file_name": f"{i}.png", "width": SIZE, "height": SIZE} for i in range(1, 7)]
    categories = [{"id": 3, "name": "cat"}, {"id": 7, "name": "dog"}]
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    return path


def predictions(truth: Path) -> list[dict[str, Any]]:
    """The boxes moved a little, some under another class, with random scores."""
    rng = np.random.default_rng(1)
    content = json.loads(truth.read_text())
    results = []
    for image in content["images"]:
        boxes, labels = [], []
        for entry in (entry for entry in content["annotations"] if entry["image_id"] == image["id"]):
            boxes.append((np.array(entry["bbox"]) + rng.integers(0, 3, 4)).tolist())
            labels.append([3, 7].index(entry["category_id"]) ^ int(rng.random() < 0.2))
        xywh = np.array(boxes, dtype=np.float32).reshape(-1, 4)
        results.append(
            {
                "image_id": image["id"],
                "boxes": np.hstack([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]]),
                "scores": rng.random(len(boxes)).astype(np.float32),
                "labels": np.array(labels, dtype=np.int64),
                "masks": [box_mask(box) for box in boxes],
            }
        )
    return results


@pytest.mark.parametrize("iou_type", ["bbox", "segm"])
def test_equals_cocoeval(truth: Path, iou_type: str) -> None:
    results = predictions(truth)
    entries = []
    for result in results:
        for k, label in enumerate(result["labels"]):
            x1, y1, x2, y2 = result["boxes"][k].tolist()
            entry = {"image_id": result["image_id"], "category_id": [3, 7][label], "score": float(result["scores"][k])}
            shape = {"bbox": [x1, y1, x2 - x1, y2 - y1]} if iou_type == "bbox" else {"segmentation": result["masks"][k]}
            entries.append(entry | shape)
    coco = COCO(str(truth))
    evaluation = COCOeval(coco, coco.loadRes(entries), iou_type)
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()

    metric = CocoMetric(truth, ["cat", "dog"])
    metric.update(results)
    values = metric.compute()
    found = [values[f"{iou_type}_{name}"] for name in ("AP", "AP50", "AP75", "APs", "APm")]
    assert found == pytest.approx([float(stat) for stat in evaluation.stats[:5]])
    assert min(found) >= 0
    assert 0.05 < found[0] < 0.95
    assert math.isnan(values[f"{iou_type}_APl"])  # no object above 96 x 96 pixels


def test_ranks_are_merged_and_an_image_counts_once(truth: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = predictions(truth)
    whole, first, second = (CocoMetric(truth, ["cat", "dog"]) for _ in range(3))
    whole.update(results)
    first.update(results[:4])
    second.update(results[3:])
    first.merge([first.state(), second.state()])
    assert first.compute() == pytest.approx(whole.compute(), nan_ok=True)
    assert capsys.readouterr().out == ""


def test_only_updated_images_count_and_an_empty_one_does(truth: Path) -> None:
    results = predictions(truth)
    perfect = CocoMetric(truth, ["cat", "dog"], ["bbox"])
    content = json.loads(truth.read_text())
    for result in results[:2]:
        own = [entry for entry in content["annotations"] if entry["image_id"] == result["image_id"]]
        xywh = np.array([entry["bbox"] for entry in own], dtype=np.float32)
        exact = {
            "boxes": np.hstack([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]]),
            "labels": np.array([[3, 7].index(entry["category_id"]) for entry in own]),
            "scores": np.ones(len(own)),
            "masks": None,
        }
        perfect.update([result | exact])
    assert perfect.compute()["bbox_AP"] == pytest.approx(1)
    nothing = {"boxes": np.zeros((0, 4)), "scores": np.zeros(0), "labels": np.zeros(0, dtype=int), "masks": []}
    perfect.update([{"image_id": 3} | nothing])
    assert perfect.compute()["bbox_AP"] < 0.9


def test_no_detection_at_all_gives_zero(truth: Path) -> None:
    metric = CocoMetric(truth, ["cat", "dog"])
    nothing = {"boxes": np.zeros((0, 4)), "scores": np.zeros(0), "labels": np.zeros(0, dtype=int), "masks": []}
    metric.update([{"image_id": image} | nothing for image in range(1, 7)])
    values = metric.compute()
    assert values["bbox_AP"] == values["segm_AP"] == values["bbox_AP50"] == 0


def test_labels_count_only_the_named_classes(truth: Path) -> None:
    metric = CocoMetric(truth, ["dog"], ["bbox"])
    metric.update([result | {"labels": np.zeros_like(result["labels"])} for result in predictions(truth)])
    assert 0 < metric.compute()["bbox_AP"] < 1


def test_unknown_image_is_named(truth: Path) -> None:
    metric = CocoMetric(truth, ["cat", "dog"])
    metric.update([predictions(truth)[0] | {"image_id": 99}])
    with pytest.raises(UserError, match="99"):
        metric.compute()


@pytest.mark.skipif(not COCO200.exists(), reason="needs the public data pack beside the repository")
def test_ground_truth_as_predictions_is_perfect_on_real_data() -> None:
    coco = COCO(str(COCO200))
    names = [category["name"] for category in coco.dataset["categories"]]
    ids = [category["id"] for category in coco.dataset["categories"]]
    metric = CocoMetric(COCO200, names)
    for image in coco.imgs:
        own = [entry for entry in coco.loadAnns(coco.getAnnIds(image)) if not entry["iscrowd"]]
        xywh = np.array([entry["bbox"] for entry in own], dtype=np.float64).reshape(-1, 4)
        metric.update(
            [
                {
                    "image_id": image,
                    "boxes": np.hstack([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]]),
                    "scores": np.ones(len(own)),
                    "labels": [ids.index(entry["category_id"]) for entry in own],
                    "masks": [coco.annToRLE(entry) for entry in own],
                }
            ]
        )
    values = metric.compute()
    assert values["bbox_AP"] == pytest.approx(1)
    assert values["segm_AP"] == pytest.approx(1)
