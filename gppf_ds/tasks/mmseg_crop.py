"""mmseg's random crop, faster.

This module imports mmseg: import it inside functions, in :func:`gppf_ds.tasks.openmm.scope`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from mmcv.transforms.utils import cache_randomness
from mmseg.datasets.transforms import RandomCrop

TRIES = 10
"""Other places that are tried for a crop in which one class has too large a share, as in mmseg."""


class CountingCrop(RandomCrop):
    """The same crops from the same random numbers: where mmseg sorts all labels of a crop, this counts them."""

    @cache_randomness
    def crop_bbox(self, results: dict[str, Any]) -> tuple[int, int, int, int]:
        """(top, bottom, left, right) of a crop in which no class has ``cat_max_ratio`` of the labelled pixels."""
        box = self._place(results["img"].shape)
        for _ in range(TRIES if self.cat_max_ratio < 1 else 0):
            counts = np.bincount(self.crop(results["gt_seg_map"], box).ravel())
            counts[self.ignore_index : self.ignore_index + 1] = 0
            if np.count_nonzero(counts) > 1 and counts.max() / counts.sum() < self.cat_max_ratio:
                break
            box = self._place(results["img"].shape)
        return box

    def _place(self, shape: tuple[int, ...]) -> tuple[int, int, int, int]:
        margins = [max(side - crop, 0) for side, crop in zip(shape[:2], self.crop_size, strict=True)]
        top, left = [np.random.randint(0, margin + 1) for margin in margins]
        return top, top + self.crop_size[0], left, left + self.crop_size[1]
