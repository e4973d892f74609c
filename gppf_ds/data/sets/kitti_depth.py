"""KITTI depth prediction with the split of Eigen et al. (NIPS 2014): raw images, annotated depth maps, lists of pairs.

The lists are those of the BTS repository: a line has the path of an image, that of its depth map (or None, where KITTI
published none) and the focal length. Depth maps are 16-bit png files of metres times 256, 0 = not measured.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image

from gppf_ds.data.folders import IMAGE_SUFFIXES, read_depth
from gppf_ds.data.scan import first_faults
from gppf_ds.data.source import Source
from gppf_ds.errors import SampleError, UserError

LISTS = {"train": "eigen_train_files_with_gt.txt", "test": "eigen_test_files_with_gt.txt"}
DEPTH_FOLDER = "data_depth_annotated"
DEPTH_SCALE = 1 / 256
"""Metres per stored unit."""

_NO_DEPTH = "None"
_DATE_LENGTH = len("2011_09_26")


@dataclass(frozen=True)
class Line:
    """A line of a list that names a depth map."""

    place: str
    """``FILE:LINE``"""
    image: Path
    depth: Path


def read_pairs(list_file: Path, images: Path, depth: Path) -> list[tuple[Path, Path]]:
    """(image, depth map) of every line that has a depth map, in the order of the file.

    Args:
        list_file: each line has an image, a depth map or ``None``, and possibly the focal length.
        images: what the images are relative to; their date may be missing in the list (2011_09_26/...).
        depth: what the depth maps are relative to, directly or in its folders train and val.

    Raises:
        UserError: the file is missing, empty or has a bad line.
    """
    pairs = []
    for line in _lines(list_file, images, depth):
        if isinstance(line, str):
            raise UserError(f"{line}: correct the line or fetch the list anew.")
        pairs.append((line.image, line.depth))
    if not pairs:
        raise UserError(f"{list_file} names no depth map: fetch the list anew.")
    return pairs


def _lines(list_file: Path, images: Path, depth: Path) -> Iterator[Line | str]:
    """The lines with a depth map; a sentence in the place of a bad one."""
    try:
        content = list_file.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"{list_file} cannot be read ({error}): take it from train_test_inputs of github.com/cleinc/bts."
        ) from error
    # Of a drive, so that each is looked for once.
    image_folders: dict[str, Path] = {}
    depth_folders: dict[str, Path] = {}
    for number, text in enumerate(content, start=1):
        fields = text.split()
        if not fields:
            continue
        if fault := _fault_of(fields):
            yield f"{list_file}:{number} {fault}"
        elif fields[1] != _NO_DEPTH:
            image, target = fields[:2]
            dated = images / PurePosixPath(image).parts[0][:_DATE_LENGTH]
            yield Line(
                f"{list_file}:{number}",
                _under([images, dated], image, image_folders),
                _under([depth, depth / "train", depth / "val"], target, depth_folders),
            )


def _fault_of(fields: list[str]) -> str | None:
    if len(fields) not in (2, 3):
        return f"has {len(fields)} fields where 'IMAGE DEPTH [FOCAL]' has 2 or 3"
    image, depth = (PurePosixPath(field) for field in fields[:2])
    if image.suffix.lower() not in IMAGE_SUFFIXES:
        return f"names {image}, which is no image file by its suffix"
    if str(depth) != _NO_DEPTH and depth.suffix.lower() != ".png":
        return f"names {depth} for a depth map, which is neither a png file nor {_NO_DEPTH}"
    if image.is_absolute() or depth.is_absolute():
        return "has an absolute path where one relative to the data belongs"
    return None


def _under(folders: list[Path], name: str, known: dict[str, Path]) -> Path:
    """The path in the first of the folders that has its drive; in the first folder where none has."""
    drive = "/".join(PurePosixPath(name).parts[:2])
    if drive not in known:
        known[drive] = next((folder for folder in folders if (folder / drive).is_dir()), folders[0])
    return known[drive] / name


def _count(root: Path) -> dict[str, int]:
    """Pairs of which both files are there."""
    counts = {}
    for split, name in LISTS.items():
        lines = _lines(root / name, root, root / DEPTH_FOLDER) if (root / name).is_file() else ()
        pairs = [line for line in lines if isinstance(line, Line)]
        counts[f"{split} pairs"] = sum(pair.image.is_file() and pair.depth.is_file() for pair in pairs)
    return counts


def _faults(root: Path, limit: int) -> list[str]:
    found: list[str] = []
    for name in LISTS.values():
        if (root / name).is_file():
            lines = _lines(root / name, root, root / DEPTH_FOLDER)
            found += first_faults(_fault_in, lines, limit - len(found))
        else:
            found.append(f"{root / name} is missing")
    return found[:limit]


def _fault_in(line: Line | str) -> str | None:
    if isinstance(line, str):
        return line
    for path in (line.image, line.depth):
        if not path.is_file():
            return f"{line.place} names {path}, which is missing"
    try:
        depth = read_depth(line.depth, DEPTH_SCALE)
        with Image.open(line.image) as image:
            width, height = image.size
    except (SampleError, OSError) as error:
        return f"{line.place}: {error}"
    if depth.shape != (height, width):
        return f"{line.place}: {line.depth} is {depth.shape[1]}x{depth.shape[0]} and its image {width}x{height}"
    if not depth.any():
        return f"{line.place}: {line.depth} has no measured pixel"
    return None


_SMOKE_SIZE = (94, 310)
"""A quarter of KITTI's (height, width)."""
_SMOKE_DRIVES = {
    "train": ("2011_09_26_drive_0001_sync", "2011_09_28_drive_0001_sync"),
    "test": ("2011_09_26_drive_0002_sync",),
}


