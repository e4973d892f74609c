"""Tiny sets in the official formats of COCO, LVIS, Objects365 and the Open Images challenge, with all their classes."""

from __future__ import annotations

import ast
import csv
import importlib.util
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from gppf_ds.errors import UserError

WIDTH, HEIGHT = 128, 96
TRAIN_IMAGES, VAL_IMAGES = 6, 4

OPEN_IMAGES_FILES = tuple(
    f"challenge2019/challenge-2019-{name}"
    for name in (
        "classes-description-500.csv",
        "label500-hierarchy.json",
        "train-detection-bbox.csv",
        "train-detection-human-imagelabels.csv",
        "validation-detection-bbox.csv",
        "validation-detection-human-imagelabels.csv",
    )
)

_COLOURS = ("red", "lime", "blue")
_SKIPPED_COCO_IDS = {12, 26, 29, 30, 45, 66, 68, 69, 71, 83}
"""COCO numbers its 80 classes from 1 to 90 with these left out."""


@dataclass(frozen=True)
class _Thing:
    """A rectangle in an image; the class is a colour."""

    kind: int
    x: int
    y: int
    width: int
    height: int


def coco(root: Path) -> None:
    """``instances_*2017.json`` with polygons, a crowd as run lengths, and a val image without objects."""
    names = class_names("datasets/coco.py", "CocoDataset")
    ids = [number for number in range(1, 91) if number not in _SKIPPED_COCO_IDS]
    categories = [{"id": n, "name": name, "supercategory": "thing"} for n, name in zip(ids, names, strict=True)]
    for split, images in _splits(("train2017", "val2017")):
        places = [f"{number:012d}.jpg" for number in images]
        content = _json(root / split, places, images, categories)
        crowd = content["annotations"][0]
        crowd["iscrowd"], crowd["segmentation"] = 1, _run_lengths(crowd["bbox"])
        _write_json(root / f"annotations/instances_{split}.json", content)


def lvis(root: Path) -> None:
    """``lvis_v1_*.json``: rare, common and frequent classes, verified absent and not exhaustively labelled ones."""
    names = class_names("datasets/lvis.py", "LVISV1Dataset")
    counts = {"r": 1, "c": 10, "f": 100}
    categories: list[dict[str, Any]] = []
    for number, name in enumerate(names, start=1):
        frequency = "rcf"[number % 3]
        facts = {"synset": f"{name}.n.01", "synonyms": [name], "def": name, "frequency": frequency}
        used = {"image_count": counts[frequency], "instance_count": counts[frequency]}
        categories.append({"id": number, "name": name} | facts | used)
    for split, images in _splits(("train2017", "val2017")):
        content = _json(root / split, [f"{number:012d}.jpg" for number in images], images, categories)
        for image in content["images"]:
            image["coco_url"] = f"http://images.cocodataset.org/{split}/{image.pop('file_name')}"
            image |= {"neg_category_ids": [4, 5], "not_exhaustive_category_ids": [1]}
        for annotation in content["annotations"]:
            del annotation["iscrowd"]
        _write_json(root / f"annotations/lvis_v1_{split.removesuffix('2017')}.json", content)


def objects365(root: Path) -> None:
    """``zhiyuan_objv2_*.json``: boxes only, a crowd, images in patches."""
    names = class_names("datasets/objects365.py", "Objects365V2Dataset")
    categories = [{"id": number, "name": name} for number, name in enumerate(names, start=1)]
    for split, images in _splits(("train", "val")):
        places = [f"patch{number % 2}/objects365_v2_{number:08d}.jpg" for number in images]
        content = _json(root / split, places, images, categories)
        for image in content["images"]:
            image["file_name"] = f"images/v2/{image['file_name']}"
        for annotation in content["annotations"]:
            del annotation["segmentation"]
            annotation |= {"isfake": 0, "isreflected": 0}
        content["annotations"][0]["iscrowd"] = 1
        _write_json(root / f"annotations/zhiyuan_objv2_{split}.json", content)


