"""The linear probe finds what is linear, and its scores and errors are what they are said to be."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from sklearn.metrics import balanced_accuracy_score, r2_score

from gppf_ds.transfer.linear_probe import RESAMPLES, Vectors, fit_and_predict, scores

DIRECTIONS = np.random.default_rng(9).normal(size=(3, 20))


def blobs(images: int, each: int = 4, noise: float = 1.0, seed: int = 0) -> Vectors:
    """Three classes around three points."""
    random = np.random.default_rng(seed)
    labels = random.integers(3, size=images * each)
    values = DIRECTIONS[labels] + noise * random.normal(size=(len(labels), 20))
    return Vectors([values.astype(np.float32)], labels, np.arange(images).repeat(each))


def real(images: int, seed: int = 0) -> Vectors:
    """A linear function of the vectors."""
    found = blobs(images, seed=seed)
    return Vectors(found.values, (3 + found.values[0] @ DIRECTIONS[0]).astype(np.float32), found.images)


def score(val: Vectors, predicted: NDArray[Any]) -> float:
    return float(scores(val, [predicted], seed=0)[0, 0])


def test_classes_are_read_where_they_are_linear() -> None:
    train, val = blobs(40), blobs(40, seed=1)
    assert score(val, fit_and_predict(train, val)) > 0.95
    random = np.random.default_rng(0)
    noise = [
        Vectors([random.normal(size=(160, 20)).astype(np.float32)], one.labels, one.images) for one in (train, val)
    ]
    assert score(val, fit_and_predict(*noise)) < 0.5


def test_real_numbers_are_read_where_they_are_linear() -> None:
    train, val = real(40), real(40, seed=1)
    assert score(val, fit_and_predict(train, val)) > 0.98
    assert score(val, np.full(len(val.labels), val.labels.mean())) == pytest.approx(0, abs=1e-6)


def test_a_rare_class_weighs_as_much_as_the_others() -> None:
    train, val = blobs(60, noise=3.0), blobs(60, noise=3.0, seed=1)
    kept = (train.labels < 2) | (np.arange(len(train.labels)) % 10 == 0)
    rare = Vectors([train.values[0][kept]], train.labels[kept], train.images[kept])
    assert (rare.labels == 2).sum() < 12
    predicted = fit_and_predict(rare, val)
    assert (predicted[val.labels == 2] == 2).mean() > 0.35


def test_a_wide_map_does_not_drown_a_narrow_one() -> None:
    """One map holds the labels in 20 channels, the other noise in 2,000."""
    random = np.random.default_rng(3)
    both = [
        Vectors([*one.values, random.normal(size=(160, 2000)).astype(np.float32)], one.labels, one.images)
        for one in (blobs(40), blobs(40, seed=1))
    ]
    assert score(both[1], fit_and_predict(*both)) > 0.85


def test_few_samples_and_constant_vectors_end_well() -> None:
    val = blobs(5)
    two = Vectors([np.zeros((2, 20), np.float32)], np.array([0, 1]), np.array([0, 1]))
    assert set(fit_and_predict(two, val)) <= {0, 1}
    alone = Vectors(val.values, np.arange(len(val.labels)), np.arange(len(val.labels)))  # every class once
    assert len(fit_and_predict(alone, val)) == len(val.labels)
    constant = Vectors([np.ones_like(val.values[0])], val.labels, val.images)
    assert score(val, fit_and_predict(constant, constant)) == pytest.approx(1 / 3)


def test_scores_are_those_of_scikit_learn() -> None:
    val, random = blobs(30), np.random.default_rng(2)
    guess = np.where(random.random(len(val.labels)) < 0.7, val.labels, 0)
    assert score(val, guess) == pytest.approx(balanced_accuracy_score(val.labels, guess))
    numbers = real(30)
    near = numbers.labels + random.normal(size=len(numbers.labels))
    assert score(numbers, near) == pytest.approx(r2_score(numbers.labels, near))


def test_the_error_is_that_of_images_not_of_vectors() -> None:
    """All vectors of an image are right or wrong together: the error is the binomial one of the number of images."""
    images, share = 100, 0.8
    right = (np.arange(images) % 10 < 10 * share).repeat(20)
    labels = (np.arange(images * 20) % 2).astype(np.int64)
    val = Vectors([np.zeros((images * 20, 1), np.float32)], labels, np.arange(images).repeat(20))
    found = scores(val, [np.where(right, labels, 1 - labels)], seed=0)
    assert found.shape == (1, 1 + RESAMPLES)
    assert found[0, 0] == pytest.approx(share)
    assert found[0, 1:].std() == pytest.approx(np.sqrt(share * (1 - share) / images), rel=0.1)


def test_models_are_compared_on_the_same_resamples() -> None:
    val = blobs(30)
    guess = np.zeros_like(val.labels)
    one, two = scores(val, [guess, guess], seed=0)
    assert np.array_equal(one, two)
    assert np.array_equal(scores(val, [guess], seed=0)[0], one)
    better = np.where(np.arange(len(guess)) % 3 == 0, val.labels, guess)
    one, two = scores(val, [guess, better], seed=1)
    assert (two >= one).all()
