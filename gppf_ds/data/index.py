"""Lists of millions of images that are there in seconds: class folders are scanned once, then mapped from a file."""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import NamedTemporaryFile
from time import time_ns
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gppf_ds.data.folders import IMAGE_SUFFIXES
from gppf_ds.errors import UserError

_MAGIC = b"gppf-ds index 1\n"
_SCANNERS = 16
"""Folders listed at a time: on a network file system listing is waiting."""
_CLOCK_TICK = 2_000_000_000
"""Nanoseconds within which some file systems cannot tell two changes of a folder apart."""

_CLOCK_SKEW = 60_000_000_000
"""Nanoseconds by which the clock of a file server may be ahead; later times were unpacked from an archive."""

log = logging.getLogger(__name__)


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


@dataclass(frozen=True)
class ClassFolders:
    """The images of ``folder/CLASS/**``; class k is the k-th class folder by name, as in torchvision's ImageFolder.

    Empty class folders count; hidden files and folders do not.
    """

    folder: Path
    classes: list[str]
    starts: NDArray[np.int64]
    """(classes + 1,): the images of class k are starts[k] to starts[k + 1]."""
    ends: MappedArray
    """(images,) int64: where the name of each image ends in ``names``."""
    names: MappedArray
    """The names below their class folders, one after another, in the file system's bytes."""

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> tuple[Path, int]:
        """The path and the label of an image."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        ends = self.ends.array
        start = int(ends[index - 1]) if index else 0
        name = os.fsdecode(self.names.array[start : int(ends[index])].tobytes())
        label = int(np.searchsorted(self.starts, index, side="right")) - 1
        return self.folder / self.classes[label] / name, label


def class_folders(folder: Path) -> ClassFolders:
    """The images of a folder of class folders, from its index; the index is made where there is none or it is stale.

    The index lies beside the folder (``.NAME.gppf-ds-index``) or, where that cannot be written, in
    ``$XDG_CACHE_HOME/gppf-ds``. It is stale when a folder has changed (by modification time) since the scan. Processes
    that want the same index at once wait for the one that scans.

    Raises:
        UserError: the folder cannot be listed or has no class folders, or no index can be written anywhere.
    """
    folder = folder.resolve()
    if not folder.is_dir():
        raise UserError(f"{folder} cannot be listed: point to an existing folder of class folders.")
    places = (folder.parent / f".{folder.name}.gppf-ds-index", _cache_place(folder))
    for place in places:
        if (found := _read(place, folder)) is not None:
            return found
    for place in places:
        if not _writable(place.parent):
            continue
        with _one_at_a_time(place.parent):
            if (found := _read(place, folder)) is None:
                log.info("scanning %s", folder)
                _write(place, folder)
                found = _read(place, folder, judge_age=False)
            if found is not None:
                return found
    raise UserError(
        f"The index of {folder} can be written neither beside it nor to {places[1].parent}: set XDG_CACHE_HOME to a "
        "folder that can be written."
    )


def _cache_place(folder: Path) -> Path:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "gppf-ds" / f"{hashlib.sha256(os.fsencode(folder)).hexdigest()[:32]}.index"


def _writable(folder: Path) -> bool:
    """Asks by writing: permission bits say nothing of read-only mounts and of full disks."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with NamedTemporaryFile(dir=folder, prefix=".gppf-ds-"):
            return True
    except OSError:
        return False


