"""Randomness as a pure function of what it is for, so that a run does not depend on its history or on its ranks."""

from __future__ import annotations

import random
import zlib

import numpy as np
import torch

# Streams of random numbers that must not share a key.
SCHEDULE, GUMBEL, FORWARD, SAMPLE, ORDER, INIT = range(6)


def generator(seed: int, *key: int | str) -> np.random.Generator:
    """A generator whose numbers depend on the seed and the key alone (counter-based Philox, O(1) for any key)."""
    words = [zlib.crc32(part.encode()) if isinstance(part, str) else part for part in key]
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, *words])))


def seed_word(seed: int, *key: int | str) -> int:
    """32 bits that depend on the seed and the key alone, for :func:`set_global_generators`."""
    return int(generator(seed, *key).integers(2**32))


def seed_global_generators(seed: int, *key: int | str) -> None:
    """Seeds the generators of ``random``, numpy and torch (all devices) for code that draws from them."""
    set_global_generators(seed_word(seed, *key))


def set_global_generators(word: int) -> None:
    """:func:`seed_global_generators` with a :func:`seed_word` that is known already."""
    random.seed(word)
    np.random.seed(word)
    # Not torch.manual_seed: where CUDA is not in use it keeps the seed for later together with a formatted stack.
    torch.default_generator.manual_seed(word)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(word)