def _smoke(root: Path) -> None:
    rng = np.random.default_rng(0)
    for split, drives in _SMOKE_DRIVES.items():
        lines = []
        for drive in drives:
            for frame in range(5, 9):
                image = f"{drive[:_DATE_LENGTH]}/{drive}/image_02/data/{frame:010d}.png"
                depth = f"{drive}/proj_depth/groundtruth/image_02/{frame:010d}.png"
                _write_frame(root / image, root / DEPTH_FOLDER / _benchmark_split(split) / depth, rng)
                lines.append(f"{image} {depth} 721.5377")
        if split == "test":
            lines.append(f"{drives[0][:_DATE_LENGTH]}/{drives[0]}/image_02/data/0000000000.png {_NO_DEPTH} 721.5377")
        (root / LISTS[split]).write_text("\n".join(lines) + "\n")


def _benchmark_split(split: str) -> str:
    # The Eigen split is not that of the benchmark, whose folders hold the depth maps.
    return "train" if split == "train" else "val"


def _write_frame(image: Path, depth: Path, rng: np.random.Generator) -> None:
    """A road whose brightness tells its depth, measured on every third row and column below the horizon."""
    height, width = _SMOKE_SIZE
    rows = np.arange(height)[:, None] / height
    metres = np.broadcast_to(4 + 60 * (1 - rows) ** 2, (height, width)) * rng.uniform(0.9, 1.1)
    pixels = np.repeat((3 * metres)[:, :, None], 3, axis=2) + rng.integers(0, 20, 3)
    stored = np.zeros((height, width), dtype=np.uint16)
    stored[height // 3 :: 3, ::3] = (metres / DEPTH_SCALE)[height // 3 :: 3, ::3].round()
    for path, values in ((image, pixels.clip(0, 255).astype(np.uint8)), (depth, stored)):
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(values).save(path)


SOURCES = {
    "kitti_depth": Source(
        title="KITTI depth prediction, split of Eigen et al.",
        home=(
            "https://www.cvlibs.net/datasets/kitti: the synced and rectified raw drives (one folder per date under the "
            f"root) and data_depth_annotated.zip (unpacked as {DEPTH_FOLDER}); the two lists from the folder "
            "train_test_inputs of https://github.com/cleinc/bts."
        ),
        layout=(*LISTS.values(), DEPTH_FOLDER, "2011_09_26"),
        counts={"train pairs": 23158, "test pairs": 652},  # of the 697 test images 45 have no depth map
        count=_count,
        faults=_faults,
        smoke=_smoke,
    )
}
