"""What tasks find in an image, side by side: classes, boxes and masks, regions, depth."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Paul Tol's "light" and "bright" colours in turn, for regions and objects; told apart with every common colour vision.
AREA_COLOURS = ("#4477AA", "#EE8866", "#228833", "#EEDD88", "#AA3377", "#66CCEE", "#BBCC33", "#FFAABB", "#AAAA00")
DEPTH_COLOURS = "cividis_r"
"""Near is bright."""
LEAST_SCORE = 0.3
"""Of an object that is drawn; the json file has all."""
MOST_OBJECTS = 20
_REGION_STRENGTH = 0.6
_LEGEND = 6
_COLUMNS = 5


def draw(image: NDArray[np.uint8], found: Mapping[str, Mapping[str, Any]], title: str, side: float = 3.3) -> Figure:
    """The image and one panel per task.

    Args:
        image: (H, W, 3).
        found: by task; see :meth:`gppf_ds.tasks.task.Task.describe`.
        title: above the first panel.
        side: width of a panel in inches.
    """
    from matplotlib.figure import Figure

    panels = 1 + len(found)
    columns = min(panels, _COLUMNS)
    rows = math.ceil(panels / columns)
    tall = min(max(image.shape[0] / image.shape[1], 0.5), 1.6)
    figure = Figure(figsize=(side * columns, (side * tall + 0.5) * rows), layout="constrained")
    grid = list(figure.subplots(rows, columns, squeeze=False).flat)
    _picture(grid[0], image)
    grid[0].set_title(title, fontsize=10)
    for axes, (name, one) in zip(grid[1:], found.items(), strict=False):
        draw_found(axes, image, one)
        axes.set_title(name, fontsize=10)
    for axes in grid[panels:]:
        axes.set_axis_off()
    return figure


def draw_found(axes: Axes, image: NDArray[np.uint8], found: Mapping[str, Any]) -> None:
    """What one task finds; of a kind of task that is not known here, its summary.

    Args:
        axes: to draw into.
        image: (H, W, 3).
        found: see :meth:`gppf_ds.tasks.task.Task.describe`.
    """
    if "objects" in found:
        _objects(axes, image, found["objects"])
    elif isinstance(found.get("labels"), np.ndarray):
        _regions(axes, image, found["labels"], found["classes"])
    elif isinstance(found.get("depth"), np.ndarray):
        _depth(axes, found["depth"] * found["metres_per_unit"])
    elif "classes" in found:
        _classes(axes, found["classes"])
    else:
        axes.set_axis_off()
        axes.text(0.5, 0.5, found["summary"], ha="center", va="center", wrap=True, transform=axes.transAxes)


def _picture(axes: Axes, image: NDArray[Any]) -> None:
    axes.imshow(image, interpolation="lanczos" if max(image.shape) < 256 else "antialiased")
    axes.set_axis_off()


def _classes(axes: Axes, classes: list[dict[str, Any]]) -> None:
    """The best classes as bars of their scores."""
    scores = [one["score"] for one in classes]
    axes.barh(range(len(scores)), scores, color=AREA_COLOURS[0], height=0.7)
    for row, one in enumerate(classes):
        inside = one["score"] > 0.5
        where: dict[str, Any] = {"ha": "left", "va": "center", "color": "white" if inside else "black", "fontsize": 9}
        axes.text(0.02 if inside else one["score"] + 0.02, row, f"{one['name']}  {one['score']:.2f}", **where)
    axes.set_xlim(0, 1)
    axes.set_ylim(max(len(scores), 5) - 0.5, -0.5)
    axes.set_yticks([])
    axes.set_xlabel("score (softmax)", fontsize=9)
    axes.spines[["top", "right", "left"]].set_visible(False)


def _objects(axes: Axes, image: NDArray[np.uint8], objects: list[dict[str, Any]]) -> None:
    """Boxes with class and score, masks as veils over the objects."""
    from matplotlib.patches import Rectangle

    shown = [one for one in objects if one["score"] >= LEAST_SCORE][:MOST_OBJECTS]
    painted = image.astype(np.float64) / 255
    for one in reversed(shown):
        if "mask" in one:
            painted = _veil(painted, _decoded(one["mask"]), _colour(one["label"]))
    _picture(axes, painted.clip(0, 1))
    for one in reversed(shown):
        x1, y1, x2, y2 = one["box"]
        colour = _colour(one["label"])
        axes.add_patch(Rectangle((x1 - 0.5, y1 - 0.5), x2 - x1, y2 - y1, fill=False, edgecolor=colour, linewidth=1.8))
        label = {"facecolor": colour, "edgecolor": "none", "pad": 1.2}
        look: dict[str, Any] = {"fontsize": 7, "va": "bottom", "color": _ink(colour), "bbox": label, "clip_on": True}
        axes.text(x1, y1, f"{one['class']} {one['score']:.2f}", **look)
    if not shown:
        note = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8}
        text = f"no object above {LEAST_SCORE}"
        axes.text(0.5, 0.05, text, ha="center", fontsize=8, transform=axes.transAxes, bbox=note)


def _regions(axes: Axes, image: NDArray[np.uint8], labels: NDArray[Any], names: list[str]) -> None:
    """Every class in its colour over the image, with a legend of the largest."""
    from matplotlib.patches import Patch

    numbers, counts = np.unique(labels, return_counts=True)
    painted = image.astype(np.float64) / 255
    for number in numbers:
        painted = _veil(painted, labels == number, _colour(int(number)))
    _picture(axes, painted.clip(0, 1))
    largest = numbers[counts.argsort()[::-1][:_LEGEND]]
    handles = [Patch(color=_colour(int(number)), label=names[number]) for number in largest]
    axes.legend(handles=handles, loc="lower left", fontsize=7, framealpha=0.85, handlelength=1.0)


def _depth(axes: Axes, metres: NDArray[Any]) -> None:
    """Depth in colours, with their scale."""
    picture = axes.imshow(metres, cmap=DEPTH_COLOURS)
    axes.set_axis_off()
    bar = axes.figure.colorbar(picture, ax=axes, fraction=0.046, pad=0.03)
    bar.set_label("depth (m)", fontsize=8)
    bar.ax.tick_params(labelsize=8)


def _veil(picture: NDArray[Any], where: NDArray[Any], colour: str) -> NDArray[Any]:
    from matplotlib.colors import to_rgb

    strength = _REGION_STRENGTH * where[..., None].astype(np.float64)
    return picture * (1 - strength) + np.array(to_rgb(colour)) * strength


def _colour(number: int) -> str:
    return AREA_COLOURS[number % len(AREA_COLOURS)]


def _ink(background: str) -> str:
    """The colour of letters that stand out best (relative luminance, as in WCAG 2)."""
    from matplotlib.colors import to_rgb

    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in to_rgb(background)]
    return "black" if np.dot(linear, (0.2126, 0.7152, 0.0722)) > 0.179 else "white"


def _decoded(mask: Mapping[str, Any]) -> NDArray[Any]:
    """A compressed RLE of COCO as (H, W)."""
    from pycocotools import mask as rle

    return np.asarray(rle.decode({"size": mask["size"], "counts": mask["counts"].encode("ascii")}))


def read_pixels(image: Path) -> NDArray[np.uint8]:
    """(H, W, 3) of an image file."""
    from gppf_ds.data.folders import read_rgb

    return np.asarray(read_rgb(image))
