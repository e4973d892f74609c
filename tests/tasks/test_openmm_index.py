"""Data sets from the cache equal mmdet's own; what is stale, damaged or cannot be written costs time, nothing else."""

from __future__ import annotations

import errno
import json
import os
import pickle
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch
from data.test_records import same
from task_steps import smoke_roots

from gppf_ds.data.cached_files import one_at_a_time
from gppf_ds.data.records import Records
from gppf_ds.data.sets.detection import SOURCES
from gppf_ds.tasks import openmm_index
from gppf_ds.tasks.detection import Detection
from gppf_ds.tasks.task import Split

torch.set_num_threads(1)

CONFIGS = {
    "coco": "mask_rcnn_lsj_coco.py",
    "lvis": "mask-rcnn_r50_fpn_seesaw-loss_sample1e-3-ms-2x_lvis-v1.py",
    "objects365": "faster_rcnn_lsj_objects365.py",
    "openimages": "cascade_rcnn_lsj_openimages.py",
}


@pytest.fixture(scope="module")
def roots(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    roots = smoke_roots(tmp_path_factory, SOURCES)
    for root in roots.values():
        age(root)
    return roots


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.setattr(openmm_index, "WORTH_KEEPING", 1)


def age(root: Path, seconds: float = 60) -> None:
    then = time.time() - seconds
    for path in root.rglob("*"):
        os.utime(path, (then, then))


def opened(name: str, root: Path, split: Split = "train") -> Any:
    """The library's data set, as a task opens it."""
    task = Detection(CONFIGS[name], 2, data_root=str(root), source=name)
    return task.dataset(split).inner  # type: ignore[attr-defined]


def plain(name: str, root: Path, split: Split, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The same without a cache."""
    with monkeypatch.context() as patch:
        patch.setattr(openmm_index, "_KINDS", set())
        return opened(name, root, split)


def kept() -> list[Path]:
    return sorted(Path(os.environ["XDG_CACHE_HOME"]).rglob("*.records"))


def forbid_parsing(monkeypatch: pytest.MonkeyPatch) -> None:
    def parse(*args: Any) -> None:
        raise AssertionError("parsed")

    monkeypatch.setattr(openmm_index, "_make", parse)


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("name", CONFIGS)
def test_both_starts_give_what_mmdet_gives(
    name: str, split: Split, roots: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = plain(name, roots[name], split, monkeypatch)
    assert not kept()
    first = opened(name, roots[name], split)
    assert len(kept()) == 1
    forbid_parsing(monkeypatch)
    second = opened(name, roots[name], split)
    worker = pickle.loads(pickle.dumps(second))
    for ours in (first, second, worker):
        assert len(ours) == len(theirs) > 0
        assert same(ours.metainfo, theirs.metainfo)
        for index in [*range(len(theirs)), -1]:
            assert same(ours.get_data_info(index), theirs.get_data_info(index))
    leaf, theirs_leaf = (getattr(one, "dataset", one) for one in (second, theirs))
    assert isinstance(leaf.data_list, Records)
    missing = vars(theirs_leaf).keys() - vars(leaf).keys()
    assert missing <= {"cat_img_map", "data_bytes", "data_address"}
    assert [leaf.get_cat_ids(i) for i in range(len(leaf))] == [theirs_leaf.get_cat_ids(i) for i in range(len(leaf))]


def test_what_the_pipeline_makes_is_the_same(roots: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = plain("coco", roots["coco"], "val", monkeypatch)
    opened("coco", roots["coco"], "val")
    ours = opened("coco", roots["coco"], "val")
    for one, other in ((ours[i], theirs[i]) for i in range(len(theirs))):
        assert torch.equal(one["inputs"], other["inputs"])
        assert one["data_samples"].metainfo == other["data_samples"].metainfo


def test_other_annotations_configurations_and_code_have_records_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    SOURCES["coco"].smoke(tmp_path)
    age(tmp_path)
    before = len(opened("coco", tmp_path))
    opened("coco", tmp_path, "val")
    assert len(kept()) == 2
    annotations = tmp_path / "annotations" / "instances_train2017.json"
    content = json.loads(annotations.read_bytes())
    gone = content["images"].pop()["id"]
    content["annotations"] = [one for one in content["annotations"] if one["image_id"] != gone]
    annotations.write_text(json.dumps(content))
    age(tmp_path, 30)
    assert len(opened("coco", tmp_path)) == before - 1
    assert len(kept()) == 3
    monkeypatch.setattr(openmm_index, "_code", lambda kind: b"another version")
    opened("coco", tmp_path)
    assert len(kept()) == 4


def test_a_file_that_was_just_written_is_not_trusted_yet(tmp_path: Path) -> None:
    SOURCES["coco"].smoke(tmp_path)
    assert len(opened("coco", tmp_path)) > 0
    assert not kept()


def test_small_annotations_are_parsed(roots: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openmm_index, "WORTH_KEEPING", 8 * 2**20)
    opened("coco", roots["coco"])
    assert not list(Path(os.environ["XDG_CACHE_HOME"]).iterdir())


def test_a_damaged_file_is_made_anew(roots: dict[str, Path]) -> None:
    first = opened("coco", roots["coco"])
    (place,) = kept()
    content = place.read_bytes()
    place.write_bytes(content[:-5])
    second = opened("coco", roots["coco"])
    assert same(second.get_data_info(0), first.get_data_info(0))
    assert place.read_bytes() == content


def full_disk(*args: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("disk", ["full", "read-only", "no form"])
def test_a_cache_that_cannot_be_written_costs_only_time(
    disk: str, roots: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = plain("coco", roots["coco"], "train", monkeypatch)
    if disk == "full":
        monkeypatch.setattr("gppf_ds.data.records.np.array", full_disk)
    elif disk == "read-only":  # permission bits do not stop a super-user
        monkeypatch.setattr(openmm_index, "writable", lambda folder: False)
    else:
        monkeypatch.setattr(openmm_index, "encode", lambda value: (_ for _ in ()).throw(TypeError("no exact form")))
    for _ in range(2):
        ours = opened("coco", roots["coco"])
        assert ours.dataset.serialize_data
        assert [same(ours.get_data_info(i), theirs.get_data_info(i)) for i in range(len(theirs))] == [True] * len(ours)
    assert not kept()


def _length(root: Path) -> int:
    return len(opened("coco", root))


def test_processes_that_start_together_agree(roots: dict[str, Path]) -> None:
    length = _length(roots["coco"])
    kept()[0].unlink()
    with ProcessPoolExecutor(3, mp_context=get_context("fork")) as pool:
        assert list(pool.map(_length, [roots["coco"]] * 6, timeout=60)) == [length] * 6
    assert len(kept()) == 1
    assert not list(kept()[0].parent.glob(".*"))


def test_who_waited_for_nothing_does_not_make_the_others_wait(
    roots: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that waited for one that could not write parses outside the lock, so all such do at once."""
    monkeypatch.setattr(openmm_index, "one_at_a_time", _already_waited)
    ours = opened("coco", roots["coco"])
    assert ours.dataset.serialize_data
    assert not kept()


class _already_waited:  # noqa: N801
    def __init__(self, folder: Path) -> None:
        pass

    def __enter__(self) -> bool:
        return False

    def __exit__(self, *failure: Any) -> None:
        pass


def _at_once(folder: Path) -> bool:
    with one_at_a_time(folder) as at_once:
        return at_once


def test_the_lock_tells_who_had_to_wait(tmp_path: Path) -> None:
    with ProcessPoolExecutor(1, mp_context=get_context("fork")) as pool:
        with one_at_a_time(tmp_path) as at_once:
            assert at_once
            other = pool.submit(_at_once, tmp_path)
            time.sleep(0.3)
            assert not other.done()
        assert other.result(timeout=30) is False
        assert pool.submit(_at_once, tmp_path).result(timeout=30) is True


def test_leftovers_go_and_what_is_in_use_stays(roots: dict[str, Path]) -> None:
    opened("coco", roots["coco"])
    (place,) = kept()
    names = {"old.records": 40 * 86400, "newer.records": 3600, ".gppf-ds-killed": 3600}
    for name, seconds in names.items():
        (place.parent / name).touch()
        os.utime(place.parent / name, (time.time() - seconds,) * 2)
    place.unlink()
    opened("coco", roots["coco"])
    assert {path.name for path in place.parent.iterdir()} == {place.name, "newer.records"}
