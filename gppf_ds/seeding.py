"""Randomness as a pure function of what it is for, so that a run does not depend on its history or on its ranks."""

from __future__ import annotations

import hashlib
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


def seed_global_generators(seed: int, *key: int | str) -> None:
    """Seeds the generators of ``random``, numpy and torch (all devices) for code that draws from them."""
    text = "\0".join(map(str, (seed, *key)))
    word = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest(), "big")  # a tenth of generator's time
    random.seed(word)
    np.random.seed(word)
    # Not torch.manual_seed: where CUDA is not in use it keeps the seed for later together with a formatted stack.
    torch.default_generator.manual_seed(word)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(word)
