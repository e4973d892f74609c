"""The ten sets of UODB: the smoke sets, Pascal VOC xml, the command."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from uodb_files import (
    BLOOD,
    BLOOD_CLASSES,
    assert_faults,
    converted,
    kitti_row,
    needs_blood,
    picture,
    voc_object,
    write,
    write_blood,
    write_voc_image,
    write_voc_lists,
)

from gppf_ds.data.commands import prepare_data
from gppf_ds.data.sets.uodb import SOURCES, places, prepare
from gppf_ds.data.sets.uodb_coco import annotation_file
from gppf_ds.errors import UserError


@pytest.mark.parametrize("name", SOURCES)
def test_smoke_set_is_complete_and_sound(name: str, tmp_path: Path) -> None:
    source = SOURCES[name]
    source.smoke(tmp_path)
    assert [place for place in source.layout if not (tmp_path / place).exists()] == []
    assert source.counts.keys() <= source.count(tmp_path).keys()
    assert source.faults(tmp_path, 10) == []
    assert all(path.exists() for path in places(name, tmp_path).values())
    found = converted(name, tmp_path)
    for objects, faults in found.values():
        assert faults == []
        assert sum(not entry[-1] for entries in objects.values() for entry in entries) >= 4
    assert not found["train"][0].keys() & found["val"][0].keys()


def test_official_counts_of_the_smoke_sets(tmp_path: Path) -> None:
    expected = {
        "uodb_kitti": {"training images": 30, "label files": 30},
        "uodb_widerface": {"train images": 4, "val images": 4},
        "uodb_voc": {"VOC2007 trainval images": 4, "VOC2012 trainval images": 4, "VOC2007 test images": 4},
        "uodb_lisa": {"frames": 10, "annotations": 21},
        "uodb_dota": {"train images": 3, "val images": 3},
        "uodb_deeplesion": {"key slices": 7, "lesions": 14},
    }
    for name, counts in expected.items():
        SOURCES[name].smoke(tmp_path / name)
        assert SOURCES[name].count(tmp_path / name) == counts


def test_voc_counts_pixels_from_one_and_ignores_the_difficult(tmp_path: Path) -> None:
    for folder, lists in (("VOC2007", {"trainval": ["1"], "test": ["2"]}), ("VOC2012", {"trainval": ["1"]})):
        write_voc_lists(tmp_path / "VOCdevkit" / folder, **lists)
    write_voc_image(tmp_path / "VOCdevkit/VOC2007", "1", voc_object("dog", 1, 1, 100, 80))
    write_voc_image(tmp_path / "VOCdevkit/VOC2007", "2", voc_object("cat", 11, 21, 40, 30, difficult=1))
    write_voc_image(tmp_path / "VOCdevkit/VOC2012", "1", voc_object("Person", 3, 4, 12, 23))
    with pytest.raises(UserError, match="no usable val box"):
        prepare("uodb_voc", tmp_path)  # the only object to be found in val is difficult
    cat = voc_object("cat", 11, 21, 40, 30, difficult=1)
    write_voc_image(tmp_path / "VOCdevkit/VOC2007", "2", cat, voc_object("cow", 2, 2, 3, 3))
    found = converted("uodb_voc", tmp_path)
    assert found["train"] == (
        {
            "VOCdevkit/VOC2007/JPEGImages/1.jpg": [("dog", 0, 0, 100, 80, False)],
            "VOCdevkit/VOC2012/JPEGImages/1.jpg": [("person", 2, 3, 10, 20, False)],
        },
        [],
    )
    assert found["val"][0] == {
        "VOCdevkit/VOC2007/JPEGImages/2.jpg": [("cat", 10, 20, 30, 10, True), ("cow", 1, 1, 2, 2, False)]
    }


def test_broken_voc(tmp_path: Path) -> None:
    write_voc_lists(tmp_path, train=["1", "2", "3", "4", "5"], test=["1"])
    bad = [voc_object("dog", 101, 1, 120, 80), voc_object("unicorn", 1, 1, 9, 9), voc_object("cat", 9, 9, 5, 20)]
    bad += [voc_object("cat", "nine", 9, 5, 20), "<object><name>cat</name></object>"]
    write_voc_image(tmp_path, "1", voc_object("dog", 1, 1, 50, 50), *bad)
    write_voc_image(tmp_path, "2", voc_object("dog", 1, 1, 50, 50), image=False)
    picture(tmp_path / "JPEGImages" / "3.jpg")
    write(tmp_path / "Annotations" / "4.xml", "<annotation>\n<object>\n<name>dog</nam\n")
    write_voc_image(tmp_path, "5", voc_object("dog", 1, 1, 50, 50))
    (tmp_path / "JPEGImages" / "5.jpg").write_bytes(b"no image")
    objects, faults = converted("uodb_comic", tmp_path)["train"]
    assert objects == {"JPEGImages/1.jpg": [("dog", 0, 0, 50, 50, False)]}
    xml = tmp_path / "Annotations"
    expected = [
        (f"{xml}/1.xml:4", "the class 'unicorn' is unknown"),
        (f"{xml}/1.xml:6", "no readable number"),
        (f"{xml}/1.xml:7", "no bndbox/xmin"),
        (f"{xml}/1.xml:3", "(100, 0, 120, 80) lies outside its image of 100 x 80"),
        (f"{xml}/1.xml:5", "(8, 8, 5, 20) has no area"),
        (f"{tmp_path}/ImageSets/Main/train.txt:2", "2.jpg does not exist"),
        (f"{tmp_path}/ImageSets/Main/train.txt:3", "3.xml does not exist"),
        (f"{xml}/4.xml:3", "no readable xml"),
        (f"{tmp_path}/ImageSets/Main/train.txt:5", "cannot be read"),
    ]
    assert_faults(faults, expected)
    assert SOURCES["uodb_comic"].faults(tmp_path, 3) == faults[:3]


def test_command_reports_counts_and_faults(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    SOURCES["uodb_kitti"].smoke(tmp_path)
    label = tmp_path / "training" / "label_2" / "000003.txt"
    label.write_text(kitti_row("Bus", 1, 1, 9, 9) + "\n" + kitti_row("Car", 1, 1, 9, 9))
    assert prepare_data(["uodb_kitti", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert f"train: 28 images, 55 boxes and 4 to ignore -> {tmp_path}/gppf_ds_coco/train.json; 1 broken" in out
    assert f"{label}:1: the class 'Bus' is unknown." in out
    assert "val: 2 images, 4 boxes and 0 to ignore" in out


def test_command_refuses_what_it_cannot_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"VOCdevkit/VOC2007/JPEGImages does not exist: host.robots.ox.ac.uk"):
        prepare_data(["uodb_voc", str(tmp_path)])
    with pytest.raises(UserError, match="'coco' is not one that is converted: choose from uodb_kitti"):
        prepare_data(["coco", str(tmp_path)])
    SOURCES["uodb_lisa"].smoke(tmp_path)
    (tmp_path / "allAnnotations.csv").write_bytes(b"\xff\xfe\x00 no text")
    with pytest.raises(UserError, match=r"allAnnotations.csv cannot be read"):
        prepare_data(["uodb_lisa", str(tmp_path)])
    assert_faults(SOURCES["uodb_lisa"].faults(tmp_path, 5), [(str(tmp_path / "allAnnotations.csv"), "cannot be read")])


def test_read_only_data_are_converted_into_the_users_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, cache = tmp_path / "data", tmp_path / "cache"
    SOURCES["uodb_lisa"].smoke(root)
    beside = annotation_file(root, "train")
    assert beside is not None
    for path in beside.parent.iterdir():
        path.unlink()
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != beside.parent and access(path, mode))
    summaries = prepare("uodb_lisa", root)
    assert all(cache in summary.json.parents for summary in summaries)
    found = places("uodb_lisa", root)
    assert found["train"] == summaries[0].json
    assert found["train_images"] == root


@needs_blood
def test_real_boxes_come_through_voc_xml_as_they_are(tmp_path: Path) -> None:
    """Blood cells with boxes that people drew, written as VOC xml and read back."""
    write_blood(tmp_path, train="val", test="val")
    content = json.loads((BLOOD / "annotations" / "val.json").read_text())
    by_image: dict[int, list[Any]] = {image["id"]: [] for image in content["images"]}
    for entry in content["annotations"]:
        by_image[entry["image_id"]].append(entry)
    objects, faults = converted("uodb_watercolor", tmp_path)["val"]
    assert faults == []
    assert len(objects) == 87
    for image in content["images"]:
        expected = [(BLOOD_CLASSES[e["category_id"]], *e["bbox"], False) for e in by_image[image["id"]]]
        assert objects[f"JPEGImages/{Path(image['file_name']).stem}.jpg"] == expected
