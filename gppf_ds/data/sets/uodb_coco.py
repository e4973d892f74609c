"""Pictures with boxes on their way from an official layout into one COCO json per split."""

from __future__ import annotations

import hashlib
import json
import math
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from gppf_ds.data.user_cache import user_cache
from gppf_ds.errors import UserError

FOLDER = "gppf_ds_coco"
"""Beside the data, or in the user's cache: what the conversion writes."""


@dataclass(frozen=True)
class Box:
    """One object; edges in pixels, from 0 at the left and top edge of the image (not pixel indices)."""

    label: str
    left: float
    top: float
    right: float
    bottom: float
    ignored: bool = False
    """Neither to be found nor a mistake to find ("difficult", "DontCare", "invalid" ...)."""

    def fault(self, width: int, height: int) -> str | None:
        """What is wrong with the box in an image of this size, if anything is.

        A box that reaches over the edge of its image is none: the official files have them, as do their evaluators.
        """
        edges = (self.left, self.top, self.right, self.bottom)
        shown = f"({', '.join(f'{edge:g}' for edge in edges)})"
        if not all(map(math.isfinite, edges)):
            return f"the box {shown} is not finite"
        if self.right <= self.left or self.bottom <= self.top:
            return f"the box {shown} has no area"
        if self.right <= 0 or self.bottom <= 0 or self.left >= width or self.top >= height:
            return f"the box {shown} lies outside its image of {width} x {height}"
        return None


@dataclass(frozen=True)
class Picture:
    """An image file and what is in it."""

    file: str
    """Relative to the root of the data set, with slashes."""
    width: int
    height: int
    boxes: tuple[Box, ...]


@dataclass(frozen=True)
class Fault:
    """One broken row or file, which the conversion skips."""

    sentence: str
    """Names the file, and the line where there is one."""


Items = Iterator[Picture | Fault]
Row = tuple[str, Sequence[Box] | str]
"""Where it stands (file and line), and the boxes that the row stands for or what is wrong with it."""
Reader = Callable[[Path, str], Items]
"""(root, "train" or "val") -> what the official files of the split hold, in their order."""
Renderer = Callable[[Path, Picture, Path], Iterator[Picture]]
"""(root, picture, folder) -> the images written to ``folder`` in place of an official one; raises OSError."""


@dataclass
class Summary:
    """What the conversion of one split came to."""

    split: str
    json: Path
    images: int = 0
    boxes: int = 0
    ignored: int = 0
    faults: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        text = f"{self.split}: {self.images} images, {self.boxes} boxes and {self.ignored} to ignore -> {self.json}"
        if self.faults:
            text += f"; {len(self.faults)} broken entries skipped, listed in {faults_file(self.json)}"
        return text


def faults_file(annotations: Path) -> Path:
    """The list of what was skipped, beside the json."""
    return annotations.with_suffix(".faults.txt")


def image_size(path: Path) -> tuple[int, int]:
    """Width and height from the header of an image file; raises OSError if it has none."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # aerial images are large
            with Image.open(path) as image:
                return image.size
    except (SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise OSError(str(error)) from error


def picture(root: Path, file: str, rows: Iterable[Row], origin: str) -> Items:
    """The picture with those of its boxes that are sound; a fault for every other row, or for a missing image.

    Args:
        root: of the data set.
        file: of the image, relative to it.
        rows: what is said of the image.
        origin: where the image is named.
    """
    readable: list[tuple[str, Sequence[Box]]] = []
    for place, boxes in rows:
        if isinstance(boxes, str):
            yield Fault(f"{place}: {boxes}.")
        else:
            readable.append((place, boxes))
    try:
        width, height = image_size(root / file)
    except FileNotFoundError:
        yield Fault(f"{origin}: the image {root / file} does not exist.")
        return
    except OSError as error:
        yield Fault(f"{origin}: the image {root / file} cannot be read ({error}).")
        return
    sound: list[Box] = []
    for place, boxes in readable:
        fault = next((fault for box in boxes if (fault := box.fault(width, height))), None)
        if fault:
            yield Fault(f"{place}: {fault}.")
        else:
            sound += boxes
    yield Picture(file, width, height, tuple(sound))


def labelled_picture(root: Path, file: str, labels: Path, read: Callable[[str], Sequence[Box] | str]) -> Items:
    """The same of an image that has a text file of its own with a row on each line.

    Args:
        root: of the data set.
        file: of the image, relative to it.
        labels: the text file.
        read: the boxes that a line stands for, or what is wrong with it.
    """
    try:
        numbered = lines(labels)
    except OSError as error:
        yield Fault(f"{labels}: the label file cannot be read ({error.strerror or error}).")
        return
    yield from picture(root, file, ((f"{labels}:{number}", read(line)) for number, line in numbered), str(labels))


def lines(path: Path) -> list[tuple[int, str]]:
    """The lines of a text file that are not blank, each with its number from 1; raises OSError."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise OSError(f"{path} is not a text file ({error})") from error
    return [(number, line.strip()) for number, line in enumerate(text.splitlines(), 1) if line.strip()]


