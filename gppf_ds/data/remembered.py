"""What a check of big annotation files has found, so that the next start need not read them again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from time import time_ns
from typing import TypeVar

import gppf_ds
from gppf_ds.data.cached_files import just_changed, whole_file
from gppf_ds.data.user_cache import user_cache

WORTH_KEEPING = 8 * 2**20
"""Bytes of annotations that take longer to read than an answer is worth a file."""

Answer = TypeVar("Answer")


def remembered(question: str, files: Sequence[Path], answer: Callable[[], Answer]) -> Answer:
    """``answer()``, or what that gave when these files were as they are now (paths, sizes, times of modification).

    Args:
        question: what is answered, with all that the answer depends on besides the files and this package's version.
        files: annotations; where they are small, every start asks again.
        answer: gives a value for JSON. What it raises is not remembered.
    """
    try:
        states = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    except OSError:
        return answer()
    if sum(size for _, size, _ in states) < WORTH_KEEPING:
        return answer()
    key = hashlib.sha256(json.dumps([gppf_ds.__version__, question, states]).encode()).hexdigest()[:32]
    place = user_cache() / "answers" / f"{key}.json"
    with suppress(OSError, ValueError):
        known: Answer = json.loads(place.read_text())
        return known
    started = time_ns()
    found = answer()
    if not any(just_changed(modified, started) for *_, modified in states):
        with suppress(OSError):  # a full or read-only disk costs time only
            place.parent.mkdir(parents=True, exist_ok=True)
            with whole_file(place) as file:
                file.write(json.dumps(found).encode())
    return found
