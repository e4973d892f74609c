"""Plain text annotations: KITTI's label files, WIDER FACE's list, DOTA's quadrilaterals."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from PIL import Image

from gppf_ds.data.sets.uodb_coco import Box, Fault, Items, Picture, Row, labelled_picture, picture, required_lines
from gppf_ds.errors import UserError

KITTI_HELD_OUT = 15
KITTI_FIELDS = 15
KITTI_CLASSES = ("pedestrian", "cyclist", "car")
# A row of KITTI stands for these classes: to be found, or to be ignored as KITTI's own evaluation does.
KITTI_FOUND = {"Pedestrian": "pedestrian", "Cyclist": "cyclist", "Car": "car"}
KITTI_IGNORED: dict[str, tuple[str, ...]] = {
    "DontCare": KITTI_CLASSES,
    "Van": ("car",),
    "Person_sitting": ("pedestrian",),
    "Truck": (),
    "Tram": (),
    "Misc": (),
}

WIDER_FIELDS = 10
WIDER_INVALID = 7

DOTA_CROP, DOTA_OVERLAP = 1024, 200
DOTA_KEPT = 0.7


def read_kitti(root: Path, split: str) -> Items:
    """KITTI object (Geiger et al., CVPR 2012): ``training/image_2/*.png`` and ``training/label_2/*.txt``.

    The labels of the official test images are not public and the benchmark's authors name no other split, so every
    fifteenth image is held out, which leaves the "7k" of GPPF's table 8. Boxes are in pixels from 0.
    """
    images, labels = root / "training" / "image_2", root / "training" / "label_2"
    stems = sorted({path.stem for path in (*images.glob("*.png"), *labels.glob("*.txt"))})
    if not stems:
        raise UserError(f"{images} and {labels} hold nothing: unpack KITTI's data_object_image_2 and label_2 there.")
    for index, stem in enumerate(stems):
        if (index % KITTI_HELD_OUT == KITTI_HELD_OUT - 1) == (split == "val"):
            yield from labelled_picture(root, f"training/image_2/{stem}.png", labels / f"{stem}.txt", _kitti_row)


def _kitti_row(line: str) -> list[Box] | str:
    """The boxes of a row, one for each class that it concerns, or what is wrong with it."""
    fields = line.split()
    if len(fields) != KITTI_FIELDS:
        return f"the row has {len(fields)} fields in place of {KITTI_FIELDS}"
    try:
        left, top, right, bottom = map(float, fields[4:8])
    except ValueError as error:
        return f"the row has no readable number ({error})"
    if fields[0] in KITTI_FOUND:
        return [Box(KITTI_FOUND[fields[0]], left, top, right, bottom)]
    if fields[0] in KITTI_IGNORED:
        return [Box(label, left, top, right, bottom, ignored=True) for label in KITTI_IGNORED[fields[0]]]
    return f"the class {fields[0]!r} is unknown"


def read_wider(root: Path, split: str) -> Items:
    """WIDER FACE (Yang et al., CVPR 2016): ``wider_face_split/wider_face_SPLIT_bbx_gt.txt``.

    An image's name, its number of faces and one row for each: x, y, width, height, then blur, expression,
    illumination, invalid, occlusion, pose. ``invalid`` faces are to be ignored. Without a face there is a row of zeros.
    """
    source = root / "wider_face_split" / f"wider_face_{split}_bbx_gt.txt"
    groups: list[list[tuple[int, str]]] = []
    for number, line in required_lines(source):
        if line.endswith(".jpg"):
            groups.append([])
        if groups:
            groups[-1].append((number, line))
        else:
            yield Fault(f"{source}:{number}: the name of an image is expected, not {line!r}.")
    for (start, name), *rest in groups:
        yield from picture(root, f"WIDER_{split}/images/{name}", _wider_rows(source, start, rest), f"{source}:{start}")


def _wider_rows(source: Path, start: int, rest: list[tuple[int, str]]) -> Iterator[Row]:
    if not rest or not rest[0][1].isdigit():
        yield f"{source}:{start}", "no number of faces follows the image's name"
        return
    (counted, count), *faces = rest
    if int(count) == 0 and len(faces) == 1 and not any(field.strip("0") for field in faces[0][1].split()):
        return
    if int(count) != len(faces):
        yield f"{source}:{counted}", f"{count} faces are announced and {len(faces)} rows follow"
    for number, line in faces:
        yield f"{source}:{number}", _wider_row(line)


def _wider_row(line: str) -> list[Box] | str:
    """The face, or what is wrong with the row."""
    try:
        values = [int(field) for field in line.split()]
    except ValueError as error:
        return f"the row has no readable number ({error})"
    if len(values) != WIDER_FIELDS:
        return f"the row has {len(values)} fields in place of {WIDER_FIELDS}"
    x, y, width, height = values[:4]
    return [Box("face", x, y, x + width, y + height, ignored=bool(values[WIDER_INVALID]))]


def read_dota(root: Path, split: str, classes: Sequence[str]) -> Items:
    """DOTA v1.0 (Xia et al., CVPR 2018): ``SPLIT/images/*.png`` and ``SPLIT/labelTxt/*.txt``.

    A row has the corners x1 y1 ... x4 y4, the class and whether the object is difficult (then it is to be ignored); the
    box is the upright one around the corners, as in the official horizontal task. Two lines of origin may come first.
    """
    images, labels = root / split / "images", root / split / "labelTxt"
    stems = sorted({path.stem for path in (*images.glob("*.png"), *labels.glob("*.txt"))})
    if not stems:
        raise UserError(f"{images} and {labels} hold nothing: unpack DOTA's images and labelTxt archives there.")
    read = partial(_dota_row, classes=classes)
    for stem in stems:
        yield from labelled_picture(root, f"{split}/images/{stem}.png", labels / f"{stem}.txt", read)


def _dota_row(line: str, classes: Sequence[str]) -> list[Box] | str:
    """The upright box of a row, nothing for a line of origin, or what is wrong with it."""
    if line.startswith(("imagesource:", "gsd:")):
        return []
    fields = line.split()
    if len(fields) != 10:
        return f"the row has {len(fields)} fields in place of 10"
    try:
        corners, difficult = [float(field) for field in fields[:8]], int(fields[9])
    except ValueError as error:
        return f"the row has no readable number ({error})"
    if fields[8] not in classes:
        return f"the class {fields[8]!r} is unknown"
    xs, ys = corners[::2], corners[1::2]
    return [Box(fields[8], min(xs), min(ys), max(xs), max(ys), ignored=bool(difficult))]


def crop_dota(root: Path, whole: Picture, folder: Path) -> Iterator[Picture]:
    """Square crops of 1024 pixels that overlap by 200; in ``train`` only those that hold an object.

    An object of which less than 70 % of the box lies in a crop is there to be ignored.
    """
    with Image.open(root / whole.file) as image:
        pixels = image.convert("RGB")
    for top in _starts(whole.height):
        for left in _starts(whole.width):
            right, bottom = min(left + DOTA_CROP, whole.width), min(top + DOTA_CROP, whole.height)
            boxes = tuple(_cut(whole.boxes, left, top, right, bottom))
            if folder.name == "train" and all(box.ignored for box in boxes):
                continue
            file = f"{folder.name}/{Path(whole.file).stem}__{left}_{top}.jpg"
            pixels.crop((left, top, right, bottom)).save(folder.parent / file, quality=95)
            yield Picture(file, right - left, bottom - top, boxes)


def _starts(length: int) -> list[int]:
    """Where the crops begin along a side: the last one ends with the image."""
    last = max(0, length - DOTA_CROP)
    return sorted({min(start, last) for start in range(0, last + DOTA_CROP - DOTA_OVERLAP, DOTA_CROP - DOTA_OVERLAP)})


def _cut(boxes: Sequence[Box], left: int, top: int, right: int, bottom: int) -> Iterator[Box]:
    """The parts of the boxes that lie in a crop, in its coordinates."""
    for box in boxes:
        x1, y1, x2, y2 = max(box.left, left), max(box.top, top), min(box.right, right), min(box.bottom, bottom)
        if x2 <= x1 or y2 <= y1:
            continue
        kept = (x2 - x1) * (y2 - y1) / ((box.right - box.left) * (box.bottom - box.top))
        yield Box(box.label, x1 - left, y1 - top, x2 - left, y2 - top, box.ignored or kept < DOTA_KEPT)