@contextmanager
def _one_at_a_time(folder: Path) -> Iterator[None]:
    """Holds the lock of a folder; file systems without locks let everyone scan, which is slower but right."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _write(place: Path, folder: Path) -> None:
    """Scans the folder and puts its index in place at once, whole. Layout: magic, length of the json, json, arrays."""
    scanned = time_ns()
    try:
        times = {"": folder.stat().st_mtime_ns}
        with os.scandir(folder) as entries:
            classes = sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))
    except OSError as error:
        raise UserError(f"{folder} cannot be listed ({error.strerror}): point to a folder of class folders.") from error
    if not classes:
        raise UserError(f"{folder} has no class folders: put the images of each class into a folder of their own.")
    lengths, blobs, starts = [], [], [0]
    with ThreadPoolExecutor(_SCANNERS) as pool:
        for label, (names, changed) in enumerate(pool.map(lambda name: _scan(folder / name), classes)):
            times |= {os.path.join(classes[label], inner): at for inner, at in changed.items()}
            lengths.append(np.fromiter(map(len, names), np.int64, len(names)))
            blobs.append(b"".join(names))
            starts.append(starts[-1] + len(names))
    facts = {"scanned": scanned, "times": times, "classes": classes, "starts": starts, "bytes": sum(map(len, blobs))}
    header = json.dumps(facts).encode()
    header += b" " * (-(len(_MAGIC) + 8 + len(header)) % 8)  # memory maps of 8-byte numbers want to be aligned
    with NamedTemporaryFile(dir=place.parent, prefix=".gppf-ds-", delete=False) as file:
        try:
            file.write(_MAGIC + len(header).to_bytes(8, "little") + header)
            file.write(np.concatenate(lengths).cumsum().tobytes())
            file.writelines(blobs)
            file.close()
            os.chmod(file.name, 0o644)
            os.replace(file.name, place)
        except BaseException:
            os.unlink(file.name)
            raise


def _scan(folder: Path) -> tuple[list[bytes], dict[str, int]]:
    """The sorted names of all images below a folder, relative to it, and the times of the folders passed."""
    names: list[bytes] = []
    times: dict[str, int] = {}
    pending = [""]
    while pending:
        inner = pending.pop()
        here = os.path.join(folder, inner)
        try:
            times[inner] = os.stat(here).st_mtime_ns
            with os.scandir(here) as entries:
                for entry in entries:
                    if entry.name.startswith("."):
                        continue
                    if os.path.splitext(entry.name)[1].lower() in IMAGE_SUFFIXES:
                        names.append(os.fsencode(os.path.join(inner, entry.name)))
                    elif entry.is_dir():
                        pending.append(os.path.join(inner, entry.name))
        except OSError as error:
            raise UserError(f"{here} cannot be listed ({error.strerror}): mend the folder or remove it.") from error
    return sorted(names), times


def _read(place: Path, folder: Path, judge_age: bool = True) -> ClassFolders | None:
    """The index in a file; None where there is none, it is damaged, or a folder has changed since."""
    try:
        with place.open("rb") as file:
            if file.read(len(_MAGIC)) != _MAGIC:
                return None
            length = int.from_bytes(file.read(8), "little")
            size = os.fstat(file.fileno()).st_size
            facts = json.loads(file.read(min(length, size)))
            start = file.tell()
        images, starts = facts["starts"][-1], np.array(facts["starts"], np.int64)
        names_start = start + 8 * images
        if size != names_start + facts["bytes"] or len(starts) != len(facts["classes"]) + 1:
            return None
        if judge_age and not _still_true(folder, facts["times"], facts["scanned"]):
            return None
    except (OSError, ValueError, KeyError, IndexError, TypeError):
        return None
    ends = MappedArray(place, "int64", images, start)
    return ClassFolders(
        folder, facts["classes"], starts, ends, MappedArray(place, "uint8", facts["bytes"], names_start)
    )


def _still_true(folder: Path, times: dict[str, int], scanned: int) -> bool:
    """Whether no folder has changed, nor may have changed unnoticed because the scan came too soon after a change."""
    if any(scanned - _CLOCK_TICK < at < scanned + _CLOCK_SKEW for at in times.values()):
        return False
    with ThreadPoolExecutor(_SCANNERS) as pool:
        present = pool.map(lambda name: os.stat(os.path.join(folder, name)).st_mtime_ns, times, chunksize=256)
        return all(at == known for at, known in zip(present, times.values(), strict=True))
