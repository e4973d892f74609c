"""Average precision on LVIS by the official lvis-api, gathered over ranks."""

from __future__ import annotations

import importlib
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from gppf_ds.errors import UserError
from gppf_ds.tasks.coco_metric import ResultsByImage

_STATS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "APr", "APc", "APf")


def load_lvis() -> Any:
    """The package ``lvis``, fit for today's numpy and without the log handler that it gives to the whole process.

    Raises:
        UserError: it is not installed.
    """
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    try:
        lvis = importlib.import_module("lvis")
    except ImportError as error:
        raise UserError("LVIS needs the package lvis: pip install lvis.") from error
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)
    logging.getLogger("lvis").setLevel(logging.ERROR)
    # lvis 0.5.3 says np.float, which numpy 1.24 took away.
    importlib.import_module("lvis.eval").np = SimpleNamespace(**{**vars(np), "float": float})  # type: ignore[attr-defined]
    return lvis


class LvisMetric(ResultsByImage):
    """The LVIS metrics (Gupta et al., arXiv 1908.03195, section 4; https://www.lvisdataset.org/challenge_2020).

    At most 300 detections per image count. Those of a category that is neither in the image nor verified to be absent
    (``neg_category_ids``) do not count, nor do unmatched ones of a category that is not exhaustively annotated there
    (``not_exhaustive_category_ids``). Values are from 0 to 1. Only the images that were given to :meth:`update` count,
    also those without any detection; a metric for which they hold no object is nan.

    Args:
        annotations: LVIS json with the ground truth; a label is a place in its list of categories.
        iou_types: "bbox", "segm" or both.
    """

    def __init__(self, annotations: Path, iou_types: Sequence[str] = ("bbox", "segm")) -> None:
        super().__init__()
        self.annotations = annotations
        self.iou_types = tuple(iou_types)

    def compute(self) -> dict[str, float]:
        """``bbox_AP``, AP50, AP75, APs, APm, APl and of rare, common, frequent categories APr, APc, APf; ``segm_`` too.

        Raises:
            UserError: a result's image is not in the json, or ``lvis`` is not installed.
        """
        truth = load_lvis().LVIS(str(self.annotations))
        unknown = self._images.keys() - truth.imgs.keys()
        if unknown:
            raise UserError(f"{self.annotations} does not list the evaluated image with id {min(unknown)}.")
        if not self._images:
            return {f"{iou_type}_{name}": math.nan for iou_type in self.iou_types for name in _STATS}
        values: dict[str, float] = {}
        for iou_type in self.iou_types:
            results = self._evaluate(truth, iou_type)
            # lvis writes -1 where there is no object to find.
            stats = {name: float(results[name]) for name in _STATS}
            values |= {f"{iou_type}_{name}": stat if stat >= 0 else math.nan for name, stat in stats.items()}
        return values

    def _evaluate(self, truth: Any, iou_type: str) -> dict[str, float]:
        lvis = load_lvis()
        category_ids = truth.get_cat_ids()
        # lvis cannot read an empty list; a box without area matches nothing.
        nothing = {"image_id": min(self._images), "category_id": category_ids[0], "bbox": [0, 0, 0, 0], "score": 0.0}
        found = lvis.LVISResults(truth, self.entries(category_ids, iou_type) or [nothing])
        evaluation = lvis.LVISEval(truth, found, iou_type)
        evaluation.params.img_ids = sorted(self._images)
        evaluation.run()
        return dict(evaluation.get_results())
