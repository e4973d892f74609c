"""Token-level experts: which experts each task's tokens choose in each layer, and how much that says of the task."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from gppf_ds.analysis.heat_map import draw_heat_map
from gppf_ds.analysis.routes import Floats, entropy
from gppf_ds.analysis.style import COLOURS, new_figure, tidy

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def mutual_information(shares: NDArray[Any]) -> Floats:
    """I(T; E) = H(E) - H(E | T) per layer in nats, every task as likely (Mod-Squad, arXiv 2212.08066).

    Args:
        shares: (tasks, layers, experts), rows summing to 1; see :func:`gppf_ds.backbone.moe.selections.usage`.

    Returns:
        (layers,): 0 where all tasks use the experts alike, log(tasks) where none shares an expert with another.
    """
    values = np.asarray(shares, dtype=np.float64)
    return np.maximum(entropy(values.mean(0)) - entropy(values).mean(0), 0.0)


def usage_matrix(shares: NDArray[Any], tasks: Sequence[str], layers: Sequence[str]) -> Figure:
    """A panel per layer: rows are tasks, columns are experts, the colour is the share of the task's selections.

    Args:
        shares: (tasks, layers, experts); see :func:`gppf_ds.backbone.moe.selections.usage`.
        tasks, layers: names.
    """
    count = shares.shape[-1]
    figure = new_figure(3.0 + 0.22 * max(count, 12), len(layers) * (0.75 + 0.22 * len(tasks)) + 0.5)
    grid = figure.subplots(len(layers), 1, squeeze=False, sharex=True)
    most = float(np.nanmax(shares))
    for index, axes in enumerate(grid[:, 0]):
        experts = [str(expert) for expert in range(count)]
        image = draw_heat_map(axes, shares[:, index], tasks, experts, most, numbers=False)
        axes.set_title(layers[index], fontsize=9, loc="left")
    grid[-1, 0].set_xlabel("expert")
    figure.colorbar(image, ax=list(grid[:, 0]), label="share of the task's selections", fraction=0.05)
    return figure


def draw_mutual_information(axes: Axes, shares: NDArray[Any], layers: Sequence[str]) -> None:
    """A bar per layer, and the most that so many tasks can reach.

    Args:
        axes: to draw into.
        shares: (tasks, layers, experts); see :func:`gppf_ds.backbone.moe.selections.usage`.
        layers: names.
    """
    axes.barh(range(len(layers)), mutual_information(shares), color=COLOURS[0])
    most = float(np.log(shares.shape[0]))
    axes.axvline(most, color="black", linestyle=":", linewidth=1.2, label=f"log({shares.shape[0]} tasks)")
    axes.set_yticks(range(len(layers)), layers)
    axes.invert_yaxis()
    axes.legend(frameon=False, fontsize=9)
    tidy(axes, "I(task; expert), nats", "layer", "what experts say of the task")


def mutual_information_by_layer(shares: NDArray[Any], layers: Sequence[str]) -> Figure:
    """See :func:`draw_mutual_information`."""
    figure = new_figure(5.6, 1.4 + 0.3 * len(layers))
    draw_mutual_information(figure.subplots(), shares, layers)
    return figure
