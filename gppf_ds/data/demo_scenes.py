"""Draws the demo pictures: real handwritten digits standing on photographed ground before a photographed wall.

A scene is a pinhole view of such a place, so that boxes, masks, semantic maps and depth come from one geometry and all
can be learnt from the picture: what is far is small, stands higher in the image and fades into the haze.
"""

from __future__ import annotations

import colorsys
import importlib.resources
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from gppf_ds.errors import UserError

Floats = NDArray[np.floating[Any]]

# (package, file): no photograph and no digit is in both splits.
_SKIMAGE, _SKLEARN = "skimage.data", "sklearn.datasets.images"
GROUNDS = {"train": ((_SKIMAGE, "gravel.png"), (_SKIMAGE, "brick.png")), "val": ((_SKIMAGE, "grass.png"),)}
WALLS = {
    "train": (
        (_SKIMAGE, "astronaut.png"),
        (_SKIMAGE, "hubble_deep_field.jpg"),
        (_SKIMAGE, "retina.jpg"),
        (_SKIMAGE, "rocket.jpg"),
        (_SKLEARN, "china.jpg"),
    ),
    "val": (
        (_SKIMAGE, "camera.png"),
        (_SKIMAGE, "chelsea.png"),
        (_SKIMAGE, "coffee.png"),
        (_SKLEARN, "flower.jpg"),
    ),
}
DIGITS = {"train": range(1437), "val": range(1437, 1797)}  # in the order of the file, which goes by writer

# The place: lengths in metres; the focal length is the image's size, a field of view of 53 degrees.
_DIGIT_HEIGHT = (0.95, 1.05)
_DIGIT_DISTANCE = (2.0, 4.0)
_WALL_DISTANCE = (6.0, 10.0)
_WALL_SLANT = (-0.3, 0.3)
_CAMERA_HEIGHT = (1.0, 1.15)
_HORIZON = (0.3, 0.38)  # as a part of the image's height
_PHOTOGRAPH_SIZE = 320
_GROUND_PIXELS_PER_METRE = 60
_HAZE_COLOUR = np.array([0.80, 0.84, 0.90], dtype=np.float32)
_HAZE_PER_METRE = 0.1
_MOST_DIGITS = 4
_LEAST_VISIBLE = 0.7  # part of a digit that nearer ones may not cover
_SUPERSAMPLING = 2  # of the ground, whose far rows would flicker


@dataclass(frozen=True)
class Sources:
    """The real images that one split is made of: RGB photographs, and digits as the masks (0 or 255) of their ink."""

    grounds: list[Image.Image]
    walls: list[Image.Image]
    digits: list[Image.Image]
    classes: list[int]


@dataclass(frozen=True)
class Scene:
    """A view of S x S pixels.

    ``image``: (S, S, 3) uint8. ``depth``: (S, S) float32 metres along the optical axis, 0 where a sensor would not have
    measured. ``instances``: (S, S) uint8, 0 on the background and k on the visible part of object k = 1, 2, ..., which
    shows the digit ``classes[k - 1]``. ``ground``: (S, S) bool, the ground as it would be without objects.
    """

    image: NDArray[np.uint8]
    depth: NDArray[np.float32]
    instances: NDArray[np.uint8]
    classes: list[int]
    ground: NDArray[np.bool_]


def load_sources(split: Literal["train", "val"]) -> Sources:
    """Reads what one split is made of from the installed packages.

    Raises:
        UserError: the installed scikit-image or scikit-learn lacks an image.
    """
    from sklearn.datasets import load_digits

    data = load_digits()
    return Sources(
        grounds=[_load_photograph(*name) for name in GROUNDS[split]],
        walls=[_load_photograph(*name) for name in WALLS[split]],
        digits=[_ink(data.images[i]) for i in DIGITS[split]],
        classes=[int(data.target[i]) for i in DIGITS[split]],
    )


