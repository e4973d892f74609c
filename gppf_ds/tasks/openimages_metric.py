"""The Open Images challenge metric by mmdet's own parts, gathered over ranks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from gppf_ds.tasks.coco_metric import Detections, ResultsByImage
from gppf_ds.tasks.openmm import scope

_IMAGE = dict[str, Any]
"""One image after expansion along the hierarchy: ``labels`` (G,), ``boxes`` (G, 4), ``group_of`` (G,) of the ground
truth; ``found_labels`` (N,), ``found`` (N, 5) boxes with scores of the detections."""


class OpenImagesMetric(ResultsByImage):
    """AP50 of the Open Images challenge (https://storage.googleapis.com/openimages/web/evaluation.html), from 0 to 1.

    As mmdet's metric of this name has it: boxes and detections count for all parents of their class too, detections of
    classes that nobody verified in the image do not count, and any number of detections with most of their area in a
    group-of box are one hit. The mean is over the classes that the evaluated images hold; nan if there are none.

    Args:
        settings: ``val_evaluator`` of an mmdet configuration (thresholds and switches of its OpenImagesMetric).
        classes: class names by label.
        relations: (classes, classes), entry (i, j) nonzero where class j is i or a parent of i.
    """

    _images: dict[Any, _IMAGE]

    def __init__(self, settings: Mapping[str, Any], classes: Sequence[str], relations: np.ndarray[Any, Any]) -> None:
        super().__init__()
        with scope("mmdet"):
            from mmdet.evaluation import OpenImagesMetric as Expansion

            self._expansion = Expansion(
                **{key: value for key, value in settings.items() if key not in ("type", "_scope_")}
            )
        self._expansion.dataset_meta = {"classes": classes, "RELATION_MATRIX": relations}

    def update(self, predictions: Sequence[Detections], targets: Any) -> None:  # type: ignore[override]
        """Adds a batch; ``targets`` are data samples with ``instances`` and, if known, ``image_level_labels``."""
        for prediction, sample in zip(predictions, targets, strict=True):
            self._images[str(prediction["image_id"])] = self._expand(prediction, sample.metainfo)

    def _expand(self, prediction: Detections, meta: Mapping[str, Any]) -> _IMAGE:
        import torch

        # mmdet's data set of the challenge writes is_group_ofs, its metric reads is_group_of.
        instances = [
            one | {"is_group_of": one.get("is_group_of", one.get("is_group_ofs", False))} for one in meta["instances"]
        ]
        shapes = {"bboxes": "boxes", "scores": "scores", "labels": "labels"}
        found = {name: torch.as_tensor(prediction[key]) for name, key in shapes.items()}
        sample: dict[str, Any] = {"instances": instances, "pred_instances": found}
        sample["image_level_labels"] = meta.get("image_level_labels")
        self._expansion.process({}, [sample])
        truth, by_class = self._expansion.results.pop()
        return {
            "labels": truth["labels"],
            "boxes": truth["bboxes"],
            "group_of": truth["gt_is_group_ofs"],
            "found_labels": np.repeat(np.arange(len(by_class)), [len(rows) for rows in by_class]),
            "found": np.concatenate(by_class),
        }

    def compute(self) -> dict[str, float]:
        """``AP50`` (one per IoU threshold of the settings) and their mean ``mAP``."""
        thresholds = list(zip(self._expansion.iou_thrs, self._expansion.ioa_thrs, strict=True))
        values = {f"AP{int(iou * 100):02d}": self._mean_ap(iou, ioa) for iou, ioa in thresholds}
        return values | {"mAP": sum(values.values()) / len(values)}

    def _mean_ap(self, iou: float, ioa: float | None) -> float:
        """The mean of mmdet's ``eval_map``, class by class, without its process pool and its 500 lists per image."""
        precisions = [
            self._average_precision(images, label, iou, ioa) for label, images in self._images_by_class().items()
        ]
        known = [value for value in precisions if value is not None]
        return sum(known) / len(known) if known else math.nan

    def _images_by_class(self) -> dict[int, list[_IMAGE]]:
        """For every class that occurs, the images with an object or a detection of it, in the order of update."""
        by_class: dict[int, list[_IMAGE]] = {}
        for image in self._images.values():
            for label in np.union1d(image["labels"], image["found_labels"]):
                by_class.setdefault(int(label), []).append(image)
        return by_class

    def _average_precision(self, images: list[_IMAGE], label: int, iou: float, ioa: float | None) -> float | None:
        """None for a class without objects."""
        from mmdet.evaluation.functional.mean_ap import average_precision, tpfp_openimages

        hits, misses, scores, objects = [], [], [], 0
        for image in images:
            own = image["labels"] == label
            found = image["found"][image["found_labels"] == label]
            groups = image["group_of"][own] if self._expansion.use_group_of else None
            done = tpfp_openimages(
                *(found, image["boxes"][own], np.empty((0, 4), np.float32), iou),
                gt_bboxes_group_of=groups,
                use_group_of=self._expansion.use_group_of,
                ioa_thr=ioa,
            )
            hits.append(done[0])
            misses.append(done[1])
            scores.append(done[2][:, -1])
            objects += int(own.sum())
        if not objects:
            return None
        order = np.argsort(-np.concatenate(scores))
        hit, miss = (np.cumsum(np.hstack(parts)[0, order]) for parts in (hits, misses))
        tiny = np.finfo(np.float32).eps
        return float(average_precision(hit / objects, hit / np.maximum(hit + miss, tiny)))
