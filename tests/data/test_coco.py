import copy
import json
import logging
import time
from pathlib import Path

import pytest

from gppf_ds.data.coco import check_coco
from gppf_ds.errors import UserError

COCO200 = Path(__file__).parents[3] / "shared/data/coco200"

GOOD = {
    "images": [
        {"id": 7, "file_name": "a.jpg", "width": 64, "height": 48},
        {"id": 9, "file_name": "b.jpg", "width": 64, "height": 48},
    ],
    "annotations": [
        {"id": 1, "image_id": 7, "category_id": 2, "bbox": [0, 0, 10, 10], "area": 100, "iscrowd": 0},
        {"id": 2, "image_id": 9, "category_id": 5, "bbox": [5, 5, 10, 10], "area": 100, "iscrowd": 0},
    ],
    "categories": [{"id": 2, "name": "cat"}, {"id": 5, "name": "dog"}],
}


@pytest.fixture
def data(tmp_path):
    """Writes a pair of jsons with their images; ``change`` plants a fault in the train json."""
    for split in ("train", "val"):
        (tmp_path / split).mkdir()
        for image in GOOD["images"]:
            (tmp_path / split / image["file_name"]).touch()

    def check(change=None, split="train"):
        for name in ("train", "val"):
            content = copy.deepcopy(GOOD)
            if change is not None and name == split:
                content = change(content) or content
            (tmp_path / f"{name}.json").write_text(content if isinstance(content, str) else json.dumps(content))
        return check_coco(*(tmp_path / n for n in ("train.json", "val.json", "train", "val")))

    return check


def test_names_in_id_order(data):
    assert data() == ["cat", "dog"]


def _set(key, index, **values):
    return lambda content: content[key][index].update(values)


def _drop(key, index, name):
    return lambda content: content[key][index].pop(name) and None


FAULTS = {
    "not json": (lambda c: "{", "train.json is not valid json"),
    "a list": (lambda c: "[]", "top level"),
    "no list": (lambda c: c.pop("categories") and None, "no list 'categories'"),
    "no images": (lambda c: c["images"].clear(), "empty list 'images'"),
    "no annotations": (lambda c: c["annotations"].clear(), "empty list 'annotations'"),
    "entry without key": (_drop("annotations", 1, "bbox"), "entry 1 of 'annotations' has to be .*bbox"),
    "other name": (_set("categories", 1, name="wolf"), "category 5 is 'wolf' in .*train.json and 'dog'"),
    "category only here": (lambda c: c["categories"].append({"id": 6, "name": "x"}), "category 6 is 'x' .* None"),
    "category twice": (_set("categories", 1, id=2), "two categories have the id 2"),
    "name twice": (_set("categories", 1, name="cat"), "two categories have the name 'cat'"),
    "out of order": (lambda c: c["categories"].reverse(), "out of order after id 5"),
    "text id": (_set("categories", 1, id="5"), "not an integer"),
    "unknown category": (_set("annotations", 1, category_id=4), "train.json: annotation 2 has the category_id 4"),
    "unknown image": (_set("annotations", 0, image_id=8), "train.json: annotation 1 has the image_id 8"),
    "image twice": (_set("images", 1, id=7), "id 7 occurs twice in 'images'"),
    "annotation twice": (_set("annotations", 1, id=1), "id 1 occurs twice in 'annotations'"),
    "short box": (_set("annotations", 0, bbox=[1, 2, 3]), r"annotation 1 has the bbox \[1, 2, 3\]"),
    "no number": (_set("annotations", 0, bbox=[1, 2, 3, None]), "annotation 1 has the bbox"),
    "no area": (_set("annotations", 0, area=None), "the area None"),
    "no width": (_set("images", 0, width=None), "image 7 has the width"),
    "missing image": (_set("images", 1, file_name="c.jpg"), "c.jpg, listed in .* does not exist"),
    "all empty": (
        lambda c: [a.update(bbox=[0, 0, 0, 5]) for a in c["annotations"]] and None,
        "no usable box: all 2",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_refused(data, fault):
    change, message = FAULTS[fault]
    with pytest.raises(UserError, match=message):
        data(change)


def test_faults_in_val_are_refused(data):
    with pytest.raises(UserError, match=r"val\.json: annotation 2"):
        data(_set("annotations", 1, category_id=4), split="val")


def test_missing_files(tmp_path, data):
    data()
    paths = [tmp_path / name for name in ("train.json", "val.json", "train", "val")]
    with pytest.raises(UserError, match=r"gone\.json cannot be read"):
        check_coco(tmp_path / "gone.json", *paths[1:])
    with pytest.raises(UserError, match="gone is not a folder"):
        check_coco(*paths[:3], tmp_path / "gone")


@pytest.mark.parametrize("box", [[0, 0, 0, 5], [0, 0, 5, -1], [64, 0, 5, 5], [-9, 0, 5, 5], [0, 48, 5, 5]])
def test_boxes_the_loaders_skip_are_counted(data, box, caplog):
    with caplog.at_level(logging.WARNING):
        assert data(_set("annotations", 0, bbox=box)) == ["cat", "dog"]
    assert "train.json: 1 of 2 boxes" in caplog.text


def test_box_over_the_border_is_kept(data, caplog):
    assert data(_set("annotations", 0, bbox=[-5, -5, 100, 100])) == ["cat", "dog"]
    assert not caplog.text


def test_no_look_at_every_image(tmp_path):
    """120,000 images, only the first of which exist: stands for COCO's size, and is done in seconds."""
    count = 120_000
    images = [{"id": i, "file_name": f"{i}.jpg", "width": 64, "height": 64} for i in range(count)]
    annotations = [{"id": i, "image_id": i, "category_id": 1, "bbox": [0, 0, 9, 9], "area": 81} for i in range(count)]
    content = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "x"}]}
    (tmp_path / "a.json").write_text(json.dumps(content))
    for i in range(10):
        (tmp_path / f"{i}.jpg").touch()
    start = time.process_time()
    assert check_coco(tmp_path / "a.json", tmp_path / "a.json", tmp_path, tmp_path) == ["x"]
    assert time.process_time() - start < 20


@pytest.mark.skipif(not COCO200.is_dir(), reason="../shared/data/coco200 is not there")
def test_coco200():
    jsons = [COCO200 / f"annotations/instances_{split}.json" for split in ("train", "val")]
    names = check_coco(*jsons, COCO200 / "images/train", COCO200 / "images/val")
    assert len(names) == 80
    assert (names[0], names[-1]) == ("person", "toothbrush")
    with pytest.raises(UserError, match="does not exist"):
        check_coco(*jsons, COCO200 / "images/val", COCO200 / "images/train")