def required_lines(path: Path) -> list[tuple[int, str]]:
    """The same of a file without which nothing can be read; raises :class:`UserError`."""
    try:
        return lines(path)
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(f"{path} cannot be read ({reason}): unpack the data set's archives as they are.") from error


def annotation_file(root: Path, split: str) -> Path | None:
    """The json that the conversion of ``root`` wrote, or None."""
    found = (folder / f"{split}.json" for folder in _folders(root))
    return next((path for path in found if path.is_file()), None)


def output_folder(root: Path) -> Path:
    """Where the conversion of ``root`` writes: beside the data or, where that is read-only, in the user's cache."""
    beside, cache = _folders(root)
    try:
        beside.mkdir(exist_ok=True)
        if os.access(beside, os.W_OK):
            return beside
    except OSError:
        pass
    cache.mkdir(parents=True, exist_ok=True)
    return cache


def _folders(root: Path) -> tuple[Path, Path]:
    key = hashlib.sha256(str(root.resolve()).encode()).hexdigest()[:16]
    return root / FOLDER, user_cache() / "coco" / f"{root.resolve().name}-{key}"


def convert(
    root: Path,
    split: str,
    classes: Sequence[str],
    read: Reader,
    render: Renderer | None,
    progress: Callable[[int], None],
) -> Summary:
    """Writes ``SPLIT.json``, complete or not at all, and ``SPLIT.faults.txt``.

    Boxes to ignore become ``iscrowd``: mmdet does not train on them, and a metric can tell them from the others.

    Args:
        root: of the data set.
        split: "train" or "val".
        classes: the names, which get the category ids 1, 2, ...
        read: reads the official files.
        render: writes the images to train on, where the official ones will not do.
        progress: told the number of images so far.

    Raises:
        UserError: a file without which nothing can be read is missing, or nothing was found.
    """
    folder = output_folder(root)
    summary = Summary(split, folder / f"{split}.json")
    ids = {name: number for number, name in enumerate(classes, 1)}
    images: list[dict[str, Any]] = []
    objects: list[dict[str, Any]] = []
    for item in _rendered(root, read(root, split), render, folder / split):
        if isinstance(item, Fault):
            summary.faults.append(item.sentence)
            continue
        number = len(images) + 1
        images.append({"id": number, "file_name": item.file, "width": item.width, "height": item.height})
        objects += [_object(len(objects) + i, number, ids[box.label], box) for i, box in enumerate(item.boxes, 1)]
        progress(number)
    summary.images = len(images)
    summary.ignored = sum(entry["iscrowd"] for entry in objects)
    summary.boxes = len(objects) - summary.ignored
    if not summary.boxes:
        first = f" The first of {len(summary.faults)} faults: {summary.faults[0]}" if summary.faults else ""
        raise UserError(f"{root} has no usable {split} box: unpack the data set there completely.{first}")
    categories = [{"id": number, "name": name} for name, number in ids.items()]
    _write(summary.json, json.dumps({"images": images, "annotations": objects, "categories": categories}))
    _write(faults_file(summary.json), "".join(f"{fault}\n" for fault in summary.faults))
    return summary


def _rendered(root: Path, items: Items, render: Renderer | None, folder: Path) -> Items:
    for item in items:
        if isinstance(item, Fault) or render is None:
            yield item
            continue
        folder.mkdir(exist_ok=True)
        try:
            yield from render(root, item, folder)
        except (OSError, SyntaxError, ValueError) as error:
            yield Fault(f"{root / item.file}: the image cannot be read ({error}).")


def _object(number: int, image: int, category: int, box: Box) -> dict[str, Any]:
    width, height = box.right - box.left, box.bottom - box.top
    return {
        "id": number,
        "image_id": image,
        "category_id": category,
        "bbox": [box.left, box.top, width, height],
        "area": width * height,
        "iscrowd": int(box.ignored),
        "segmentation": [],
    }


def _write(path: Path, text: str) -> None:
    part = path.with_suffix(".part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)
