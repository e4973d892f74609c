"""Randomness is a function of its key alone, for every generator that code may draw from."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
import torch

from gppf_ds.seeding import FORWARD, SAMPLE, generator, seed_global_generators

KEYS: list[Sequence[int | str]] = [
    (0, FORWARD, 1, 2),
    (1, FORWARD, 1, 2),
    (0, SAMPLE, 1, 2),
    (0, FORWARD, 12),
    (0, FORWARD, 1, 2, "head"),
    (0, FORWARD, 1, 2, "body"),
    (0, FORWARD, 2, 1),
    (0, FORWARD, "a", "b"),
    (0, FORWARD, "ab"),
]


def drawn(key: Sequence[int | str]) -> tuple[float, float, float]:
    seed_global_generators(*key)  # type: ignore[arg-type]
    return random.random(), float(np.random.rand()), float(torch.rand((), dtype=torch.float64))


def test_the_global_generators_follow_the_key() -> None:
    first = [drawn(key) for key in KEYS]
    assert [drawn(key) for key in reversed(KEYS)] == first[::-1]
    for numbers in zip(*first, strict=True):
        assert len(set(numbers)) == len(KEYS)


def test_it_does_not_matter_whose_integers_are_in_the_key() -> None:
    assert drawn((np.int64(3), FORWARD, np.int32(4))) == drawn((3, FORWARD, 4))  # type: ignore[arg-type]


def test_numbers_of_neighbouring_keys_are_uniform_and_independent() -> None:
    numbers = np.array([drawn((0, SAMPLE, "task", epoch, index)) for epoch in range(20) for index in range(100)])
    assert np.abs(numbers.mean(0) - 0.5).max() < 0.03  # 4.6 standard errors
    together = np.concatenate([numbers[:-1], numbers[1:]], axis=1)
    assert np.abs(np.corrcoef(together.T) - np.eye(6)).max() < 0.1


def test_a_generator_of_its_own_follows_the_key_too() -> None:
    numbers = [float(generator(*key).random()) for key in KEYS]  # type: ignore[arg-type]
    assert [float(generator(*key).random()) for key in KEYS] == numbers  # type: ignore[arg-type]
    assert len(set(numbers)) == len(KEYS)
