"""Data sets of big annotation files (Objects365: 1.7 million images, 25 million boxes) that open in about a second.

mmdet parses such a file at every start, in every rank: minutes and tens of GB. Here the first start keeps what mmdet
made of it, filtered, in the user's cache; later ones map that (:mod:`gppf_ds.data.records`), and all ranks and workers
of a machine share the pages. mmengine would keep pickles, and the rule of this package is that nothing is unpickled
that might have come from elsewhere; whether a cache is really one's own depends on owners and permissions that shared
file systems do not tell reliably. So the records are msgpack, and mmengine gets them as an ordinary list.
"""

from __future__ import annotations

import hashlib
import logging
import os
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from time import time, time_ns
from typing import Any

from gppf_ds.data.cached_files import WORTH_KEEPING, just_changed, one_at_a_time, states, writable
from gppf_ds.data.records import encode, read_records, write_records
from gppf_ds.data.user_cache import user_cache

_KINDS = {"mmdet.datasets.coco.CocoDataset", "mmdet.datasets.openimages.OpenImagesDataset"}
"""Classes that read all they know of their images from a few big files; by name, so that mmseg needs no mmdet."""

_UNUSED = 30 * 86400
"""Seconds after which a record file that a newer one has replaced is removed."""

_NOT_DATA = {"pipeline", "max_refetch", "serialize_data", "data_list", "_fully_initialized"}
"""Attributes of a data set that do not change what is read."""

_NOT_KEPT = {"data_list", "data_bytes", "data_address", "cat_img_map"}
"""Attributes that reading adds and the cache leaves out. ``cat_img_map``, an entry per box, only serves to filter."""

log = logging.getLogger(__name__)


def build_dataset(config: Mapping[str, Any]) -> Any:
    """``DATASETS.build``, in which big COCO-format and Open Images annotations come from the cache.

    Args:
        config: of a data set or of wrappers around some; runs in :func:`gppf_ds.tasks.openmm.scope`.
    """
    from mmengine.registry import DATASETS

    opened = _opened(config)
    return DATASETS.build(opened) if isinstance(opened, dict) else opened


def _opened(config: Mapping[str, Any]) -> Any:
    """The data set where it is a kind that has an index, else a copy of the configuration with such ones opened."""
    from mmengine.registry import DATASETS

    config = dict(config)
    if "dataset" in config:
        config["dataset"] = _opened(config["dataset"])
    if "datasets" in config:
        config["datasets"] = [_opened(one) for one in config["datasets"]]
    if not _has_index(config):
        return config
    dataset = DATASETS.build({**config, "lazy_init": True})
    fill(dataset)
    return dataset


def _has_index(config: Mapping[str, Any]) -> bool:
    """Whether the class is or derives from one of :data:`_KINDS`.

    Not where it is a user's own: nobody knows what else that reads.
    """
    from mmengine.registry import DATASETS

    kind = config["type"]
    if isinstance(kind, str):
        with DATASETS.switch_scope_and_registry(config.get("_scope_")) as registry:
            kind = registry.get(kind)
    parents = {f"{parent.__module__}.{parent.__qualname__}" for parent in getattr(kind, "__mro__", ())}
    return not parents.isdisjoint(_KINDS) and kind.__module__.startswith(("mmdet.", "gppf_ds."))


def fill(dataset: Any) -> None:
    """Gives a data set of mmdet, built with ``lazy_init``, its records: mapped, or parsed and then mapped.

    Processes of a machine that want the same ones wait for the one that parses. A cache that cannot be written costs
    the parsing in each, as without a cache.
    """
    places = _place(dataset)
    if places is None:
        dataset.full_init()
        return
    place, files = places
    if _adopt(dataset, place):
        return
    if writable(place.parent):
        with one_at_a_time(place.parent) as at_once:
            if _adopt(dataset, place):
                return
            if at_once:
                _make(dataset, place, files)
                return
    # Whoever made the file could not write it: no reason to parse one after another.
    dataset.full_init()


