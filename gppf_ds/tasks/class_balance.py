"""Class-balanced loss for long-tailed sets: rare classes weigh more."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from gppf_ds.errors import UserError


def class_balanced_weights(counts: Sequence[int], beta: float) -> list[float]:
    """(1 - beta) / (1 - beta^n) per class of n objects, scaled to a mean of 1 (Cui et al., CVPR 2019, equation 12).

    A class without objects weighs as one with a single object. The background of a detector has no end of objects; it
    weighs 1 - beta on that scale, about as much as a frequent class, so that rare classes gain and objects as a whole
    do not lose against it. On a long-tailed set most proposals then weigh far below 1 and the loss is that much
    smaller.

    Args:
        counts: objects per class.
        beta: at least 0, below 1; 0 weighs all classes the same, towards 1 by the inverse of their counts.

    Returns:
        One weight per class and, last, that of the background.
    """
    effective = 1.0 - beta ** np.maximum(np.asarray(counts, dtype=float), 1.0)
    weights = (1.0 - beta) / np.append(effective, 1.0)
    return (weights / weights[:-1].mean()).tolist()


def object_counts(annotations: Path, classes: Sequence[str]) -> list[int]:
    """Objects per class in a json of COCO's format, for example LVIS's.

    Raises:
        UserError: the file is not in that format.
    """
    try:
        content = json.loads(annotations.read_bytes())
        names = {category["id"]: category["name"] for category in content["categories"]}
        counts = dict.fromkeys(classes, 0)
        for annotation in content["annotations"]:
            name = names[annotation["category_id"]]
            if name in counts:
                counts[name] += 1
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{annotations} cannot be counted ({error!r}): give a json in COCO's format.") from error
    return list(counts.values())
