"""Minibatch CKA: against a direct computation in float64, its invariances, and on trained networks."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from gppf_ds.analysis.cka import MinibatchCka, gram, unbiased_hsic


def features(*sizes: tuple[int, ...], images: int = 12, seed: int = 0) -> list[Tensor]:
    """Maps of one layer each, which have something in common, far from zero."""
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(images, 5, generator=generator)
    maps = []
    for size in sizes:
        mix = torch.randn(5, int(np.prod(size)), generator=generator)
        own = torch.randn(images, int(np.prod(size)), generator=generator)
        maps.append((common @ mix + 0.7 * own + 3.0).reshape(images, *size))
    return maps


def cka(*maps: Tensor) -> Tensor:
    estimator = MinibatchCka()
    estimator.update(torch.stack([gram(one) for one in maps]))
    return estimator.compute()


def hsic_by_definition(x: np.ndarray, y: np.ndarray) -> float:
    """The U-statistic itself: the mean over all ordered quadruples of different images (Song et al. 2012).

    HSIC = E[k12 l12] + E[k12] E[l34] - 2 E[k12 l13] with four independent draws.
    """
    k, el = x @ x.T, y @ y.T
    terms = [
        k[a, b] * el[a, b] + k[a, b] * el[c, d] - 2 * k[a, b] * el[a, c]
        for a, b, c, d in itertools.permutations(range(len(x)), 4)
    ]
    return float(np.mean(terms))


def test_the_estimator_is_the_u_statistic() -> None:
    maps = features((3, 2, 2), (7,), images=7)
    flat = [one.flatten(1).double().numpy() for one in maps]
    found = unbiased_hsic(torch.stack([gram(one) for one in maps])).numpy()
    expected = np.array([[hsic_by_definition(x, y) for y in flat] for x in flat])
    assert np.allclose(found, expected, rtol=1e-5)


def test_batches_average_hsic_before_the_ratio() -> None:
    estimator = MinibatchCka()
    parts = [features((4, 3, 3), (9,), (2, 5), images=n, seed=n) for n in (8, 8, 10)]
    for maps in parts:
        estimator.update(torch.stack([gram(one) for one in maps]))
    found = estimator.compute().numpy()

    def direct(grams: np.ndarray, other: np.ndarray) -> float:
        n = len(grams)
        k, el, one = grams - np.diag(np.diag(grams)), other - np.diag(np.diag(other)), np.ones(n)
        value = np.trace(k @ el) + (one @ k @ one) * (one @ el @ one) / ((n - 1) * (n - 2))
        return float(value - 2 / (n - 2) * (one @ k @ el @ one)) / (n * (n - 3))

    kernels = [[one.flatten(1).double().numpy() for one in maps] for maps in parts]
    hsic = np.mean([[[direct(x @ x.T, y @ y.T) for y in maps] for x in maps] for maps in kernels], axis=0)
    expected = hsic / np.sqrt(np.outer(hsic.diagonal(), hsic.diagonal()))
    assert estimator.images == 26
    assert np.abs(found - expected).max() < 1e-5
    assert np.allclose(found.diagonal(), 1)


def test_rotations_scales_and_shifts_change_nothing() -> None:
    first, second = features((6, 2, 2), (10,))
    value = cka(first, second)[0, 1]
    rotation = torch.linalg.qr(torch.randn(24, 24, generator=torch.Generator().manual_seed(1)))[0]
    turned = 7.3 * (first.flatten(1) @ rotation) - 40.0
    assert float(cka(turned, second)[0, 1]) == pytest.approx(float(value), abs=1e-5)
    assert float(cka(turned, first)[0, 1]) == pytest.approx(1.0, abs=1e-5)
    stretched = first.flatten(1) * torch.linspace(0.01, 5, 24)
    assert abs(float(cka(stretched, first)[0, 1]) - 1.0) > 1e-2


def test_the_batch_size_does_not_bias_it() -> None:
    """What is unrelated has CKA 0 in the mean; the biased estimator gives far more with small batches."""
    generator = torch.Generator().manual_seed(0)
    estimator = MinibatchCka()
    for _ in range(300):
        estimator.update(torch.stack([gram(torch.randn(8, 50, generator=generator)) for _ in range(2)]))
    assert abs(float(estimator.compute()[0, 1])) < 0.1


def test_a_constant_layer_has_no_number() -> None:
    (varied,) = features((4,))
    found = cka(varied, torch.ones(12, 3))
    assert torch.isnan(found[1]).all()
    assert float(found[0, 0]) == pytest.approx(1)
