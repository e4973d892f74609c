"""Looking through many files for faults."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

Item = TypeVar("Item")

_THREADS = 8
_CHUNK = 256


def first_faults(check: Callable[[Item], str | None], items: Iterable[Item], limit: int) -> list[str]:
    """The first findings of ``check``, at most ``limit``, in the order of the items; none is looked at without need.

    Threads share the work: decoding a png leaves Python's lock free.
    """
    found: list[str] = []
    left = iter(items)
    with ThreadPoolExecutor(_THREADS) as pool:
        while len(found) < limit and (chunk := list(islice(left, _CHUNK))):
            found += [fault for fault in pool.map(check, chunk) if fault]
    return found[:limit]
