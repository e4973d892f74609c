"""Matrices of numbers in [0, 1] as pictures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from gppf_ds.analysis.style import SEQUENTIAL

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.image import AxesImage

_NUMBERED = 18
"""Rows and columns up to which the cells bear their numbers."""


def draw_heat_map(
    axes: Axes,
    values: NDArray[Any],
    rows: Sequence[str],
    columns: Sequence[str],
    most: float = 1.0,
    numbers: bool = True,
) -> AxesImage:
    """A matrix with the names of its rows and columns; a cell without a number (nan) stays grey.

    Args:
        axes: to draw into.
        values: (rows, columns).
        rows, columns: names.
        most: the number at the bright end.
        numbers: whether the cells of a small matrix bear theirs.
    """
    axes.set_facecolor("#bbbbbb")
    image = axes.imshow(values, cmap=SEQUENTIAL, vmin=0, vmax=most, aspect="auto")
    axes.set_xticks(range(len(columns)), columns, rotation=60, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(rows)), rows)
    axes.tick_params(length=0)
    for row, column in np.ndindex(*values.shape) if numbers and max(values.shape) <= _NUMBERED else ():
        value = values[row, column]
        if np.isfinite(value):
            colour = "black" if value > 0.55 * most else "white"
            axes.text(column, row, f"{value:.2f}", ha="center", va="center", color=colour, fontsize=7)
    return image
