"""Images and per-pixel targets that lie in two folders and belong together by the stem of their names."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from gppf_ds.errors import SampleError, UserError

IMAGE_SUFFIXES = frozenset({".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"})

# PIL's names for one 16- or 32-bit integer per pixel; a 16-bit PNG opens as "I;16", in older releases as "I".
_DEPTH_MODES = frozenset({"I", "I;16", "I;16B", "I;16L"})


def pair_by_stem(images: Path, targets: Path, target_suffix: str) -> list[tuple[Path, Path]]:
    """Pairs every image ``STEM.jpg`` (or another image suffix) of a flat folder with ``targets/STEM + target_suffix``.

    The folders are listed once and no file is opened. Targets without an image are left out.

    Args:
        images: folder of the images; files that are not images, by their suffix, are passed over.
        targets: folder of the targets.
        target_suffix: what follows the stem in a target's name, for example ``.png`` or ``_label.png``.

    Returns:
        (image, target) paths, sorted by the image's name.

    Raises:
        UserError: a folder is missing or empty, or an image has no target.
    """
    image_names = sorted(name for name in _list(images) if Path(name).suffix.lower() in IMAGE_SUFFIXES)
    if not image_names:
        raise UserError(f"{images} has no image files ({', '.join(sorted(IMAGE_SUFFIXES))}): point to another folder.")
    target_names = set(_list(targets))
    if not target_names:
        raise UserError(f"{targets} is empty: put one file STEM{target_suffix} per image into it.")

    pairs = [(name, Path(name).stem + target_suffix) for name in image_names]
    lonely = [pair for pair in pairs if pair[1] not in target_names]
    if lonely:
        name, target = lonely[0]
        raise UserError(
            f"{len(lonely)} of the {len(pairs)} images in {images} have no target in {targets}, the first is {name} "
            f"(no {target}): add the targets, remove the images or correct the target suffix '{target_suffix}'."
        )
    return [(images / name, targets / target) for name, target in pairs]


def read_rgb(path: Path) -> Image.Image:
    """Reads an image as 8-bit RGB, decoded to the last pixel, in the orientation in which it is stored.

    Raises:
        SampleError: missing, truncated, not an image, too large to be one, or with more than 8 bits per channel.
    """
    with _opened(path) as image:
        if image.mode in _DEPTH_MODES or image.mode == "F":
            raise SampleError(f"{path} has more than 8 bits per pixel (mode {image.mode}), an RGB image was expected.")
        return image if image.mode == "RGB" else image.convert("RGB")  # which copies whatever the mode is


def read_label_map(path: Path) -> NDArray[np.uint8]:
    """Reads an 8-bit single-channel (or palette) image of class indices, shape (H, W).

    Raises:
        SampleError: missing, truncated, not an image, or of another mode.
    """
    with _opened(path) as image:
        if image.mode not in ("L", "P"):
            raise SampleError(f"{path} has mode {image.mode}, an 8-bit single-channel map of classes was expected.")
        return np.array(image, dtype=np.uint8)


def read_depth(path: Path, scale: float) -> NDArray[np.float32]:
    """Reads a 16-bit (or 32-bit integer) depth image in metres, shape (H, W), 0 = not measured.

    Args:
        path: the depth image.
        scale: metres per stored unit, for example 0.001 for millimetres or 1/256 for KITTI.

    Raises:
        SampleError: missing, truncated, not an image, of another mode, or with negative values.
    """
    with _opened(path) as image:
        if image.mode not in _DEPTH_MODES:
            raise SampleError(f"{path} has mode {image.mode}, a 16-bit single-channel depth image was expected.")
        depth = np.array(image)
    if depth.min() < 0:
        raise SampleError(f"{path} has negative depths.")
    return depth.astype(np.float32) * np.float32(scale)


def _list(folder: Path) -> list[str]:
    try:
        return [name for name in os.listdir(folder) if not name.startswith(".")]
    except OSError as error:
        raise UserError(f"{folder} cannot be listed ({error.strerror}): point to an existing folder.") from error


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """The decoded image; the many ways in which PIL reports a broken file become one."""
    try:
        with Image.open(path) as image:
            image.load()
            yield image
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        raise SampleError(f"{path} cannot be read as an image: {error}") from error
