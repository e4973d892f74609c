"""Lists of millions of images that are there in seconds: class folders are scanned once, then mapped from a file."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from time import time_ns

import numpy as np
from numpy.typing import NDArray

from gppf_ds.data.cached_files import MappedArray, just_changed, one_at_a_time, whole_file, writable
from gppf_ds.data.folders import IMAGE_SUFFIXES
from gppf_ds.data.user_cache import user_cache
from gppf_ds.errors import UserError

_MAGIC = b"gppf-ds index 1\n"
_SCANNERS = 16
"""Folders listed at a time: on a network file system listing is waiting."""

log = logging.getLogger(__name__)


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
        if not writable(place.parent):
            continue
        with one_at_a_time(place.parent):
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
    return user_cache() / f"{hashlib.sha256(os.fsencode(folder)).hexdigest()[:32]}.index"


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
    with whole_file(place) as file:
        file.write(_MAGIC + len(header).to_bytes(8, "little") + header)
        file.write(np.concatenate(lengths).cumsum().tobytes())
        file.writelines(blobs)


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
    if any(just_changed(at, scanned) for at in times.values()):
        return False
    with ThreadPoolExecutor(_SCANNERS) as pool:
        present = pool.map(lambda name: os.stat(os.path.join(folder, name)).st_mtime_ns, times, chunksize=256)
        return all(at == known for at, known in zip(present, times.values(), strict=True))
