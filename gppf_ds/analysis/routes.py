"""The selection map: which unit each task chose in each lego layer (GPPF figures 3 and 10)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

# Okabe and Ito's colours, told apart with every common colour vision.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442")


def selection_map(probabilities: np.ndarray, tasks: Sequence[str], layers: Sequence[str], target: Path) -> None:
    """Draws the map: one row per task, one column per layer, coloured by unit, the more certain the stronger.

    Args:
        probabilities: (tasks, layers, units), rows summing to 1.
        tasks: names of the rows.
        layers: names of the columns.
        target: image file; its suffix chooses the format.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.colors import to_rgb
    from matplotlib.patches import Patch

    units = probabilities.shape[-1]
    chosen = probabilities.argmax(-1)
    certainty = (probabilities.max(-1) - 1 / units) / max(1 - 1 / units, 1e-9)
    strength = (0.35 + 0.65 * certainty)[..., None]
    picture = strength * np.array([to_rgb(c) for c in COLOURS])[chosen % len(COLOURS)] + (1 - strength)

    figure, axes = plt.subplots(figsize=(2.2 + 0.62 * len(layers), 1.3 + 0.5 * len(tasks)), layout="constrained")
    axes.imshow(picture, aspect="auto")
    for row, column in np.ndindex(chosen.shape):
        text = f"{chosen[row, column]}\n{probabilities[row, column].max():.2f}"
        axes.text(column, row, text, ha="center", va="center", fontsize=7)
    axes.set_xticks(range(len(layers)), layers, rotation=45, ha="right")
    axes.set_yticks(range(len(tasks)), tasks)
    axes.set_xticks(np.arange(len(layers) + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(len(tasks) + 1) - 0.5, minor=True)
    axes.grid(which="minor", color="white", linewidth=2)
    axes.tick_params(which="both", length=0)
    axes.set_xlabel("lego layer")
    axes.set_ylabel("task")
    axes.set_title("unit chosen by each task (number) and its probability", fontsize=9)
    handles = [Patch(color=COLOURS[u % len(COLOURS)], label=f"unit {u}") for u in range(units)]
    figure.legend(handles=handles, loc="outside right center", frameon=False, fontsize=8)
    figure.savefig(target, dpi=160)
    plt.close(figure)
