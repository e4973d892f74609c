"""Average precision of boxes and masks by pycocotools, gathered over ranks."""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gppf_ds.errors import UserError

_STATS = ("AP", "AP50", "AP75", "APs", "APm", "APl")

Detections = dict[str, Any]
"""One image's result: ``image_id`` int (Open Images: str), ``boxes`` (N, 4) x1 y1 x2 y2 in pixels of the original
image, ``scores`` (N,), ``labels`` (N,) class index from 0, ``masks`` N compressed RLE dicts of the original image's
size, or None."""


class ResultsByImage:
    """Detections of the evaluated images, each image once: what metrics share whose ground truth is in a json file."""

    def __init__(self) -> None:
        self._images: dict[int, Detections] = {}

    def update(self, predictions: Sequence[Detections], targets: Any = None) -> None:
        """Adds the results of a batch; the ground truth comes from the json, so ``targets`` are not read."""
        for prediction in predictions:
            self._images[int(prediction["image_id"])] = prediction

    def state(self) -> dict[int, Detections]:
        """The results by image id."""
        return self._images

    def merge(self, states: Sequence[dict[int, Detections]]) -> None:
        """Replaces the results by the union; an image that several ranks evaluated counts once."""
        self._images = {image: result for state in states for image, result in state.items()}

    def entries(self, category_ids: Sequence[int], iou_type: str) -> list[dict[str, Any]]:
        """All detections as a COCO result list; ``category_ids`` by label."""
        return [entry for image in self._images.values() for entry in _entries(image, category_ids, iou_type)]


class CocoMetric(ResultsByImage):
    """The COCO detection metrics (https://cocodataset.org/#detection-eval), from 0 to 1.

    Only the images that were given to :meth:`update` count, each once, also those without any detection. A metric
    for which these images hold no object is nan.

    Args:
        annotations: COCO json with the ground truth.
        classes: class names; a label is the place of the name among those of the json that are listed here.
        iou_types: "bbox", "segm" or both.
    """

    def __init__(self, annotations: Path, classes: Sequence[str], iou_types: Sequence[str] = ("bbox", "segm")) -> None:
        super().__init__()
        self.annotations = annotations
        self.classes = frozenset(classes)
        self.iou_types = tuple(iou_types)

    def compute(self) -> dict[str, float]:
        """``bbox_AP``, ``bbox_AP50``, ``bbox_AP75``, ``bbox_APs``, ``bbox_APm``, ``bbox_APl``; the same with ``segm_``.

        Raises:
            UserError: a result's image is not in the json.
        """
        from pycocotools.coco import COCO

        with contextlib.redirect_stdout(io.StringIO()):
            truth = COCO(str(self.annotations))
            unknown = self._images.keys() - truth.imgs.keys()
            if unknown:
                raise UserError(f"{self.annotations} does not list the evaluated image with id {min(unknown)}.")
            values: dict[str, float] = {}
            for iou_type in self.iou_types:
                stats = self._evaluate(truth, iou_type)
                values |= {f"{iou_type}_{name}": stat for name, stat in zip(_STATS, stats, strict=True)}
        return values

    def _evaluate(self, truth: Any, iou_type: str) -> list[float]:
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval

        category_ids = [entry["id"] for entry in truth.dataset["categories"] if entry["name"] in self.classes]
        results = self.entries(category_ids, iou_type)
        # loadRes() cannot read an empty list; a COCO of no annotations is what it would give.
        found = truth.loadRes(results) if results else COCO()
        evaluation = COCOeval(truth, found, iou_type)
        evaluation.params.imgIds = sorted(self._images)
        evaluation.params.catIds = category_ids
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
        # pycocotools writes -1 where there is no object to find.
        return [float(stat) if stat >= 0 else math.nan for stat in evaluation.stats[: len(_STATS)]]


def _entries(image: Detections, category_ids: Sequence[int], iou_type: str) -> list[dict[str, Any]]:
    """One image's detections as entries of a COCO result list; no box beside a mask, or the area would be the box's."""
    if iou_type == "segm":
        shapes = [{"segmentation": mask} for mask in image["masks"]]
    else:
        boxes = np.asarray(image["boxes"], dtype=float).reshape(-1, 4)
        corners, sizes = boxes[:, :2], boxes[:, 2:] - boxes[:, :2]
        shapes = [{"bbox": box} for box in np.hstack([corners, sizes]).tolist()]
    return [
        shape | {"image_id": image["image_id"], "category_id": category_ids[int(label)], "score": float(score)}
        for shape, label, score in zip(shapes, image["labels"], image["scores"], strict=True)
    ]
