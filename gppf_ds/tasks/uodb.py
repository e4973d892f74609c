"""Detection on a set of the universal object detection benchmark, scored as Pascal VOC 2012 is."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gppf_ds.errors import UserError
from gppf_ds.tasks.coco_metric import ResultsByImage
from gppf_ds.tasks.detection import Detection

IOU = 0.5


class UODBDetection(Detection):
    """Boxes on one of the ten sets, in its official layout, after ``gppf-ds prepare-data``.

    What differs from :class:`Detection` is where the data come from and the metric. COCO's AP50 would not do: it stops
    at 100 detections per image, of which WIDER FACE has images with more faces, it reads the precision at 101 recalls,
    and a detection inside a region to ignore is forgiven however small it is.

    Args:
        source: name of the set, for example ``uodb_kitti``.
        data: its root.
        batch_size: images per device.
        config, overrides: see :class:`Detection`; every head gets the number of classes of the set.
        weight, loss_weight: see :class:`Task`.
    """

    def __init__(
        self,
        source: str,
        data: str,
        batch_size: int,
        config: str = "faster-rcnn_r50_fpn_1x_coco.py",
        weight: float = 1.0,
        loss_weight: float = 1.0,
        overrides: dict[str, Any] | None = None,
    ) -> None:
        self.root = Path(data)
        where = _places(source, self.root)
        super().__init__(
            config,
            batch_size,
            weight,
            loss_weight,
            data_root=data,
            train=where["train"],
            val=where["val"],
            train_images=where["train_images"],
            val_images=where["val_images"],
            overrides=overrides,
            source=source,
        )

    @property
    def headline(self) -> str:  # type: ignore[override]
        """Mean over the classes of the average precision at an overlap of 0.5."""
        return "AP50"

    def check(self) -> None:
        """See :meth:`Detection.check`; before that, whether the set was prepared."""
        for split in ("train", "val"):
            path = Path(self.places[split])
            if not path.is_file():
                raise UserError(f"{path} does not exist: run gppf-ds prepare-data {self.source} {self.root} once.")
        super().check()

    def use_data(self, root: Path) -> None:
        """See :meth:`Task.use_data`; the set there is prepared already."""
        super().use_data(root)
        self.root = root
        self.places = _places(str(self.source), root)

    def metric(self) -> VOCMetric:
        """AP50 on the val json."""
        return VOCMetric(Path(self.places["val"]), self.class_names)


def _places(source: str, root: Path) -> dict[str, str]:
    from gppf_ds.data.sets.uodb import places

    return {key: str(path) for key, path in places(source, root).items()}


class VOCMetric(ResultsByImage):
    """The detection metric of Pascal VOC 2010 to 2012 (Everingham et al., IJCV 2015, section 4.2), from 0 to 1.

    The area under the whole precision-recall curve, precision made monotonic, per class; then the mean of the classes
    that have objects. A detection matches the object of its class that it overlaps most, if by half of their union;
    of two that match one object the second is wrong; one that matches an object to ignore does not count. Only the
    images that were given to :meth:`update` count, each once.

    Args:
        annotations: COCO json with the ground truth; ``iscrowd`` marks what is to be ignored.
        classes: names in the order of the labels.
    """

    iou_types = ("bbox",)
    """What an exported configuration evaluates."""

    def __init__(self, annotations: Path, classes: Sequence[str]) -> None:
        super().__init__()
        self.annotations = annotations
        self.classes = list(classes)

    def compute(self) -> dict[str, float]:
        """``AP50``, and ``AP50_CLASS`` for each class; nan where there is no object to find.

        Raises:
            UserError: a result's image is not in the json.
        """
        truth = self._truth()
        unknown = self._images.keys() - truth.keys()
        if unknown:
            raise UserError(f"{self.annotations} does not list the evaluated image with id {min(unknown)}.")
        by_class = {name: self._average_precision(truth, label) for label, name in enumerate(self.classes)}
        known = [value for value in by_class.values() if not math.isnan(value)]
        mean = sum(known) / len(known) if known else math.nan
        return {"AP50": mean} | {f"AP50_{name}": value for name, value in by_class.items()}

    def _truth(self) -> dict[int, NDArray[np.float32]]:
        """By image id one row per object: x1, y1, x2, y2, label, whether it is to be ignored."""
        content = json.loads(self.annotations.read_bytes())
        labels = {entry["id"]: self.classes.index(entry["name"]) for entry in content["categories"]}
        rows: dict[int, list[list[float]]] = {image["id"]: [] for image in content["images"]}
        for entry in content["annotations"]:
            x, y, width, height = entry["bbox"]
            row = [x, y, x + width, y + height, labels[entry["category_id"]], entry["iscrowd"]]
            rows[entry["image_id"]].append(row)
        return {image: np.array(row, dtype=np.float32).reshape(-1, 6) for image, row in rows.items()}

    def _average_precision(self, truth: dict[int, NDArray[np.float32]], label: int) -> float:
        from gppf_ds.tasks.openmm import scope

        with scope("mmdet"):  # imports it quietly
            from mmdet.evaluation.functional.mean_ap import average_precision, tpfp_default

        scores: list[Any] = []
        right: list[Any] = []
        wrong: list[Any] = []
        wanted = 0
        for image, found in self._images.items():
            objects = truth[image][truth[image][:, 4] == label]
            ignored = objects[:, 5] == 1
            wanted += int((~ignored).sum())
            chosen = found["labels"] == label
            boxes = np.hstack([found["boxes"][chosen].reshape(-1, 4), found["scores"][chosen].reshape(-1, 1)])
            hit, miss = tpfp_default(boxes, objects[~ignored, :4], objects[ignored, :4], IOU)
            scores.append(boxes[:, 4])
            right.append(hit[0])
            wrong.append(miss[0])
        if not wanted:
            return math.nan
        order = np.argsort(-np.concatenate(scores), kind="stable")
        hits, misses = np.concatenate(right)[order].cumsum(), np.concatenate(wrong)[order].cumsum()
        return float(average_precision(hits / wanted, hits / np.maximum(hits + misses, np.finfo(np.float32).eps)))