def draw_crop(sources: Sources, digit: int, size: int, rng: Generator) -> NDArray[np.uint8]:
    """One digit (by its index in ``sources``) on a piece of photograph, (size, size, 3)."""
    photographs = [*sources.walls, *sources.grounds]
    distance = rng.uniform(1.0, 3.0)
    image = _haze(_piece(photographs[rng.integers(len(photographs))], size, size, rng), distance)
    cover = _resized_cover(sources.digits[digit], round(size * rng.uniform(0.7, 0.95)))
    height, width = cover.shape
    top, left = rng.integers(size - height + 1), rng.integers(size - width + 1)
    _paint(image[top : top + height, left : left + width], cover, distance, rng)
    return _to_bytes(image)


def draw_scene(sources: Sources, size: int, rng: Generator) -> Scene:
    """A place with 1 to 4 digits, each at least 70 % visible."""
    focal, camera_height, horizon = float(size), rng.uniform(*_CAMERA_HEIGHT), size * rng.uniform(*_HORIZON)
    image, depth, ground = _draw_place(sources, size, camera_height, horizon, rng)
    instances = np.zeros((size, size), dtype=np.uint8)
    classes: list[int] = []
    sizes: list[int] = []

    # From far to near; even steps of 1 / distance are even steps of the size in pixels.
    nearest, farthest = _DIGIT_DISTANCE
    for distance in sorted(1 / rng.uniform(1 / farthest, 1 / nearest, rng.integers(1, _MOST_DIGITS + 1)), reverse=True):
        digit = int(rng.integers(len(sources.digits)))
        cover = _resized_cover(sources.digits[digit], round(focal * rng.uniform(*_DIGIT_HEIGHT) / distance))
        height, width = cover.shape
        bottom, left = int(horizon + focal * camera_height / distance), int(rng.integers(size - width + 1))
        place = np.s_[bottom - height : bottom, left : left + width]
        ink = cover >= 0.5
        after = instances.copy()
        after[place][ink] = len(classes) + 1
        visible = np.bincount(after.ravel(), minlength=len(classes) + 2)[1:]
        if any(visible[k] < _LEAST_VISIBLE * full for k, full in enumerate(sizes)):
            continue
        instances = after
        classes.append(sources.classes[digit])
        sizes.append(int(ink.sum()))
        _paint(image[place], cover, distance, rng)
        turned = distance * (1 - rng.uniform(0, 0.04) * np.linspace(0, 1, width))  # one side is a little nearer
        depth[place][ink] = np.broadcast_to(turned, ink.shape)[ink]
    return Scene(_to_bytes(image), _as_measured(depth, rng), instances, classes, ground)


def _load_photograph(package: str, name: str) -> Image.Image:
    try:
        with (importlib.resources.files(package) / name).open("rb") as file, Image.open(file) as image:
            photograph = image.convert("RGB")
    except OSError as error:
        raise UserError(f"The package {package} lacks {name}: reinstall it from its wheel.") from error
    photograph.thumbnail((_PHOTOGRAPH_SIZE, _PHOTOGRAPH_SIZE))
    return photograph


def _ink(digit: NDArray[np.float64]) -> Image.Image:
    """An 8x8 digit (0 to 16) as one connected stroke, enlarged smoothly and cut to its bounds; 255 on the ink."""
    from scipy.ndimage import label

    grey = Image.fromarray((np.pad(digit, 1) * (255 / 16)).astype(np.uint8))
    smooth = np.asarray(grey.resize((80, 80), Image.Resampling.BICUBIC).filter(ImageFilter.GaussianBlur(2)))
    # The stroke is made as thin as it can be without falling to pieces.
    for threshold in range(105, 25, -20):
        parts, _ = label(smooth > threshold)
        sizes = np.bincount(parts.ravel())[1:]
        if sizes.max() > 0.98 * sizes.sum():
            break
    ink = Image.fromarray(np.where(parts == sizes.argmax() + 1, 255, 0).astype(np.uint8))
    return ink.crop(ink.getbbox())


def _resized_cover(ink: Image.Image, height: int) -> Floats:
    """How much of every pixel the ink covers, (height, width of the digit but at most height), 0 to 1."""
    width = max(1, min(height, round(ink.width * height / ink.height)))
    return np.asarray(ink.resize((width, height), Image.Resampling.BILINEAR), dtype=np.float32) / 255


