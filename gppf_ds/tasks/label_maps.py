"""Label maps of semantic segmentation: what is allowed in them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gppf_ds.errors import SampleError, UserError

IGNORE = 255
"""The label of pixels that neither train nor count."""


class LabelCheck:
    """A transform behind the one that reads the label map: refuses what cannot be one of the image and the head.

    Args:
        classes: number of classes of the head.

    Raises:
        SampleError: the map is not of the image's size, or has colours in place of classes.
        UserError: a pixel is neither below ``classes`` nor 255.
    """

    def __init__(self, classes: int) -> None:
        self.classes = classes

    def __call__(self, sample: dict[str, Any]) -> dict[str, Any]:
        labels, path = sample["gt_seg_map"], sample["seg_map_path"]
        if labels.shape != tuple(sample["ori_shape"][:2]):
            raise SampleError(
                f"{path} is an array of {labels.shape} and its image of {tuple(sample['ori_shape'][:2])} (height, "
                "width): a label map has one class index per pixel of its image."
            )
        check_label_map(labels, self.classes, path, sample["reduce_zero_label"])
        return sample


def check_label_map(labels: NDArray[Any], classes: int, path: str | Path, reduced: bool) -> None:
    """Raises :class:`UserError` if a label of the map is neither below ``classes`` nor 255.

    Args:
        reduced: whether the labels were reduced by 1 when they were read; the sentence names those of the file.
    """
    wrong = (labels >= classes) & (labels != IGNORE)
    if wrong.any():
        highest = int(labels[wrong].max())
        ignored = f"0 and {IGNORE}" if reduced else str(IGNORE)
        raise UserError(
            f"{path} has a pixel of class {highest + reduced} and the head has {classes} classes ({int(reduced)} to "
            f"{classes - 1 + reduced}, {ignored} = ignore): correct the label map or 'classes'."
        )


def reduce_zero_label(labels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """mmseg's reading of label maps whose classes count from 1: 0 becomes 255, 1 becomes 0, 255 stays."""
    return np.where(labels == IGNORE, labels, labels - np.uint8(1))
