"""Checks a COCO data set (train and val) before any training starts, without opening an image."""

from __future__ import annotations

import json
import logging
import math
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

from gppf_ds.errors import UserError

logger = logging.getLogger(__name__)

_IMAGES_LOOKED_FOR = 4

# What the loaders and the evaluation read; the format itself names more (https://cocodataset.org/#format-data).
_KEYS = {
    "images": ("id", "file_name", "width", "height"),
    "annotations": ("id", "image_id", "category_id", "bbox", "area"),
    "categories": ("id", "name"),
}

Entries = list[dict[str, Any]]


def check_coco(train: Path, val: Path, train_images: Path, val_images: Path) -> list[str]:
    """Checks two COCO json files against each other and against their image folders.

    A box that the loaders skip (a side below 1 pixel, no area, or no overlap with its image) is no error as long as
    others are left: the number per file is logged as a warning. Of the images only the first few are looked for, so
    the time is that of reading the json.

    Args:
        train: json of the train split.
        val: json of the val split.
        train_images: folder that the ``file_name`` of the train json starts from.
        val_images: folder that the ``file_name`` of the val json starts from.

    Returns:
        The class names in the order of their category ids.

    Raises:
        UserError: a file or key is missing, ids are unknown or not unique, the categories differ or are out of order,
            no image, annotation or usable box is there, or an image folder does not hold the images.
    """
    train_categories = _check_file(train, train_images)
    val_categories = _check_file(val, val_images)
    _check_same(train_categories, val_categories, train, val)
    return list(train_categories.values())


def _check_file(path: Path, folder: Path) -> dict[int, str]:
    """Checks one json and its images; gives the names by category id."""
    images, annotations, categories = _read(path)
    names = _check_categories(categories, path)
    for key, entries in (("images", images), ("annotations", annotations)):
        repeated = _first_repeated([entry["id"] for entry in entries])
        if repeated is not None:
            raise UserError(f"{path}: the id {repeated} occurs twice in '{key}': give every entry its own id.")
    _check_annotations(annotations, images, names, path)
    _check_images(images, folder, path)
    return names


def _read(path: Path) -> tuple[Entries, Entries, Entries]:
    try:
        with path.open("rb") as file:
            content = json.load(file)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): point to a COCO json file.") from error
    except ValueError as error:
        raise UserError(f"{path} is not valid json ({error}): write or download it again.") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} is not a COCO json: its top level has to be an object with {', '.join(_KEYS)}.")
    images, annotations, categories = (_entries(content, key, path) for key in _KEYS)
    return images, annotations, categories


def _entries(content: dict[str, Any], key: str, path: Path) -> Entries:
    entries = content.get(key)
    if not isinstance(entries, list):
        raise UserError(f"{path} has no list '{key}': it has to be a COCO json with {', '.join(_KEYS)}.")
    if not entries:
        raise UserError(f"{path} has an empty list '{key}': there is nothing to train or evaluate on.")
    needed = set(_KEYS[key])
    for index, entry in enumerate(entries):
        if not isinstance(entry, dict) or not needed <= entry.keys():
            raise UserError(f"{path}: entry {index} of '{key}' has to be an object with {', '.join(_KEYS[key])}.")
    return entries


def _check_categories(categories: Entries, path: Path) -> dict[int, str]:
    ids = [category["id"] for category in categories]
    names = [category["name"] for category in categories]
    if not all(isinstance(number, int) for number in ids):
        raise UserError(f"{path}: a category id is not an integer: number the categories.")
    for what, repeated in (("id", _first_repeated(ids)), ("name", _first_repeated(names))):
        if repeated is not None:
            raise UserError(f"{path}: two categories have the {what} {repeated!r}: merge or rename one.")
    # mmdet and pycocotools number the classes by their place in the list; out of order, the names would be mixed up.
    unsorted = [a for a, b in pairwise(ids) if a > b]
    if unsorted:
        raise UserError(f"{path}: 'categories' is out of order after id {unsorted[0]}: sort the list by id.")
    return dict(zip(ids, names, strict=True))


def _check_annotations(annotations: Entries, images: Entries, names: dict[int, str], path: Path) -> None:
    sizes = {image["id"]: (image["width"], image["height"]) for image in images}
    for image, size in sizes.items():
        if not _are_numbers([*size]):
            raise UserError(f"{path}: image {image} has the width and height {size}: write them as numbers.")
    skipped = 0
    for annotation in annotations:
        for key, known in (("category_id", names), ("image_id", sizes)):
            if annotation[key] not in known:
                raise UserError(
                    f"{path}: annotation {annotation['id']} has the {key} {annotation[key]!r}, which the file does "
                    f"not list: add it or remove the annotation."
                )
        box, area = annotation["bbox"], annotation["area"]
        if not (isinstance(box, list) and len(box) == 4 and _are_numbers([*box, area])):
            raise UserError(
                f"{path}: annotation {annotation['id']} has the bbox {box!r} and the area {area!r}: write the box as "
                f"[x, y, width, height] and the area as a number, in pixels."
            )
        skipped += _is_skipped(box, area, *sizes[annotation["image_id"]])
    if skipped == len(annotations):
        raise UserError(f"{path} has no usable box: all {skipped} are empty or outside their image.")
    if skipped:
        logger.warning(
            "%s: %d of %d boxes are empty or outside their image and skipped", path, skipped, len(annotations)
        )


def _are_numbers(values: list[Any]) -> bool:
    return all(isinstance(value, int | float) and math.isfinite(value) for value in values)


def _is_skipped(box: list[float], area: float, image_width: float, image_height: float) -> bool:
    """The rule of mmdet's CocoDataset."""
    x, y, width, height = box
    outside = x >= image_width or y >= image_height or x + width <= 0 or y + height <= 0
    return outside or width < 1 or height < 1 or area <= 0


def _check_images(images: Entries, folder: Path, path: Path) -> None:
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder: point to the images of {path}.")
    for image in images[:_IMAGES_LOOKED_FOR]:
        if not (folder / image["file_name"]).is_file():
            raise UserError(
                f"{folder / image['file_name']}, listed in {path}, does not exist: correct the image folder."
            )


def _check_same(train: dict[int, str], val: dict[int, str], train_path: Path, val_path: Path) -> None:
    for number in sorted(train.keys() | val.keys()):
        ours, theirs = train.get(number), val.get(number)
        if ours != theirs:
            raise UserError(
                f"The category {number} is {ours!r} in {train_path} and {theirs!r} in {val_path}: both files need the "
                f"same categories (None means not listed)."
            )


def _first_repeated(values: list[Any]) -> Any | None:
    return next((value for value, count in Counter(values).items() if count > 1), None)
