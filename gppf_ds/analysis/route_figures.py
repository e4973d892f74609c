"""Pictures of the controllers' choices (GPPF figures 3, 10 and 11)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from gppf_ds.analysis.routes import effective_units, path_distances, paths, similarity_tree, units_in_use
from gppf_ds.analysis.style import COLOURS, line_look, mixed_with_white, new_figure, tidy
from gppf_ds.train.route_record import RouteRecord

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LEAST_STRENGTH = 0.35
"""Of the colour of a unit that is no likelier than the others."""
_COLUMNS = 3


def cell_colour(probabilities: NDArray[Any], units: int) -> str:
    """The colour of a task's choice in a layer: that of its unit, the more certain the stronger.

    Args:
        probabilities: (max units,).
        units: of this layer.
    """
    certainty = (float(probabilities.max()) - 1 / units) / (1 - 1 / units) if units > 1 else 1.0
    colour = COLOURS[int(probabilities.argmax()) % len(COLOURS)]
    return mixed_with_white(colour, LEAST_STRENGTH + (1 - LEAST_STRENGTH) * certainty)


def selection_map(
    probabilities: NDArray[Any], tasks: Sequence[str], layers: Sequence[str], units: Sequence[int]
) -> Figure:
    """Figures 3 and 10: one row per task, one column per layer; number and colour are the unit, below its probability.

    Args:
        probabilities: (tasks, layers, max units), rows summing to 1.
        tasks, layers: names of rows and columns.
        units: how many each layer has.
    """
    from matplotlib.colors import to_rgb
    from matplotlib.patches import Patch

    chosen = paths(probabilities)
    picture = np.array([[to_rgb(cell_colour(p, n)) for p, n in zip(row, units, strict=True)] for row in probabilities])
    figure = new_figure(2.6 + 0.62 * len(layers), 1.3 + 0.5 * len(tasks))
    axes = figure.subplots()
    axes.imshow(picture, aspect="auto")
    for row, column in np.ndindex(chosen.shape):
        text = f"{chosen[row, column]}\n{probabilities[row, column].max():.2f}"
        axes.text(column, row, text, ha="center", va="center", fontsize=8)
    axes.set_xticks(range(len(layers)), layers, rotation=45, ha="right")
    axes.set_yticks(range(len(tasks)), tasks)
    axes.set_xticks(np.arange(len(layers) + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(len(tasks) + 1) - 0.5, minor=True)
    axes.grid(which="minor", color="white", linewidth=2)
    axes.tick_params(which="both", length=0)
    axes.set_xlabel("lego layer")
    axes.set_ylabel("task")
    axes.set_title("unit that each task chose, and its probability", fontsize=10)
    handles = [Patch(color=COLOURS[u % len(COLOURS)], label=f"unit {u}") for u in range(max(units))]
    figure.legend(handles=handles, loc="outside right center", frameon=False, fontsize=9)
    return figure


def shown_units(count: int) -> list[int]:
    """The units of a layer whose probabilities are drawn: of two, the second is 1 minus the first."""
    return [0] if count == 2 else list(range(count))


def draw_selection_curve(axes: Axes, record: RouteRecord, layer: int, unit: int) -> None:
    """Figure 11, one panel: the probability of a unit by step, a line per task."""
    for index, task in enumerate(record.tasks):
        axes.plot(record.steps, record.probabilities[:, index, layer, unit], label=task, **line_look(index))
    axes.set_ylim(-0.03, 1.03)
    tidy(axes, "optimizer step", f"p(unit {unit})", record.layers[layer])


def selection_curves(record: RouteRecord) -> Figure:
    """Figure 11: a panel per layer; with more than two units, a row per layer and a panel per unit."""
    panels = [(layer, unit) for layer, count in enumerate(record.units) for unit in shown_units(count) if count > 1]
    columns = _COLUMNS if max(record.units) == 2 else max(record.units)
    rows = math.ceil(len(panels) / columns)
    figure = new_figure(3.1 * columns + 1.6, 2.3 * rows)
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes, panel in zip(grid.flat, panels, strict=False):
        draw_selection_curve(axes, record, *panel)
    for axes in grid.flat[len(panels) :]:
        axes.set_axis_off()
    handles, labels = grid.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", frameon=False, title="task")
    return figure


def draw_certainty_curve(axes: Axes, record: RouteRecord) -> None:
    """The effective number of units that each task still chooses among, averaged over the layers, by step."""
    several = np.array(record.units) > 1
    values = effective_units(record.probabilities[:, :, several]).mean(-1)
    for index, task in enumerate(record.tasks):
        axes.plot(record.steps, values[:, index], label=task, **line_look(index))
    axes.set_ylim(0.97, max(record.units) * 1.02)
    tidy(axes, "optimizer step", "units, exp(entropy)", "units each task still chooses among")


def draw_units_in_use(axes: Axes, probabilities: NDArray[Any], layers: Sequence[str]) -> None:
    """Per layer, how many units the tasks' paths use: 1 where all share one."""
    values = units_in_use(paths(probabilities), probabilities.shape[-1])
    axes.barh(range(len(layers)), values, color=COLOURS[0])
    axes.set_yticks(range(len(layers)), layers)
    axes.invert_yaxis()
    axes.set_xlim(0, probabilities.shape[-1] * 1.05)
    tidy(axes, "units, exp(entropy of the tasks' choices)", "lego layer", "units that the paths use")


def certainty(record: RouteRecord) -> Figure:
    """Both views of entropy: each task's own by step, and the tasks' paths together by layer."""
    figure = new_figure(9.6, max(3.2, 0.9 + 0.24 * len(record.layers)))
    left, right = figure.subplots(1, 2)
    draw_certainty_curve(left, record)
    left.legend(frameon=False, fontsize=9)
    draw_units_in_use(right, record.probabilities[-1], record.layers)
    return figure


def draw_tree(axes: Axes, chosen: NDArray[np.int64], tasks: Sequence[str]) -> None:
    """The similarity tree of at least two tasks; see :func:`gppf_ds.analysis.routes.path_distances`.

    Args:
        axes: to draw into.
        chosen: (tasks, layers), the unit on each task's path.
        tasks: their names.
    """
    from scipy.cluster.hierarchy import dendrogram

    joined = similarity_tree(path_distances(chosen))
    found = dendrogram(joined, labels=list(tasks), orientation="left", no_plot=True)
    for across, up in zip(found["dcoord"], found["icoord"], strict=True):
        axes.plot(100 * np.array(across), np.array(up) / 10 - 0.5, color=COLOURS[0], linewidth=2)
    axes.set_yticks(range(len(tasks)), found["ivl"])
    axes.set_ylim(-0.6, len(tasks) - 0.4)
    axes.set_xlim(102, -2)
    axes.yaxis.tick_right()
    tidy(axes, "layers with different units (%)", "", "tasks by the paths they share")
    axes.grid(visible=False, axis="y")
    axes.spines["left"].set_visible(False)


def tree(chosen: NDArray[np.int64], tasks: Sequence[str]) -> Figure:
    """See :func:`draw_tree`."""
    figure = new_figure(5.6, 1.4 + 0.34 * len(tasks))
    draw_tree(figure.subplots(), chosen, tasks)
    return figure
