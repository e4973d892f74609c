"""What all pictures have in common: colours, sizes, and the formats they leave in."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, told apart with every common colour vision.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442")
"""Of areas."""
LINE_COLOURS = (*COLOURS[:6], "#000000")
LINE_STYLES = ("-", "--", ":", "-.")
SEQUENTIAL = "cividis"
"""Colour map of a quantity: as bright as it is large, for every colour vision and in grey."""
FORMATS = ("png", "svg", "pdf")
_DPI = 160


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of this size in inches; it needs no display and leaves no global state."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def line_look(index: int) -> dict[str, Any]:
    """Colour and style of the index-th line: 28 different ones."""
    colour, style = index % len(LINE_COLOURS), index // len(LINE_COLOURS) % len(LINE_STYLES)
    return {"color": LINE_COLOURS[colour], "linestyle": LINE_STYLES[style]}


def tidy(axes: Axes, across: str, up: str, title: str = "") -> None:
    """Labels, a light grid, no box.

    Args:
        axes: of a line plot.
        across, up: what the axes show, with units.
        title: of the plot.
    """
    axes.set_xlabel(across)
    axes.set_ylabel(up)
    axes.set_title(title, fontsize=10)
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def save(figure: Figure, stem: Path) -> list[Path]:
    """Writes ``stem.png``, ``stem.svg`` and ``stem.pdf``, whose folder is made where it is missing."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    files = [stem.with_name(f"{stem.name}.{suffix}") for suffix in FORMATS]
    for file in files:
        figure.savefig(file, dpi=_DPI, metadata={"Date": None} if file.suffix == ".svg" else None)
    return files


def data_uri(figure: Figure) -> str:
    """The figure as an svg in a ``data:`` address."""
    stream = io.BytesIO()
    figure.savefig(stream, format="svg", metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(stream.getvalue()).decode("ascii")


def mixed_with_white(colour: str, strength: float) -> str:
    """The colour, ``#rrggbb``, thinned: 1 leaves it as it is, 0 is white."""
    parts: Sequence[int] = bytes.fromhex(colour[1:])
    return "#" + "".join(f"{round(255 - strength * (255 - part)):02x}" for part in parts)
