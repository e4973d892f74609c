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
from gppf_ds.data.cached_files import WORTH_KEEPING, just_changed, states, whole_file
from gppf_ds.data.user_cache import user_cache

Answer = TypeVar("Answer")


def remembered(question: str, files: Sequence[Path], answer: Callable[[], Answer]) -> Answer:
    """``answer()``, or what that gave when these files were as they are now (paths, sizes, times of modification).

    Args:
        question: what is answered, with all that the answer depends on besides the files and this package's version.
        files: annotations; where they are small, every start asks again.
        answer: gives a value for JSON. What it raises is not remembered.
    """
    try:
        now = states(files)
    except OSError:
        return answer()
    if sum(size for size, _ in now.values()) < WORTH_KEEPING:
        return answer()
    key = hashlib.sha256(json.dumps([gppf_ds.__version__, question, list(now.items())]).encode()).hexdigest()[:32]
    place = user_cache() / "answers" / f"{key}.json"
    with suppress(OSError, ValueError):
        known: Answer = json.loads(place.read_text())
        return known
    started = time_ns()
    found = answer()
    if not any(just_changed(modified, started) for _, modified in now.values()):
        with suppress(OSError):  # a full or read-only disk costs time only
            place.parent.mkdir(parents=True, exist_ok=True)
            with whole_file(place) as file:
                file.write(json.dumps(found).encode())
    return found
