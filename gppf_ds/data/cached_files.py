"""Files of our own that spare the next start its work: made by one process, complete or not there, and mapped."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

_CLOCK_TICK = 2_000_000_000
"""Nanoseconds within which some file systems cannot tell two changes apart."""

_CLOCK_SKEW = 60_000_000_000
"""Nanoseconds by which the clock of a file server may be ahead; later times were unpacked from an archive."""


WORTH_KEEPING = 8 * 2**20
"""Bytes of annotations that take longer to read (about a third of a second) than what is kept is worth a file."""


class MappedArray:
    """An array mapped from a file, shape (length,), read-only; its pickle is the place, so processes share the pages.

    Raises:
        OSError, ValueError: the file is missing or too short.
    """

    def __init__(self, path: Path, dtype: str, length: int, offset: int = 0) -> None:
        self._place = (path, dtype, length, offset)
        # A map cannot be empty.
        self.array: NDArray[Any] = np.memmap(path, dtype, "r", offset, (length,)) if length else np.empty(0, dtype)

    def __len__(self) -> int:
        return len(self.array)

    def __reduce__(self) -> tuple[Any, ...]:
        return MappedArray, self._place


def writable(folder: Path) -> bool:
    """Asks by writing: permission bits say nothing of read-only mounts and of full disks."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with NamedTemporaryFile(dir=folder, prefix=".gppf-ds-"):
            return True
    except OSError:
        return False


@contextmanager
def one_at_a_time(folder: Path) -> Iterator[bool]:
    """Holds the lock of a folder; gives whether it came without waiting for another process.

    File systems without locks let everyone in, which is slower but right.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        at_once = True
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            at_once = False
            with suppress(OSError):
                fcntl.flock(descriptor, fcntl.LOCK_EX)
        except OSError:
            pass
        yield at_once
    finally:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_UN)  # closing would leave it to a child that was forked meanwhile
        os.close(descriptor)


@contextmanager
def whole_file(place: Path) -> Iterator[IO[bytes]]:
    """A file to write that appears at its place complete or not at all; raises OSError."""
    with NamedTemporaryFile(dir=place.parent, prefix=".gppf-ds-", delete=False) as file:
        try:
            yield file
            file.close()
            os.chmod(file.name, 0o644)
            os.replace(file.name, place)
        except BaseException:
            with suppress(OSError):
                os.unlink(file.name)
            raise


def states(paths: Iterable[str | Path]) -> dict[str, tuple[int, int]]:
    """Size and time of modification (ns) of files, by their real paths; raises OSError."""
    real = [os.path.realpath(path) for path in paths]
    return {path: (os.stat(path).st_size, os.stat(path).st_mtime_ns) for path in real}


def just_changed(modified: int, now: int) -> bool:
    """Whether what was modified at that time may change again without its time telling (nanoseconds)."""
    return now - _CLOCK_TICK < modified < now + _CLOCK_SKEW