def open_images(root: Path) -> None:
    """The csv files of the challenge with a group-of box and a validation image of verified absent classes only.

    The class names are the challenge's, their ids (MIDs) made up, and of the hierarchy there are two levels.
    """
    names = class_names("evaluation/functional/class_names.py", "oid_challenge_classes")
    mids = [f"/m/smoke{number:03d}" for number in range(len(names))]
    folder = root / "challenge2019"
    folder.mkdir(parents=True, exist_ok=True)
    _write_csv(folder / "challenge-2019-classes-description-500.csv", [[*row] for row in zip(mids, names, strict=True)])
    parent = {"LabelName": mids[3], "Subcategory": [{"LabelName": mid} for mid in mids[:3]]}
    tree = {"LabelName": "/m/0bl9f", "Subcategory": [parent, *({"LabelName": mid} for mid in mids[4:])]}
    _write_json(folder / "challenge-2019-label500-hierarchy.json", tree)
    for split, images in _splits(("train", "validation")):
        boxes = [["ImageID", "LabelName", "XMin", "XMax", "YMin", "YMax", "IsGroupOf"]]
        labels = [["ImageID", "LabelName", "Confidence"]]
        for number in images:
            name = f"{number:016x}"
            for thing in _draw(root / f"OpenImages/{split}/{name}.jpg", number):
                sides = [thing.x / WIDTH, (thing.x + thing.width) / WIDTH]
                sides += [thing.y / HEIGHT, (thing.y + thing.height) / HEIGHT]
                group = str(int(len(boxes) == 1))
                boxes.append([name, mids[thing.kind], *(f"{side:.6f}" for side in sides), group])
                labels.append([name, mids[thing.kind], "1"])
            labels.append([name, mids[4], "0"])
        _write_csv(folder / f"challenge-2019-{split}-detection-bbox.csv", boxes)
        _write_csv(folder / f"challenge-2019-{split}-detection-human-imagelabels.csv", labels)


def class_names(file: str, definition: str) -> list[str]:
    """The list of classes in mmdet's source, read without importing it, which takes seconds.

    Raises:
        UserError: mmdet is not installed or has no such list there.
    """
    spec = importlib.util.find_spec("mmdet")
    if spec is None or spec.origin is None:
        raise UserError("mmdet is not installed: install gppf-ds with its dependencies.")
    tree = ast.parse((Path(spec.origin).parent / file).read_text())
    for node in tree.body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == definition:
            for part in ast.walk(node):
                if isinstance(part, ast.Tuple | ast.List) and len(part.elts) >= 80:
                    return [str(name) for name in ast.literal_eval(part)]
    raise UserError(f"This version of mmdet has no list of classes in {definition} of {file}: install the pinned one.")


def _splits(names: tuple[str, str]) -> list[tuple[str, range]]:
    """The numbers of the images of train and val."""
    return [(names[0], range(1, 1 + TRAIN_IMAGES)), (names[1], range(101, 101 + VAL_IMAGES))]


def _json(folder: Path, places: Sequence[str], ids: Sequence[int], categories: list[dict[str, Any]]) -> dict[str, Any]:
    """Draws the images and describes them in COCO's format."""
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number, place in zip(ids, places, strict=True):
        images.append({"id": number, "file_name": place, "width": WIDTH, "height": HEIGHT, "license": 1})
        for thing in _draw(folder / place, number):
            x, y, right, bottom = thing.x, thing.y, thing.x + thing.width, thing.y + thing.height
            shape = {"bbox": [x, y, thing.width, thing.height], "area": thing.width * thing.height, "iscrowd": 0}
            shape["segmentation"] = [[x, y, right, y, right, bottom, x, bottom]]
            owner = {"image_id": number, "category_id": categories[thing.kind]["id"]}
            annotations.append({"id": len(annotations) + 1} | owner | shape)
    licenses = [{"id": 1, "name": "none", "url": ""}]
    return {
        "info": {"description": "smoke"},
        "licenses": licenses,
        "images": images,
        "annotations": annotations,
        "categories": categories,
    }


def _draw(path: Path, number: int) -> list[_Thing]:
    """Writes an image; gives the two or three things in it, none in the last of val."""
    chance = random.Random(number)
    things = []
    for _ in range(0 if number == 100 + VAL_IMAGES else chance.choice((2, 3))):
        width, height = chance.randint(34, 50), chance.randint(34, 50)
        place = (chance.randint(0, WIDTH - width), chance.randint(0, HEIGHT - height))
        things.append(_Thing(chance.randrange(3), *place, width, height))
    picture = Image.new("RGB", (WIDTH, HEIGHT), (70, 70, 70))
    for thing in things:
        corners = (thing.x, thing.y, thing.x + thing.width - 1, thing.y + thing.height - 1)
        ImageDraw.Draw(picture).rectangle(corners, _COLOURS[thing.kind])
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path)
    return things


def _run_lengths(box: Sequence[int]) -> dict[str, Any]:
    """A box as uncompressed run lengths of COCO: column by column, background first."""
    x, y, width, height = box
    counts = [x * HEIGHT + y, *([height, HEIGHT - height] * width)]
    counts[-1] += HEIGHT * WIDTH - sum(counts)
    return {"size": [HEIGHT, WIDTH], "counts": counts}


def _write_json(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def _write_csv(path: Path, rows: list[list[str]]) -> None:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(rows)