def _place(dataset: Any) -> tuple[Path, dict[str, tuple[int, int]]] | None:
    """Where the records lie, by all that they depend on, and the files with their sizes and times; None: nowhere.

    The folder is named by class and configuration, the file in it by the state of the annotations and of the code.
    """
    files = _files(dataset)
    if files is None or sum(size for size, _ in files.values()) < WORTH_KEEPING:
        return None
    kind = type(dataset)
    state = {name: value for name, value in vars(dataset).items() if name not in _NOT_DATA}
    try:
        configuration = encode([kind.__module__, kind.__qualname__, state, list(files)])
    except (TypeError, ValueError, OverflowError) as error:
        log.info("%s is parsed at every start: its configuration has no key (%s)", dataset.ann_file, error)
        return None
    folder = user_cache() / "records" / _digest(configuration)
    return folder / f"{_digest(encode(list(files.values())) + _code(kind))}.records", files


def _files(dataset: Any) -> dict[str, tuple[int, int]] | None:
    """Size and time of modification (ns) of the annotation files by path; None if one is not there to be looked at.

    mmengine's name for a path of annotations ends in "_file".
    """
    named = [value for name, value in vars(dataset).items() if name.endswith("_file") and isinstance(value, str)]
    try:
        return states(path for path in named if path)
    except OSError:
        return None


def _code(kind: type) -> bytes:
    """The source of the class and of those that it inherits from, and the versions of their packages.

    Another version, and a developer's change, so makes records of its own.
    """
    modules = list(dict.fromkeys(parent.__module__ for parent in kind.__mro__))
    versions = [str(getattr(sys.modules[name.partition(".")[0]], "__version__", "")) for name in modules]
    places = [getattr(sys.modules[name], "__file__", None) for name in modules]
    return encode(versions) + b"".join(Path(place).read_bytes() for place in places if place)


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:32]


def _adopt(dataset: Any, place: Path) -> bool:
    """Gives the data set the records of a file; False where there is none."""
    found = read_records(place)
    if found is None:
        return False
    facts, records = found
    vars(dataset).update(facts, data_list=records, serialize_data=False, _fully_initialized=True)
    with suppress(OSError):
        os.utime(place)  # in use
    return True


def _make(dataset: Any, place: Path, files: dict[str, tuple[int, int]]) -> None:
    """Parses the annotations and keeps the records; where that fails they stay in memory, as mmengine has them."""
    log.info("reading %s; the next start takes its records from %s", dataset.ann_file, place)
    started, serialize, before = time_ns(), dataset.serialize_data, set(vars(dataset))
    dataset.serialize_data = False
    dataset.full_init()
    vars(dataset).pop("cat_img_map", None)
    if _keep(dataset, place, files, started, before) and _adopt(dataset, place):
        return
    if serialize:
        dataset.data_bytes, dataset.data_address = dataset._serialize_data()
        dataset.serialize_data = True


def _keep(dataset: Any, place: Path, files: dict[str, tuple[int, int]], started: int, before: set[str]) -> bool:
    """Writes the records of a data set that was read from these files; False, and why in the log, if it cannot."""
    if any(just_changed(modified, started) for _, modified in files.values()) or _files(dataset) != files:
        log.info("%s was changed only now: its records are not kept", dataset.ann_file)
        return False
    facts = {name: value for name, value in vars(dataset).items() if name not in before | _NOT_KEPT}
    facts["_metainfo"] = dataset._metainfo
    try:
        _tidy(place.parent)
        write_records(place, facts, dataset.data_list)
        return True
    except (OSError, TypeError, ValueError, OverflowError) as error:
        log.warning("%s is parsed at every start: its records cannot be kept (%s)", dataset.ann_file, error)
        return False


def _tidy(folder: Path) -> None:
    """Removes what killed processes have left, and records of an older state that nobody has used for long."""
    for path in folder.iterdir():
        if path.name.startswith(".") or path.stat().st_mtime < time() - _UNUSED:
            path.unlink()
