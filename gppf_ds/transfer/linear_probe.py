"""How well a linear model reads labels from frozen features, and how far a few hundred samples can tell.

The model is ridge regression, onto one target per class where labels are classes; its strength is chosen by
cross-validation within the training samples. All feature maps weigh alike in its penalty, however many channels they
have. The error comes from the bootstrap over validation images, since the vectors of one image are no independent
samples.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gppf_ds.seeding import generator

STRENGTHS = (0.01, 0.1, 1.0, 10.0, 100.0)
"""Of the ridge penalty, for vectors of an expected squared length of 1."""

FOLDS = 3
RESAMPLES = 1000


@dataclass(frozen=True)
class Vectors:
    """Samples of one split."""

    values: list[NDArray[np.float32]]
    """(M, C_i): one for each feature map."""
    labels: NDArray[Any]
    """(M,): integers are classes."""
    images: NDArray[np.int64]
    """(M,): the image of each."""

    @property
    def are_classes(self) -> bool:
        """Whether the labels are classes, not real numbers."""
        return self.labels.dtype.kind == "i"


def fit_and_predict(train: Vectors, val: Vectors) -> NDArray[Any]:
    """The labels (M,) that a linear model, fitted to ``train``, predicts for ``val``.

    Classes weigh alike, however many samples they have. ``train`` needs two images and, of classes, two of these.
    """
    from sklearn.linear_model import RidgeClassifierCV, RidgeCV
    from sklearn.model_selection import GroupKFold

    known, asked = _joined(train, val)
    folds = GroupKFold(min(FOLDS, len(np.unique(train.images)))).split(known, groups=train.images)
    if train.are_classes:
        model = RidgeClassifierCV(STRENGTHS, scoring="balanced_accuracy", cv=list(folds), class_weight="balanced")
    else:
        model = RidgeCV(STRENGTHS, cv=list(folds))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a rare class can be missing from a fold
        fitted = model.fit(known, train.labels)
    predicted = np.asarray(fitted.predict(asked))
    # Beyond the labels it has seen a linear model knows no end: one strange image would decide the score.
    return predicted if train.are_classes else predicted.clip(train.labels.min(), train.labels.max())


def _joined(train: Vectors, val: Vectors) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Both (M, sum of C_i), standardised by ``train``, and every map scaled to the same total variance."""
    from sklearn.preprocessing import StandardScaler

    scaled = []
    for one, other in zip(train.values, val.values, strict=True):
        scaler = StandardScaler().fit(one.astype(np.float64))
        length = np.sqrt(one.shape[1] * len(train.values))
        scaled.append([scaler.transform(part.astype(np.float64)) / length for part in (one, other)])
    known, asked = (np.concatenate(parts, axis=1) for parts in zip(*scaled, strict=True))
    return known, asked


def scores(val: Vectors, predictions: Sequence[NDArray[Any]], seed: int) -> NDArray[np.float64]:
    """Balanced accuracy (the mean recall of the classes that occur), or R^2 for real numbers.

    Args:
        val: what was predicted.
        predictions: (M,) each, of several models.
        seed: of the resampling.

    Returns:
        (models, 1 + RESAMPLES): the score over all images, then over as many images drawn with replacement, each time
        the same ones for all models. nan where all labels drawn are alike.
    """
    _, images = np.unique(val.images, return_inverse=True)
    count = int(images.max()) + 1
    drawn = generator(seed, "bootstrap").multinomial(count, np.full(count, 1 / count), size=RESAMPLES)
    weights = np.concatenate([np.ones((1, count)), drawn])
    score = _balanced_accuracy if val.are_classes else _r_squared
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.stack([score(val.labels, one, images, weights) for one in predictions])


def _balanced_accuracy(
    labels: NDArray[Any], predicted: NDArray[Any], images: NDArray[Any], weights: NDArray[Any]
) -> NDArray[np.float64]:
    classes, index = np.unique(labels, return_inverse=True)
    seen, hit = np.zeros((2, weights.shape[1], len(classes)))
    np.add.at(seen, (images, index), 1)
    np.add.at(hit, (images, index), predicted == labels)
    recall = (weights @ hit) / (weights @ seen)
    return np.asarray(np.nanmean(recall, axis=1))


def _r_squared(
    labels: NDArray[Any], predicted: NDArray[Any], images: NDArray[Any], weights: NDArray[Any]
) -> NDArray[np.float64]:
    y = labels.astype(np.float64)
    per_image = np.zeros((weights.shape[1], 4))
    np.add.at(per_image, images, np.stack([np.ones_like(y), y, y**2, (y - predicted) ** 2], axis=1))
    count, total, squares, error = (weights @ per_image).T
    return np.asarray(1 - error / (squares - total**2 / count))
