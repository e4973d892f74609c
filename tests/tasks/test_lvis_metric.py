"""LVIS AP against the official lvis-api on the same random predictions, written to a file as its users do."""

from __future__ import annotations

import json
import math
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pycocotools import mask as rle

from gppf_ds.errors import UserError
from gppf_ds.tasks.lvis_metric import LvisMetric, load_lvis

SIZE = 220
CLASSES = 6


@pytest.fixture(scope="module")
def lvis_json(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve images, six classes with gaps in their ids; some verified absent, some not exhaustively labelled."""
    rng = np.random.default_rng(0)
    images: list[dict[str, Any]] = []
    objects: list[dict[str, Any]] = []
    for image in range(1, 13):
        present = set()
        for _ in range(0 if image == 12 else 5):
            x, y, w, h = (int(v) for v in (*rng.integers(0, 60, 2), *rng.integers(10, 150, 2)))
            kind = int(rng.integers(0, CLASSES))
            present.add(2 * kind + 1)
            objects.append(
                {
                    "id": len(objects) + 1,
                    "image_id": image,
                    "category_id": 2 * kind + 1,
                    "bbox": [x, y, w, h],
                    "area": w * h,
                    "segmentation": [[x, y, x + w, y, x + w, y + h, x, y + h]],
                }
            )
        absent = [2 * kind + 1 for kind in range(CLASSES) if 2 * kind + 1 not in present]
        facts = {"neg_category_ids": absent[:2], "not_exhaustive_category_ids": sorted(present)[:1]}
        images.append({"id": image, "width": SIZE, "height": SIZE} | facts)
    categories = [{"id": 2 * k + 1, "name": str(k), "frequency": "rcf"[k % 3]} for k in range(CLASSES)]
    path = tmp_path_factory.mktemp("lvis") / "lvis.json"
    path.write_text(json.dumps({"images": images, "annotations": objects, "categories": categories}))
    return path


def predictions(path: Path, images: list[int]) -> list[dict[str, Any]]:
    """Objects moved a little, and boxes at random: more than 300 per image."""
    rng = np.random.default_rng(1)
    content = json.loads(path.read_text())
    results = []
    for image in images:
        truth = [one for one in content["annotations"] if one["image_id"] == image]
        corners = np.array([one["bbox"] for one in truth], float).reshape(-1, 4)
        corners[:, 2:] += corners[:, :2]
        near = corners + rng.normal(0, 3, corners.shape)
        start = rng.uniform(0, 80, (320, 2))
        boxes = np.vstack([near, np.hstack([start, start + rng.uniform(8, 70, (320, 2))])]).astype(np.float32)
        scores = rng.random(len(boxes)).astype(np.float32)
        scores[len(truth) :] *= 0.6
        right = [(one["category_id"] - 1) // 2 for one in truth]
        masks = []
        for x1, y1, x2, y2 in boxes.clip(0, SIZE).round().astype(int):
            mask = np.zeros((SIZE, SIZE), np.uint8, order="F")
            mask[y1:y2, x1:x2] = 1
            masks.append(rle.encode(mask))
        results.append(
            {
                "image_id": image,
                "boxes": boxes,
                "scores": scores,
                "labels": np.array([*right, *rng.integers(0, CLASSES, 320)]),
                "masks": masks,
            }
        )
    return results


def official(path: Path, results: list[dict[str, Any]], iou_type: str, folder: Path) -> dict[str, float]:
    entries = []
    for one in results:
        for box, score, label, mask in zip(one["boxes"], one["scores"], one["labels"], one["masks"], strict=True):
            entry = {"image_id": one["image_id"], "category_id": 2 * int(label) + 1, "score": float(score)}
            x1, y1, x2, y2 = (float(v) for v in box)
            if iou_type == "bbox":
                entry["bbox"] = [x1, y1, x2 - x1, y2 - y1]
            else:
                entry["segmentation"] = {"size": mask["size"], "counts": mask["counts"].decode()}
            entries.append(entry)
    (folder / "results.json").write_text(json.dumps(entries))
    evaluation = load_lvis().LVISEval(str(path), str(folder / "results.json"), iou_type)
    evaluation.run()
    return dict(evaluation.get_results())


def test_equals_the_official_evaluator(lvis_json: Path, tmp_path: Path) -> None:
    results = predictions(lvis_json, list(range(1, 13)))
    parts = [LvisMetric(lvis_json) for _ in range(2)]
    parts[0].update(results[:7])
    parts[1].update(results[5:])  # two images twice, as the last batch of a rank may have them
    whole = LvisMetric(lvis_json)
    whole.merge([pickle.loads(pickle.dumps(part.state())) for part in parts])
    values = whole.compute()
    for iou_type in ("bbox", "segm"):
        expected = official(lvis_json, results, iou_type, tmp_path)
        names = ("AP", "AP50", "AP75", "APs", "APm", "APl", "APr", "APc", "APf")
        assert {name: values[f"{iou_type}_{name}"] for name in names} == {name: expected[name] for name in names}
        assert 0.05 < values[f"{iou_type}_AP"] < 0.95


def test_what_nobody_looked_for_does_not_count(lvis_json: Path) -> None:
    """A sure detection of a class counts against where it is verified to be absent, and nowhere else."""
    content = json.loads(lvis_json.read_text())
    image = next(one for one in content["images"] if one["neg_category_ids"])
    present = {one["category_id"] for one in content["annotations"] if one["image_id"] == image["id"]}
    everything = {2 * kind + 1 for kind in range(CLASSES)}
    unknown = sorted(everything - present - set(image["neg_category_ids"]))
    results = predictions(lvis_json, list(range(1, 13)))
    before = LvisMetric(lvis_json, ["bbox"])
    before.update(results)
    expected = before.compute()
    for categories, changes in ((unknown, False), (image["neg_category_ids"], True)):
        if not categories:
            continue
        added = [dict(one) for one in results]
        mine = next(one for one in added if one["image_id"] == image["id"])
        mine["boxes"] = np.vstack([mine["boxes"][:100], [[0, 0, 150, 150]]])
        mine["scores"] = np.append(mine["scores"][:100], 2.0)
        mine["labels"] = np.append(mine["labels"][:100], (categories[0] - 1) // 2)
        shorter = [dict(one) for one in added]
        next(one for one in shorter if one["image_id"] == image["id"]).update(
            {key: mine[key][:100] for key in ("boxes", "scores", "labels")}
        )
        metrics = [LvisMetric(lvis_json, ["bbox"]) for _ in range(2)]
        metrics[0].update(added)
        metrics[1].update(shorter)
        assert (metrics[0].compute() != metrics[1].compute()) is changes
    assert expected["bbox_AP"] > 0


def test_nothing_found_and_nothing_evaluated(lvis_json: Path) -> None:
    nothing = {"boxes": np.zeros((0, 4)), "scores": np.zeros(0), "labels": np.zeros(0, int), "masks": []}
    metric = LvisMetric(lvis_json)
    assert all(math.isnan(value) for value in metric.compute().values())
    metric.update([nothing | {"image_id": 1}])
    values = metric.compute()
    assert values["bbox_AP"] == values["segm_AP"] == 0
    empty = LvisMetric(lvis_json)
    empty.update([nothing | {"image_id": 12}])
    assert math.isnan(empty.compute()["bbox_AP"])
    metric.update([nothing | {"image_id": 99}])
    with pytest.raises(UserError, match="id 99"):
        metric.compute()
