"""The smoke sets of COCO, LVIS, Objects365 and Open Images: whole, counted, and every planted fault named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gppf_ds.data.sets.detection import SOURCES
from gppf_ds.data.sets.detection_smoke import TRAIN_IMAGES, VAL_IMAGES

JSON = {
    "coco": "annotations/instances_train2017.json",
    "lvis": "annotations/lvis_v1_train.json",
    "objects365": "annotations/zhiyuan_objv2_train.json",
}
CLASSES = {"coco": 80, "lvis": 1203, "objects365": 365}
CSV = "challenge2019/challenge-2019-validation-detection-bbox.csv"


@pytest.mark.parametrize("name", SOURCES)
def test_smoke_set_is_whole(name: str, tmp_path: Path) -> None:
    source = SOURCES[name]
    source.smoke(tmp_path)
    assert [place for place in source.layout if not (tmp_path / place).exists()] == []
    counts = source.count(tmp_path)
    assert counts.keys() == source.counts.keys()
    assert [value for key, value in counts.items() if "images" in key] == [TRAIN_IMAGES, VAL_IMAGES]
    assert {key: counts[key] for key in ("categories", "classes") if key in counts} == {
        key: source.counts[key] for key in ("categories", "classes") if key in source.counts
    }
    assert source.faults(tmp_path, 5) == []


@pytest.mark.parametrize("name", JSON)
def test_smoke_json_has_all_classes(name: str, tmp_path: Path) -> None:
    SOURCES[name].smoke(tmp_path)
    content = json.loads((tmp_path / JSON[name]).read_text())
    assert len({category["name"] for category in content["categories"]}) == CLASSES[name]
    assert max(category["id"] for category in content["categories"]) == (90 if name == "coco" else CLASSES[name])


def _outside(annotation: dict[str, Any]) -> None:
    annotation["bbox"][0] = 500


def _no_category(annotation: dict[str, Any]) -> None:
    annotation["category_id"] = 5000


def _flat_mask(annotation: dict[str, Any]) -> None:
    annotation["segmentation"] = [[1, 1, 5, 5, 9, 9]]


def _no_image(annotation: dict[str, Any]) -> None:
    annotation["image_id"] = 77


def _no_box(annotation: dict[str, Any]) -> None:
    del annotation["bbox"]


@pytest.mark.parametrize("name", JSON)
@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (_outside, "outside its image of 128 x 96"),
        (_no_category, "category_id 5000"),
        (_flat_mask, "mask without area"),
        (_no_image, "image_id 77"),
        (_no_box, "bbox"),
    ],
)
def test_a_broken_annotation_is_named(
    name: str, change: Callable[[dict[str, Any]], None], sentence: str, tmp_path: Path
) -> None:
    source = SOURCES[name]
    source.smoke(tmp_path)
    path = tmp_path / JSON[name]
    content = json.loads(path.read_text())
    change(content["annotations"][2])
    path.write_text(json.dumps(content))
    (fault,) = source.faults(tmp_path, 5)
    assert str(path) in fault
    assert "annotation 3 " in fault
    assert sentence in fault
    change(content["annotations"][1])
    path.write_text(json.dumps(content))
    assert len(source.faults(tmp_path, 5)) == 2
    assert len(source.faults(tmp_path, 1)) == 1


def test_lvis_without_its_federated_lists(tmp_path: Path) -> None:
    SOURCES["lvis"].smoke(tmp_path)
    path = tmp_path / JSON["lvis"]
    content = json.loads(path.read_text())
    del content["images"][1]["neg_category_ids"]
    path.write_text(json.dumps(content))
    assert SOURCES["lvis"].faults(tmp_path, 5) == [f"{path}: image 2 has no neg_category_ids."]
    path.write_text("{")
    assert len(SOURCES["lvis"].faults(tmp_path, 5)) == 1


@pytest.mark.parametrize("name", SOURCES)
def test_broken_images_are_named(name: str, tmp_path: Path) -> None:
    source = SOURCES[name]
    source.smoke(tmp_path)
    first, second = sorted(tmp_path.rglob("*.jpg"))[:2]
    first.write_bytes(first.read_bytes()[:-30])
    second.unlink()
    faults = source.faults(tmp_path, 5)
    assert len(faults) == 2
    assert any(str(first) in fault and "truncated" in fault for fault in faults)
    assert any(str(second) in fault and "No such file" in fault for fault in faults)


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ("0000000000000065,/m/smoke001,0.1,0.5", "columns"),
        ("0000000000000065,/m/nothing,0.1,0.5,0.1,0.5,0", "unknown class /m/nothing"),
        ("0000000000000065,/m/smoke001,0.1,1.5,0.1,0.5,0", "outside its image"),
        ("0000000000000065,/m/smoke001,0.5,0.5,0.1,0.5,0", "no size"),
        ("0000000000000065,/m/smoke001,0.1,a,0.1,0.5,0", "no number"),
        ("0000000000000065,/m/smoke001,0.1,0.5,0.1,0.5,x", "IsGroupOf"),
    ],
)
def test_a_bad_row_is_named_with_its_line(row: str, sentence: str, tmp_path: Path) -> None:
    source = SOURCES["openimages"]
    source.smoke(tmp_path)
    path = tmp_path / CSV
    lines = path.read_text().splitlines()
    lines.insert(3, row)
    path.write_text("\n".join(lines) + "\n")
    (fault,) = source.faults(tmp_path, 5)
    assert fault.startswith(f"{path}:4 ")
    assert sentence in fault
