"""A list of records (what the annotations say of each image) in a file of ours that is mapped, not read.

The file holds msgpack, no pickles: reading it can run nothing, whoever may have written to the cache. Only exact types
are taken (see :func:`encode`), so what is read equals what was written, type by type; a list with anything else in it
is refused, never written approximately.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import msgpack  # type: ignore[import-untyped]
import numpy as np

from gppf_ds.data.cached_files import MappedArray, whole_file

_MAGIC = b"gppf-ds records1"
"""At both ends of a file; its length keeps the arrays aligned."""
_TAIL = 3 * 8 + len(_MAGIC)
_TUPLE, _ARRAY = 1, 2
_MEBI = 2**20


class _Record(dict[str, Any]):
    """A record decoded for one reader: mmengine, which copies what it takes from a list, needs no copy of all of it."""

    def __deepcopy__(self, memo: dict[int, Any]) -> dict[str, Any]:
        return dict(self)


class Records(Sequence[dict[str, Any]]):
    """Records mapped from a file, decoded one by one; its pickle is the place, so processes share the pages.

    Args:
        ends: (length,) int64, where each record ends in ``data``.
        data: the records' bytes, one after another.
    """

    def __init__(self, ends: MappedArray, data: MappedArray) -> None:
        self._ends = ends
        self._data = data

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: Any) -> Any:
        """The record, fresh; raises IndexError."""
        place = range(len(self))[index]
        start = int(self._ends.array[place - 1]) if place else 0
        return _Record(decode(self._data.array[start : int(self._ends.array[place])]))


def encode(value: Any) -> bytes:
    """The value as msgpack; :func:`decode` gives the same value and types back.

    Raises:
        TypeError: a type other than None, bool, int, float, str, bytes, list, dict, tuple or an array of numbers; a
            derived class is another type.
        ValueError, OverflowError: nested too deep, no valid text, or an integer of more than 64 bits.
    """
    packed: bytes = msgpack.packb(value, default=_extension, strict_types=True)
    return packed


def _extension(value: Any) -> msgpack.ExtType:
    if type(value) is tuple:
        return msgpack.ExtType(_TUPLE, encode(list(value)))
    if type(value) is np.ndarray and not value.dtype.hasobject:
        return msgpack.ExtType(_ARRAY, encode([value.dtype.str, list(value.shape), value.tobytes()]))
    raise TypeError(f"{type(value).__name__} has no exact form")


def decode(packed: Any) -> Any:
    """What :func:`encode` was given; raises ValueError for bytes that it has not made."""
    return msgpack.unpackb(packed, ext_hook=_restore, strict_map_key=False)


def _restore(code: int, packed: bytes) -> Any:
    if code == _TUPLE:
        return tuple(decode(packed))
    if code == _ARRAY:
        dtype, shape, content = decode(packed)
        return np.frombuffer(content, dtype).reshape(shape).copy()
    raise ValueError(f"unknown extension {code}")


def write_records(place: Path, facts: Any, records: Iterable[dict[str, Any]]) -> None:
    """Puts the records, and a value that describes them, in a file at once, whole.

    Layout: magic, records, padding, their ends, the facts; then the position of the ends, the number of records, the
    size of the file, magic.

    Raises:
        OSError: it cannot be written.
        TypeError, ValueError, OverflowError: see :func:`encode`.
    """
    with whole_file(place) as file:
        file.write(_MAGIC)
        ends, pending = [], bytearray()
        total = 0
        for record in records:
            packed = encode(record)
            total += len(packed)
            ends.append(total)
            pending += packed
            if len(pending) > _MEBI:
                file.write(pending)
                pending.clear()
        padding = -(len(_MAGIC) + total) % 8  # memory maps of 8-byte numbers want to be aligned
        file.write(pending + b" " * padding)
        file.write(np.array(ends, np.int64).tobytes())
        start, described = len(_MAGIC) + total + padding, encode(facts)
        size = start + 8 * len(ends) + len(described) + _TAIL
        file.write(described + np.array([start, len(ends), size], np.int64).tobytes() + _MAGIC)


def read_records(place: Path) -> tuple[Any, Records] | None:
    """The facts and the records of a file; None where there is none or it is damaged."""
    try:
        with place.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(size - _TAIL)
            tail = file.read()
            start, count, stated = (int(number) for number in np.frombuffer(tail[: -len(_MAGIC)], np.int64))
            if not tail.endswith(_MAGIC) or stated != size:
                return None
            file.seek(start + 8 * count)
            facts = decode(file.read()[:-_TAIL])
        ends = MappedArray(place, "int64", count, start)
        total = int(ends.array[-1]) if count else 0
        return facts, Records(ends, MappedArray(place, "uint8", total, len(_MAGIC)))
    except (OSError, ValueError):
        return None