def _draw_place(
    sources: Sources, size: int, camera_height: float, horizon: float, rng: Generator
) -> tuple[Floats, Floats, NDArray[np.bool_]]:
    """Ground and wall in the haze: the image (size, size, 3), 0 to 1, its depth in metres and what of it is ground."""
    fine = size * _SUPERSAMPLING
    pixels = (np.arange(fine, dtype=np.float32) + 0.5) / _SUPERSAMPLING
    below = np.maximum(pixels - horizon, 1e-3)[:, None]
    columns = (pixels / size - 0.5)[None, :]
    ground = np.broadcast_to(size * camera_height / below, (fine, fine))
    wall = np.broadcast_to(rng.uniform(*_WALL_DISTANCE) * (1 + rng.uniform(*_WALL_SLANT) * columns), (fine, fine))
    depth = np.minimum(ground, wall)

    wall_image = np.zeros((fine, fine, 3), dtype=np.float32)
    rows = round(fine * 0.65)  # the wall's foot is above this
    wall_image[:rows] = _piece(sources.walls[rng.integers(len(sources.walls))], fine, rows, rng)
    texture = np.asarray(sources.grounds[rng.integers(len(sources.grounds))], dtype=np.float32) / 255
    texture = texture * rng.uniform(0.6, 1.0, 3).astype(np.float32)
    across = _mirrored(columns * depth * _GROUND_PIXELS_PER_METRE + rng.uniform(0, _PHOTOGRAPH_SIZE), texture.shape[1])
    along = _mirrored(depth * _GROUND_PIXELS_PER_METRE + rng.uniform(0, _PHOTOGRAPH_SIZE), texture.shape[0])
    image = np.where((ground < wall)[..., None], texture[along, across], wall_image)
    image = _haze(image, depth[..., None])

    return _block_means(image), _block_means(depth), _block_means((ground < wall).astype(np.float32)) >= 0.5


def _block_means(fine: Floats) -> Floats:
    steps = range(_SUPERSAMPLING)
    return np.mean([fine[i::_SUPERSAMPLING, j::_SUPERSAMPLING] for i in steps for j in steps], axis=0)


def _mirrored(position: Floats, length: int) -> NDArray[np.intp]:
    """Indices into a texture that is repeated back and forth."""
    index = position.astype(np.intp) % (2 * length)
    return np.where(index < length, index, 2 * length - 1 - index)


def _piece(photograph: Image.Image, width: int, height: int, rng: Generator) -> Floats:
    """A random piece of a photograph at this size and aspect, (height, width, 3), 0 to 1."""
    scale = min(photograph.width / width, photograph.height / height) * rng.uniform(0.6, 1.0)
    left = rng.uniform(0, photograph.width - width * scale)
    top = rng.uniform(0, photograph.height - height * scale)
    box = (left, top, left + width * scale, top + height * scale)
    return np.asarray(photograph.resize((width, height), Image.Resampling.BICUBIC, box), dtype=np.float32) / 255


def _paint(image: Floats, cover: Floats, distance: float, rng: Generator) -> None:
    """Lays a digit of a random strong colour, lit from above, over a piece of the image."""
    colour = np.array(colorsys.hsv_to_rgb(rng.uniform(), rng.uniform(0.75, 1), rng.uniform(0.8, 1)), dtype=np.float32)
    light = np.linspace(1.0, 0.7, len(cover), dtype=np.float32)[:, None, None]
    surface = _haze(colour * light, distance)
    image += cover[..., None] * (surface - image)


def _haze(image: Floats, distance: Floats | float) -> Floats:
    """Fades an image by the Beer-Lambert law: what is left of a colour after z metres is exp(-c z)."""
    left = np.exp(-_HAZE_PER_METRE * distance)
    return left * image + (1 - left) * _HAZE_COLOUR


def _as_measured(depth: Floats, rng: Generator) -> NDArray[np.float32]:
    """Zeroes what a stereo sensor misses: a strip left of whatever stands in front, and one pixel in fifty."""
    missed = rng.uniform(size=depth.shape) < 0.02
    for shift in (1, 2):
        missed[:, :-shift] |= depth[:, :-shift] - depth[:, shift:] > 0.3
    return np.where(missed, 0, depth).astype(np.float32)


def _to_bytes(image: Floats) -> NDArray[np.uint8]:
    return (image * 255 + 0.5).clip(0, 255).astype(np.uint8)
