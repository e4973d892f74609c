"""Drawings of what tasks find, and COCO files, from descriptions alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as rle

from gppf_ds.transfer.coco_file import coco_content
from gppf_ds.transfer.drawing import AREA_COLOURS, LEAST_SCORE, draw

GREY = np.full((40, 60, 3), 100, np.uint8)


def one_object(label: int, score: float, box: list[float]) -> dict[str, Any]:
    mask = np.zeros((40, 60), np.uint8, order="F")
    mask[10:20, 5:25] = 1
    counts = rle.encode(mask)
    text = {"size": list(counts["size"]), "counts": counts["counts"].decode("ascii")}
    return {"class": f"thing {label}", "label": label, "score": score, "box": box, "mask": text}


FOUND: dict[str, dict[str, Any]] = {
    "kind": {"summary": "cat (0.90)", "classes": [{"name": "cat", "score": 0.9}, {"name": "dog", "score": 0.1}]},
    "things": {
        "summary": "2 found",
        "objects": [one_object(2, 0.8, [5, 10, 25, 20]), one_object(1, LEAST_SCORE / 2, [0, 0, 9, 9])],
    },
    "areas": {"summary": "", "labels": np.eye(40, 60, dtype=np.uint8), "classes": ["ground", "line"]},
    "far": {"summary": "", "depth": np.full((40, 60), 2500, np.uint16), "metres_per_unit": 0.001},
    "tags": {"summary": "sunny", "scores": {"sunny": 0.7}},
}


def panels() -> dict[str, Any]:
    return {axes.get_title(): axes for axes in draw(GREY, FOUND, "photo.jpg").axes}


def test_a_panel_per_task_beside_the_image() -> None:
    drawn = panels()
    assert [title for title in drawn if title] == ["photo.jpg", *FOUND]
    assert np.array_equal(drawn["photo.jpg"].images[0].get_array(), GREY)


def test_classes_are_bars() -> None:
    axes = panels()["kind"]
    assert [bar.get_width() for bar in axes.patches] == [0.9, 0.1]
    assert [text.get_text() for text in axes.texts] == ["cat  0.90", "dog  0.10"]


def test_likely_objects_have_box_and_mask() -> None:
    axes = panels()["things"]
    [box] = axes.patches
    assert (box.get_width(), box.get_height()) == (20, 10)
    assert [text.get_text() for text in axes.texts] == ["thing 2 0.80"]
    painted = np.asarray(axes.images[0].get_array())
    assert np.allclose(painted[0, 0], 100 / 255)
    assert not np.allclose(painted[15, 10], 100 / 255)


def test_regions_have_their_colours_and_a_legend() -> None:
    axes = panels()["areas"]
    painted = np.asarray(axes.images[0].get_array())
    assert len(np.unique(painted.reshape(-1, 3), axis=0)) == 2
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["ground", "line"]


def test_depth_is_in_metres() -> None:
    drawn = draw(GREY, {"far": FOUND["far"]}, "photo.jpg")
    assert np.allclose(drawn.axes[1].images[0].get_array(), 2.5)
    assert drawn.axes[2].get_ylabel() == "depth (m)"


def test_a_task_of_another_kind_shows_its_summary() -> None:
    assert [text.get_text() for text in panels()["tags"].texts] == ["sunny"]


def test_neighbouring_classes_differ() -> None:
    assert len(set(AREA_COLOURS)) == len(AREA_COLOURS)


def test_a_coco_file_numbers_images_and_turns_boxes(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        Image.fromarray(GREY).save(tmp_path / name)
    plain = {"class": "thing 0", "label": 0, "score": 0.5, "box": [1.0, 2.0, 4.0, 8.0]}
    content = coco_content({tmp_path / "a.png": [plain], tmp_path / "b.png": FOUND["things"]["objects"]})
    assert content["images"][1] == {"id": 2, "file_name": "b.png", "width": 60, "height": 40}
    assert content["categories"] == [{"id": number, "name": f"thing {number - 1}"} for number in (1, 2, 3)]
    assert [one["image_id"] for one in content["annotations"]] == [1, 2, 2]
    assert content["annotations"][0]["bbox"] == [1.0, 2.0, 3.0, 6.0]
    assert content["annotations"][0]["area"] == pytest.approx(18)
    assert content["annotations"][1]["area"] == 200  # of the mask
