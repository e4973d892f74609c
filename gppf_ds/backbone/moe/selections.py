"""How often the tokens of each task choose each expert."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from gppf_ds.backbone.moe.layout import Layout, router_of

Selections = dict[str, dict[str, dict[int, float]]]
"""By task, MoE layer and expert: how many choices fell on it, or which share of them."""


def running(buffers: Iterable[tuple[str, Tensor]], layout: Layout) -> Selections:
    """The shares of the last training steps, from the running rows of the routers; zeros for a task that never ran.

    Args:
        buffers: of :class:`gppf_ds.simt.model.SimtModel`, by name.
        layout: of its experts.
    """
    found: Selections = {task: {} for task in layout.tasks}
    for name, tensor in buffers:
        router = router_of(name)
        if router is not None and router.tensor == "usage":
            experts = layout.tasks[router.task].experts[router.layer]
            found[router.task][router.layer] = dict(zip(experts, tensor.tolist(), strict=True))
    return found


def as_array(selections: Selections, layout: Layout) -> tuple[NDArray[np.float64], list[str], list[str]]:
    """The usage matrix: shares (tasks, layers, experts), then the names of tasks and layers.

    A column is an expert's number. Rows sum to 1; those of a task that chose nothing are nan. Experts that a task does
    not see, or that are not there, have 0.
    """
    tasks, layers = list(selections), list(layout.experts)
    width = 1 + max(max(experts) for experts in layout.experts.values())
    counts = np.zeros((len(tasks), len(layers), width))
    for row, task in enumerate(tasks):
        for column, layer in enumerate(layers):
            for expert, count in selections[task].get(layer, {}).items():
                counts[row, column, expert] = count
    return usage(counts), tasks, layers


def usage(selections: NDArray[Any]) -> NDArray[np.float64]:
    """U[t, l, e]: the share of task t's selections in layer l that went to expert e.

    Args:
        selections: (tasks, layers, experts), counts or mean probabilities; nothing for an expert that a layer lacks.

    Returns:
        The same shape, rows summing to 1; a row without a selection is nan.
    """
    counts = np.asarray(selections, dtype=np.float64)
    totals = counts.sum(-1, keepdims=True)
    return np.divide(counts, totals, out=np.full_like(counts, np.nan), where=totals > 0)


def most_used(selections: Selections, tasks: Sequence[str], layer: str, among: Sequence[int]) -> list[int]:
    """These experts, those first that these tasks together choose most."""
    return sorted(among, key=lambda expert: -sum(selections[task][layer].get(expert, 0.0) for task in tasks))
