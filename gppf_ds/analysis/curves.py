"""Curves over the steps of a run: losses, metrics, temperature, throughput."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from gppf_ds.analysis.style import COLOURS, LINE_COLOURS, tidy

if TYPE_CHECKING:
    from matplotlib.axes import Axes

STEP = "optimizer step"
_SMOOTHED = 25
"""Of this many points a loss curve's smooth line is made."""


def smooth(values: Sequence[float]) -> NDArray[np.float64]:
    """The mean over a window of a 25th of the curve on either side; windows shrink at the ends."""
    array = np.asarray(values, dtype=np.float64)
    half = max(1, len(array) // _SMOOTHED)
    sums = np.concatenate([[0.0], array.cumsum()])
    low = np.maximum(np.arange(len(array)) - half, 0)
    high = np.minimum(np.arange(len(array)) + half + 1, len(array))
    return (sums[high] - sums[low]) / (high - low)


def draw_loss(axes: Axes, steps: Sequence[int], losses: Sequence[float]) -> None:
    """Every recorded loss as a point, and their smooth line."""
    axes.plot(steps, losses, "o", markersize=3, color=LINE_COLOURS[4], alpha=0.8, markeredgewidth=0)
    if losses:
        axes.plot(steps, smooth(losses), color=LINE_COLOURS[0], linewidth=1.8)
    tidy(axes, STEP, "loss, sum of its terms", "training loss")


def draw_metric(axes: Axes, steps: Sequence[int], values: Sequence[float], name: str, higher_is_better: bool) -> None:
    """A metric on validation data, a point for each evaluation."""
    axes.plot(steps, values, "o-", color=LINE_COLOURS[5], markersize=5)
    tidy(axes, STEP, name, f"validation ({'higher' if higher_is_better else 'lower'} is better)")


def draw_temperature(axes: Axes, lines: Sequence[Mapping[str, Any]]) -> None:
    """The Gumbel-softmax temperature: where it is low, choices are made."""
    axes.plot([line["step"] for line in lines], [line["tau"] for line in lines], color=LINE_COLOURS[0])
    axes.set_ylim(bottom=0)
    tidy(axes, STEP, "temperature (no unit)", "temperature of the controllers")


def draw_throughput(axes: Axes, steps: Sequence[int], rates: Sequence[float]) -> None:
    """Images of all ranks per second of training; evaluations and checkpoints are not in it."""
    axes.plot(steps, rates, color=LINE_COLOURS[0])
    axes.set_ylim(bottom=0)
    tidy(axes, STEP, "images / s, all ranks", "throughput while training")


def draw_step_parts(axes: Axes, steps: Sequence[int], parts: Mapping[str, Sequence[float]]) -> None:
    """Seconds of a step, its parts on top of each other.

    Args:
        axes: to draw into.
        steps: at the ends of what the means are of.
        parts: mean seconds, by the name of the part.
    """
    axes.stackplot(steps, list(parts.values()), labels=list(parts), colors=COLOURS[: len(parts)])
    axes.set_ylim(0, 1.45 * max(map(sum, zip(*parts.values(), strict=True)), default=1.0))
    axes.legend(frameon=False, fontsize=8, loc="upper right", ncols=2)
    tidy(axes, STEP, "seconds per step", "time of a step, main rank")
