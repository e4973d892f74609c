"""The index of class folders: the same list as torchvision's, scanned once, stale when a folder changes."""

from __future__ import annotations

import os
import pickle
import stat
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest

from gppf_ds.data import index
from gppf_ds.data.index import ClassFolders, class_folders
from gppf_ds.errors import UserError

IMAGES = 20_000


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three classes, one of them empty, with a nested folder, a hidden file and a file that is no image."""
    root = tmp_path / "train"
    for name in ("n02", "n01/inner", "n03"):
        (root / name).mkdir(parents=True)
    for name in (
        "n02/b.JPEG",
        "n02/ä.png",
        "n02/a.jpg",
        "n01/inner/c.webp",
        "n01/z.pgm",
        "n01/.d.jpg",
        "n01/notes.txt",
    ):
        (root / name).touch()
    age(root)
    return root


def age(root: Path) -> None:
    """Folders as if they had been written a minute ago."""
    minute = time.time() - 60
    for path in [root, *(path for path in root.rglob("*") if path.is_dir())]:
        os.utime(path, (minute, minute))


def listed(found: ClassFolders) -> list[tuple[str, int]]:
    return [(str(path), label) for path, label in (found[i] for i in range(len(found)))]


def forbid_scans(monkeypatch: pytest.MonkeyPatch) -> None:
    def scan(folder: Path) -> None:
        raise AssertionError(f"{folder} was scanned")

    monkeypatch.setattr(index, "_scan", scan)


def test_the_list_is_that_of_torchvision(folder: Path) -> None:
    from torchvision.datasets import ImageFolder

    (folder / "n01" / ".d.jpg").unlink()
    age(folder)
    theirs = ImageFolder(str(folder), allow_empty=True)
    ours = class_folders(folder)
    assert ours.classes == theirs.classes == ["n01", "n02", "n03"]
    assert sorted(listed(ours)) == sorted((path, label) for path, label in theirs.samples)
    assert ours.starts.tolist() == [0, 2, 5, 5]


def test_the_second_opening_scans_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "train"
    for label in range(100):
        (root / f"n{label:08}").mkdir(parents=True)
        for i in range(IMAGES // 100):
            os.mknod(root / f"n{label:08}" / f"n{label:08}_{i}.JPEG")
    age(root)
    started = time.perf_counter()
    first = class_folders(root)
    scanned = time.perf_counter()
    forbid_scans(monkeypatch)
    second = class_folders(root)
    print(f"{IMAGES} files: scan {scanned - started:.3f} s, second opening {time.perf_counter() - scanned:.3f} s")
    assert len(second) == IMAGES
    assert [second[i] for i in (0, 199, 200, IMAGES - 1)] == [first[i] for i in (0, 199, 200, IMAGES - 1)]
    assert second[IMAGES - 1] == (root / "n00000099" / "n00000099_99.JPEG", 99)
    with pytest.raises(IndexError):
        second[IMAGES]
    # A worker gets the place of the list, not the list.
    sent = pickle.dumps(second)
    assert len(sent) < 10_000
    assert pickle.loads(sent)[200] == second[200]


def test_changes_are_seen(folder: Path) -> None:
    assert len(class_folders(folder)) == 5
    (folder / "n03" / "new.jpg").touch()
    assert len(class_folders(folder)) == 6
    (folder / "n01" / "inner" / "c.webp").unlink()
    assert len(class_folders(folder)) == 5
    (folder / "n04").mkdir()
    assert class_folders(folder).classes[-1] == "n04"


def test_a_scan_right_after_a_change_is_not_trusted(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "n03").touch()
    class_folders(folder)
    forbid_scans(monkeypatch)
    with pytest.raises(AssertionError, match="was scanned"):
        class_folders(folder)


@pytest.mark.parametrize("damage", ["truncated", "another file", "emptied"])
def test_a_damaged_index_is_made_anew(folder: Path, damage: str) -> None:
    first = listed(class_folders(folder))
    (place,) = folder.parent.glob(".*.gppf-ds-index")
    content = place.read_bytes()
    place.write_bytes({"truncated": content[:-3], "another file": b"x" * len(content), "emptied": b""}[damage])
    assert listed(class_folders(folder)) == first
    assert place.read_bytes()[:16] == content[:16]
    assert [path.name for path in folder.parent.iterdir() if path != folder] == [place.name]


def test_data_that_cannot_be_written_are_indexed_in_the_cache(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Permission bits do not stop a super-user: the check itself is what stands for the read-only disk.
    writable = index.writable
    monkeypatch.setattr(index, "writable", lambda place: place != folder.parent and writable(place))
    assert len(class_folders(folder)) == 5
    assert not list(folder.parent.glob(".*"))
    (cached,) = Path(os.environ["XDG_CACHE_HOME"], "gppf-ds").iterdir()
    assert stat.S_IMODE(cached.stat().st_mode) == 0o644
    forbid_scans(monkeypatch)
    assert len(class_folders(folder)) == 5

    cached.unlink()
    monkeypatch.setattr(index, "writable", lambda place: False)
    with pytest.raises(UserError, match="set XDG_CACHE_HOME"):
        class_folders(folder)


def test_processes_that_start_together_agree(folder: Path) -> None:
    with ProcessPoolExecutor(3, mp_context=get_context("fork")) as pool:
        found = list(pool.map(class_folders, [folder] * 6, timeout=60))
    assert all(listed(other) == listed(found[0]) for other in found)
    assert len(list(folder.parent.glob(".*"))) == 1


def test_what_is_no_folder_of_class_folders(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere cannot be listed"):
        class_folders(tmp_path / "nowhere")
    (tmp_path / "flat").mkdir()
    (tmp_path / "flat" / "a.jpg").touch()
    with pytest.raises(UserError, match="flat has no class folders"):
        class_folders(tmp_path / "flat")
