"""Open Images AP50 against mmdet's own metric (with its eval_map and process pool) on the same random predictions."""

from __future__ import annotations

import math
import pickle
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from gppf_ds.tasks.openimages_metric import OpenImagesMetric
from gppf_ds.tasks.openmm import scope

torch.set_num_threads(1)
CLASSES = ["vehicle", "car", "bus", "tree", "fish"]
SETTINGS = {"type": "OpenImagesMetric", "iou_thrs": 0.5, "ioa_thrs": 0.5}


def relations() -> np.ndarray[Any, Any]:
    matrix = np.eye(5)
    matrix[1, 0] = matrix[2, 0] = 1  # cars and buses are vehicles
    return matrix


def data(seed: int = 0, images: int = 12) -> tuple[list[dict[str, Any]], list[Any]]:
    rng = np.random.default_rng(seed)
    results, samples = [], []
    for image in range(images):
        start = rng.uniform(0, 60, (5, 2))
        truth = np.hstack([start, start + rng.uniform(20, 60, (5, 2))]) if image else np.zeros((0, 4))
        kinds = rng.integers(0, 4, len(truth))
        instances = [
            {"bbox": box.tolist(), "bbox_label": int(kind), "ignore_flag": 0, "is_group_of": bool(rng.random() < 0.3)}
            for box, kind in zip(truth, kinds, strict=True)
        ]
        near = truth + rng.normal(0, 4, truth.shape)
        start = rng.uniform(0, 60, (20, 2))
        boxes = np.vstack([near, np.hstack([start, start + rng.uniform(5, 50, (20, 2))])]).astype(np.float32)
        labels = np.concatenate([kinds, rng.integers(0, 5, 20)])
        found = {"boxes": boxes, "scores": rng.random(len(boxes)).astype(np.float32), "labels": labels}
        results.append(found | {"image_id": f"{image:016x}", "masks": None})
        verified = rng.integers(0, 5, 2)
        samples.append(SimpleNamespace(metainfo={"instances": instances, "image_level_labels": verified}))
    return results, samples


def official(results: list[dict[str, Any]], samples: list[Any]) -> dict[str, float]:
    with scope("mmdet"):
        from mmdet.evaluation import OpenImagesMetric as Stock

        stock = Stock(iou_thrs=[0.5, 0.7], ioa_thrs=[0.5, 0.5])
        stock.dataset_meta = {"classes": CLASSES, "RELATION_MATRIX": relations(), "dataset_type": "oid_challenge"}
        for result, sample in zip(results, samples, strict=True):
            found = {"bboxes": "boxes", "scores": "scores", "labels": "labels"}
            instances = {key: torch.as_tensor(result[name]) for key, name in found.items()}
            stock.process({}, [pickle.loads(pickle.dumps(sample.metainfo)) | {"pred_instances": instances}])
        return dict(stock.compute_metrics(stock.results))


def test_equals_mmdet() -> None:
    results, samples = data()
    settings = {"type": "OpenImagesMetric", "iou_thrs": [0.5, 0.7], "ioa_thrs": [0.5, 0.5]}
    parts = [OpenImagesMetric(settings, CLASSES, relations()) for _ in range(2)]
    parts[0].update(results[:7], samples[:7])
    parts[1].update(results[5:], samples[5:])
    whole = OpenImagesMetric(settings, CLASSES, relations())
    whole.merge([pickle.loads(pickle.dumps(part.state())) for part in parts])
    values, expected = whole.compute(), official(results, samples)
    assert values["mAP"] == pytest.approx(expected["mAP"], abs=1e-7)
    assert round(values["AP50"], 3) == expected["AP50"]  # mmdet rounds these
    assert round(values["AP70"], 3) == expected["AP70"]
    assert 0.05 < values["AP50"] < 0.95


def one_image(box: list[float], label: int, instances: list[dict[str, Any]], verified: list[int]) -> float:
    metric = OpenImagesMetric(SETTINGS, CLASSES, relations())
    found = {"boxes": np.array([box], np.float32), "scores": np.array([0.9], np.float32), "labels": np.array([label])}
    meta = {"instances": instances, "image_level_labels": np.array(verified, dtype=np.int64)}
    metric.update([found | {"image_id": "0", "masks": None}], [SimpleNamespace(metainfo=meta)])
    return metric.compute()["AP50"]


def test_rules() -> None:
    bus = {"bbox": [0, 0, 10, 10], "bbox_label": 2, "ignore_flag": 0, "is_group_of": False}
    assert one_image([0, 0, 10, 10], 2, [bus], []) == pytest.approx(1)  # of bus and of vehicle
    assert one_image([0, 0, 10, 10], 0, [bus], []) == pytest.approx(0.5)  # a vehicle, though no bus
    assert one_image([0, 0, 10, 10], 4, [], [4]) != one_image([0, 0, 10, 10], 2, [bus], [])
    group = bus | {"is_group_of": True}
    assert one_image([0, 0, 4, 4], 2, [group], []) == pytest.approx(1)  # all of it is inside the group
    assert one_image([0, 0, 4, 4], 2, [bus], []) == 0
    assert math.isnan(one_image([0, 0, 4, 4], 4, [], [4]))
