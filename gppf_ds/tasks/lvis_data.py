"""LVIS for mmdet with the classes that were judged in every image.

This module imports mmdet: import it inside functions, in :func:`gppf_ds.tasks.openmm.scope`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from mmdet.datasets import CocoDataset, LVISV05Dataset, LVISV1Dataset

from gppf_ds.errors import UserError
from gppf_ds.tasks.federated import JUDGED


class _Judged(CocoDataset):
    def parse_data_info(self, raw_data_info: dict[str, Any]) -> dict[str, Any]:
        """See mmdet's; with :data:`JUDGED`. Raises :class:`UserError` for an image that does not tell."""
        image = raw_data_info["raw_img_info"]
        try:
            looked_for = {one["category_id"] for one in raw_data_info["raw_ann_info"]} | {*image["neg_category_ids"]}
            known = looked_for - {*image["not_exhaustive_category_ids"]}
            labels = sorted(self.cat2label[category] for category in known)
        except KeyError as error:
            raise UserError(
                f"{self.ann_file} has no {error} for image {image['id']}: give the json file of LVIS, or set federated "
                "to False in overrides."
            ) from error
        return {**super().parse_data_info(raw_data_info), JUDGED: np.array(labels, dtype=np.int64)}


class JudgedLVISV1(_Judged, LVISV1Dataset):
    """Stands for mmdet's ``LVISV1Dataset``."""


class JudgedLVISV05(_Judged, LVISV05Dataset):
    """Stands for mmdet's ``LVISV05Dataset``."""
