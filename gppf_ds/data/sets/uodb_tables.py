"""Annotations in one csv file: LISA traffic signs and DeepLesion."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from gppf_ds.data.sets.uodb_coco import Box, Fault, Items, Picture, picture
from gppf_ds.errors import UserError

LISA_HELD_OUT = 5
LISA_FILE, LISA_TAG = "Filename", "Annotation tag"
LISA_CORNERS = (
    "Upper left corner X",
    "Upper left corner Y",
    "Lower right corner X",
    "Lower right corner Y",
)
LISA_TRACK = ("Origin file", "Origin track")
LISA_CLASSES = ("warning", "noturn", "speedlimit", "stop")
# The benchmark's classes are superclasses of the 47 tags (Mogelmose, Liu, Trivedi: "Detection of U.S. traffic signs",
# IEEE T-ITS 2015). Signs of no superclass are not looked for. The files are not consistent in upper and lower case.
LISA_WARNING = frozenset(
    [
        "addedlane",
        "curveleft",
        "curveright",
        "dip",
        "intersection",
        "laneends",
        "merge",
        "pedestriancrossing",
        "roundabout",
        "signalahead",
        "slow",
        "speedbumpsahead",
        "stopahead",
        "thrumergeleft",
        "thrumergeright",
        "turnleft",
        "turnright",
        "yieldahead",
        "warningurdbl",
    ]
)
LISA_OTHER = frozenset(
    [
        "donotenter",
        "donotpass",
        "keepright",
        "rampspeedadvisory20",
        "rampspeedadvisory35",
        "rampspeedadvisory40",
        "rampspeedadvisory45",
        "rampspeedadvisory50",
        "rampspeedadvisoryurdbl",
        "rightlanemustturn",
        "school",
        "schoolspeedlimit25",
        "thrutrafficmergeleft",
        "truckspeedlimit55",
        "yield",
        "zoneahead25",
        "zoneahead45",
    ]
)
LISA_LABELS = {"stop": "stop", "noleftturn": "noturn", "norightturn": "noturn"} | dict.fromkeys(LISA_WARNING, "warning")

LESION_SPLITS = {"1": "train", "2": "", "3": "val"}
LESION_WINDOW = (-1024, 3071)
LESION_OFFSET = 32768

Table = list[tuple[int, dict[str, str]]]


def read_table(path: Path, delimiter: str, columns: tuple[str, ...]) -> tuple[Table, list[Fault]]:
    """The rows of a csv by column, each with its line; rows with too few or too many fields are faults.

    Raises:
        UserError: the file cannot be read or has not these columns.
    """
    rows: Table = []
    faults: list[Fault] = []
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file, delimiter=delimiter)
            header = next(reader, [])
            missing = [name for name in columns if name not in header]
            if missing:
                raise UserError(f"{path}:1: there is no column {missing[0]!r}: put the official file there.")
            for fields in reader:
                if len(fields) == len(header):
                    rows.append((reader.line_num, dict(zip(header, fields, strict=True))))
                elif fields:
                    sentence = f"the row has {len(fields)} fields in place of {len(header)}"
                    faults.append(Fault(f"{path}:{reader.line_num}: {sentence}."))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} cannot be read ({error}): unpack the data set's archives as they are.") from error
    return rows, faults


def read_lisa(root: Path, split: str) -> Items:
    """LISA traffic signs (Mogelmose et al., IEEE T-ITS 2012): ``allAnnotations.csv``, semicolons between the fields.

    There is no official split. Every fifth track is held out, so that the frames of one passage stay together. Boxes
    are in pixels from 0.
    """
    path = root / "allAnnotations.csv"
    table, faults = read_table(path, ";", (LISA_FILE, LISA_TAG, *LISA_CORNERS, *LISA_TRACK))
    if split == "train":
        yield from faults
    track_of: dict[str, tuple[str, ...]] = {}
    for _, row in table:
        track_of.setdefault(row[LISA_FILE], tuple(row[key] for key in LISA_TRACK))
    held_out = set(sorted(set(track_of.values()))[LISA_HELD_OUT - 1 :: LISA_HELD_OUT])
    frames: dict[str, list[tuple[int, dict[str, str]]]] = {}
    for number, row in table:
        if (track_of[row[LISA_FILE]] in held_out) == (split == "val"):
            frames.setdefault(row[LISA_FILE], []).append((number, row))
    for file, signs in frames.items():
        rows = ((f"{path}:{number}", _sign(row)) for number, row in signs)
        yield from picture(root, file, rows, f"{path}:{signs[0][0]}")


def _sign(row: dict[str, str]) -> list[Box] | str:
    """The sign, nothing if it is of no class of the benchmark, or what is wrong with it."""
    tag = row[LISA_TAG].lower()
    try:
        left, top, right, bottom = (float(row[key]) for key in LISA_CORNERS)
    except ValueError as error:
        return f"the row has no readable number ({error})"
    if tag in LISA_OTHER:
        return []
    label = "speedlimit" if tag.startswith("speedlimit") else LISA_LABELS.get(tag)
    if label is None:
        return f"the class {row[LISA_TAG]!r} is unknown"
    return [Box(label, left, top, right, bottom)]


def read_lesions(root: Path, split: str) -> Items:
    """DeepLesion (Yan et al., 2018): ``DL_info.csv`` and 16-bit slices ``Images_png/SERIES/SLICE.png``.

    ``train`` is the official training split, ``val`` the official test split. Lesions marked as possibly noisy are to
    be ignored. Boxes are in pixels from 0.
    """
    path = root / "DL_info.csv"
    columns = ("File_name", "Bounding_boxes", "Possibly_noisy", "Train_Val_Test")
    table, faults = read_table(path, ",", columns)
    if split == "train":
        yield from faults
    slices: dict[str, list[tuple[int, dict[str, str]]]] = {}
    for number, row in table:
        where = LESION_SPLITS.get(row["Train_Val_Test"])
        if where is None and split == "train":
            yield Fault(f"{path}:{number}: Train_Val_Test is {row['Train_Val_Test']!r} in place of 1, 2 or 3.")
        elif where == split:
            slices.setdefault(row["File_name"], []).append((number, row))
    for name, lesions in slices.items():
        rows = ((f"{path}:{number}", _lesion(row)) for number, row in lesions)
        series, _, number_of_slice = name.rpartition("_")
        yield from picture(root, f"Images_png/{series}/{number_of_slice}", rows, f"{path}:{lesions[0][0]}")


def _lesion(row: dict[str, str]) -> list[Box] | str:
    """The lesion, or what is wrong with the row."""
    try:
        left, top, right, bottom = (float(value) for value in row["Bounding_boxes"].split(","))
        return [Box("lesion", left, top, right, bottom, ignored=bool(int(row["Possibly_noisy"])))]
    except ValueError as error:
        return f"the row has no readable box ({error})"


def window_slice(root: Path, slice_: Picture, folder: Path) -> Iterator[Picture]:
    """The slice as 8-bit grey: Hounsfield units (stored + 32768) from -1024 to 3071, as the set's FAQ windows them."""
    with Image.open(root / slice_.file) as image:
        stored = np.array(image, dtype=np.float32)
    low, high = LESION_WINDOW
    grey = np.clip((stored - LESION_OFFSET - low) / (high - low), 0, 1) * 255
    series, name = Path(slice_.file).parts[-2:]
    file = f"{folder.name}/{series}_{name}"
    Image.fromarray(np.round(grey).astype(np.uint8)).save(folder.parent / file)
    yield Picture(file, slice_.width, slice_.height, slice_.boxes)
