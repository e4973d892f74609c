"""Official files of the UODB sets, written by hand, and what their conversion gives."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from gppf_ds.data.sets.uodb import CONVERSIONS, places, prepare
from gppf_ds.data.sets.uodb_coco import faults_file

BLOOD = Path(__file__).parents[3] / "shared" / "data" / "detection" / "bccd"
"""Blood smears with boxes that people drew."""
BLOOD_CLASSES = {1: "dog", 2: "cat", 3: "bird"}
"""Stand-ins by category id: the readers know the classes of the ten sets only."""
needs_blood = pytest.mark.skipif(not BLOOD.is_dir(), reason=f"{BLOOD} is not there")


def picture(path: Path, width: int = 100, height: int = 80) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((height, width, 3), 90, np.uint8)).save(path)


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def converted(name: str, root: Path) -> dict[str, Any]:
    """By split: the objects per file as (class, x, y, width, height, ignored), in order, and the faults."""
    result: dict[str, Any] = {}
    for summary in prepare(name, root):
        content = json.loads(summary.json.read_text())
        names = {entry["id"]: entry["name"] for entry in content["categories"]}
        assert tuple(names.values()) == CONVERSIONS[name].classes
        objects: dict[str, list[Any]] = {image["file_name"]: [] for image in content["images"]}
        files = {image["id"]: image["file_name"] for image in content["images"]}
        for entry in content["annotations"]:
            assert entry["area"] == pytest.approx(entry["bbox"][2] * entry["bbox"][3])
            objects[files[entry["image_id"]]].append(
                (names[entry["category_id"]], *entry["bbox"], bool(entry["iscrowd"]))
            )
        folder = places(name, root)[f"{summary.split}_images"]
        for image in content["images"]:
            with Image.open(folder / image["file_name"]) as opened:
                assert opened.size == (image["width"], image["height"])
        assert summary.images == len(objects)
        assert summary.boxes + summary.ignored == len(content["annotations"])
        assert faults_file(summary.json).read_text().splitlines() == summary.faults
        result[summary.split] = (objects, summary.faults)
    return result


def assert_faults(faults: list[str], expected: list[tuple[str, str]]) -> None:
    """One sentence for each (place, what), in order."""
    assert len(faults) == len(expected), faults
    for fault, (place, what) in zip(faults, expected, strict=True):
        assert fault.startswith(place)
        assert what in fault


def kitti_row(name: str, *box: object) -> str:
    return f"{name} 0.00 0 -1.57 {' '.join(map(str, box))} 1.5 1.6 3.7 1.0 1.7 20.0 -1.5"


def voc_object(name: str, *box: object, difficult: int = 0) -> str:
    corners = "".join(f"<{k}>{v}</{k}>" for k, v in zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True))
    part = "<part><name>head</name><bndbox><xmin>1</xmin></bndbox></part>"
    return f"<object><name>{name}</name><difficult>{difficult}</difficult><bndbox>{corners}</bndbox>{part}</object>"


def write_voc_image(root: Path, stem: str, *objects: str, image: bool = True) -> None:
    if image:
        picture(root / "JPEGImages" / f"{stem}.jpg")
    write(root / "Annotations" / f"{stem}.xml", "\n".join(["<annotation>", *objects, "</annotation>"]))


def write_voc_lists(root: Path, **lists: list[str]) -> None:
    for name, stems in lists.items():
        write(root / "ImageSets" / "Main" / f"{name}.txt", "\n".join(stems) + "\n")


def write_blood(root: Path, **lists: str) -> None:
    """Blood smears as the official files of Watercolor2k: for each list in ``ImageSets/Main`` one of their splits."""
    (root / "JPEGImages").mkdir(parents=True, exist_ok=True)
    for split in sorted(set(lists.values())):
        content = json.loads((BLOOD / "annotations" / f"{split}.json").read_text())
        objects: dict[int, list[str]] = {image["id"]: [] for image in content["images"]}
        for entry in content["annotations"]:
            x, y, w, h = entry["bbox"]
            corners = (x + 1, y + 1, x + w, y + h)
            objects[entry["image_id"]].append(voc_object(BLOOD_CLASSES[entry["category_id"]], *corners))
        stems = []
        for image in content["images"]:
            stems.append(Path(image["file_name"]).stem)
            write_voc_image(root, stems[-1], *objects[image["id"]], image=False)
            (root / "JPEGImages" / f"{stems[-1]}.jpg").symlink_to(BLOOD / "images" / split / image["file_name"])
        write_voc_lists(root, **{name: stems for name, chosen in lists.items() if chosen == split})
