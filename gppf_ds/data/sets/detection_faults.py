"""Broken annotations of COCO, LVIS, Objects365 and Open Images, each named with its file and id or line."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal

from gppf_ds.data.scan import first_faults

IMAGES_OPENED = 5_000
"""Of every split so many image files are looked at, first to last."""

_TAIL = 4096
_END_OF_JPEG = b"\xff\xd9"
_OPEN_IMAGES = (
    ("challenge-2019-train-detection-bbox.csv", "train"),
    ("challenge-2019-validation-detection-bbox.csv", "validation"),
)
_BOX_COLUMNS = ("ImageID", "LabelName", "XMin", "XMax", "YMin", "YMax", "IsGroupOf")


@dataclass(frozen=True)
class JsonSplit:
    """A split in the format of COCO: places below the root of the set."""

    annotations: str
    images: str
    kind: Literal["coco", "lvis", "objects365"] = "coco"

    def place(self, image: Mapping[str, Any]) -> str:
        """The file of an entry of ``images``, below the folder of the images."""
        if self.kind == "lvis":  # images of its val split are in COCO's train2017 too: only the address tells
            return "/".join(image["coco_url"].split("/")[-2:])
        if self.kind == "objects365":  # images/v1/patch8/NAME.jpg is unpacked to patch8/NAME.jpg
            return "/".join(image["file_name"].split("/")[-2:])
        return str(image["file_name"])


def json_faults(splits: Mapping[str, JsonSplit], root: Path, limit: int) -> list[str]:
    """The first faults of splits in COCO's format; see :attr:`gppf_ds.data.source.Source.faults`.

    All annotations are looked at, and of the images the first :data:`IMAGES_OPENED` per split: whether they are there
    and their jpeg stream has its end.
    """
    return list(islice(chain.from_iterable(_of_split(split, root, limit) for split in splits.values()), limit))


def _of_split(split: JsonSplit, root: Path, limit: int) -> Iterator[str]:
    path = root / split.annotations
    try:
        content = json.loads(path.read_bytes())
        images = {image["id"]: image for image in content["images"]}
        categories = {category["id"] for category in content["categories"]}
        annotations = content["annotations"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        yield f"{path} is not in the format of COCO ({error!r})."
        return
    for image in images.values() if split.kind == "lvis" else ():
        for key in ("neg_category_ids", "not_exhaustive_category_ids"):
            if key not in image:
                yield f"{path}: image {image['id']} has no {key}."
    for annotation in annotations:
        try:
            fault = _annotation_fault(annotation, images, categories)
        except (KeyError, TypeError, ValueError) as error:
            fault = f"cannot be read ({error!r})"
        if fault:
            yield f"{path}: annotation {annotation.get('id')} {fault}."
    files = [root / split.images / split.place(image) for image in islice(images.values(), IMAGES_OPENED)]
    yield from first_faults(_image_fault, files, limit)


def _annotation_fault(annotation: Mapping[str, Any], images: Mapping[int, Any], categories: set[int]) -> str | None:
    if annotation["category_id"] not in categories:
        return f"has the category_id {annotation['category_id']!r}, which is not listed"
    image = images.get(annotation["image_id"])
    if image is None:
        return f"has the image_id {annotation['image_id']!r}, which is not listed"
    x, y, width, height = annotation["bbox"]
    if not all(map(math.isfinite, (x, y, width, height))) or width < 1 or height < 1:
        return f"has the box {annotation['bbox']} without a size"
    if x >= image["width"] or y >= image["height"] or x + width <= 0 or y + height <= 0:
        return f"has the box {annotation['bbox']} outside its image of {image['width']} x {image['height']} pixels"
    mask = annotation.get("segmentation")
    return "has a mask without area" if mask is not None and not _mask_area(mask, image) else None


def _mask_area(mask: Any, image: Mapping[str, Any]) -> float:
    """Of polygons by the shoelace formula, of run lengths in pixels."""
    if isinstance(mask, list):
        return max((_polygon_area(polygon) for polygon in mask), default=0.0)
    if isinstance(mask["counts"], list):
        return float(sum(mask["counts"][1::2]))
    from pycocotools import mask as rle

    return float(rle.area({"size": [image["height"], image["width"]], "counts": mask["counts"].encode()}))


def _polygon_area(polygon: list[float]) -> float:
    xs, ys = polygon[::2], polygon[1::2]
    return abs(sum(x * (ys[i - 1] - ys[(i + 1) % len(ys)]) for i, x in enumerate(xs))) / 2


def _image_fault(path: Path) -> str | None:
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - _TAIL))
            tail = file.read()
    except OSError as error:
        return f"{path} cannot be read ({error.strerror})."
    return None if _END_OF_JPEG in tail else f"{path} is a truncated jpeg: it has no end."


def open_images_faults(root: Path, limit: int) -> list[str]:
    """The first faults of the challenge's csv files; see :attr:`gppf_ds.data.source.Source.faults` and above."""
    folder = root / "challenge2019"
    classes = folder / "challenge-2019-classes-description-500.csv"
    try:
        with classes.open(newline="") as file:
            known = {row[0] for row in csv.reader(file) if row}
    except OSError as error:
        return [f"{classes} cannot be read ({error.strerror})."]
    splits = [_of_csv(folder / name, root / "OpenImages" / images, known, limit) for name, images in _OPEN_IMAGES]
    return list(islice(chain.from_iterable(splits), limit))


def _of_csv(path: Path, folder: Path, known: set[str], limit: int) -> Iterator[str]:
    images: dict[str, None] = {}
    try:
        with path.open(newline="") as file:
            reader = csv.DictReader(file)
            missing = [name for name in _BOX_COLUMNS if name not in (reader.fieldnames or ())]
            if missing:
                yield f"{path} has no column {missing[0]}."
                return
            for row in reader:
                if fault := _row_fault(row, known):
                    yield f"{path}:{reader.line_num} {fault}."
                elif len(images) < IMAGES_OPENED:
                    images[row["ImageID"]] = None
    except (OSError, csv.Error) as error:
        yield f"{path} cannot be read ({error})."
    yield from first_faults(_image_fault, (folder / f"{image}.jpg" for image in images), limit)


def _row_fault(row: Mapping[str, Any], known: set[str]) -> str | None:
    if None in row or None in row.values():
        return "has a wrong number of columns"
    if row["LabelName"] not in known:
        return f"has the unknown class {row['LabelName']}"
    if row["IsGroupOf"] not in ("0", "1"):
        return f"has IsGroupOf {row['IsGroupOf']!r}, not 0 or 1"
    try:
        left, right, top, bottom = (float(row[key]) for key in ("XMin", "XMax", "YMin", "YMax"))
    except ValueError as error:
        return f"has a corner that is no number ({error})"
    if not (0 <= left < right <= 1 and 0 <= top < bottom <= 1):
        return f"has the box {left} to {right}, {top} to {bottom}, which is outside its image or has no size"
    return None
