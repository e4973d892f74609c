"""What controllers chose, in numbers: certainty, units in use, and how near tasks are by the paths they share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def entropy(probabilities: NDArray[Any]) -> Floats:
    """Shannon entropy in nats over the last axis, (..., units) -> (...); 0 log 0 counts as 0."""
    p = np.asarray(probabilities, dtype=np.float64)
    return -(p * np.log(np.where(p > 0, p, 1.0))).sum(-1) + 0.0


def effective_units(probabilities: NDArray[Any]) -> Floats:
    """exp(entropy): among how many equally likely units a choice is open, (..., units) -> (...), 1 when it is made."""
    return np.exp(entropy(probabilities))


def paths(probabilities: NDArray[Any]) -> NDArray[np.int64]:
    """The most likely unit, (..., layers, units) -> (..., layers)."""
    return np.asarray(probabilities).argmax(-1)


def units_in_use(chosen: NDArray[np.int64], units: int) -> Floats:
    """The effective number of units that the tasks' paths use in every layer.

    Args:
        chosen: (tasks, layers), units.
        units: the most that a layer has.

    Returns:
        (layers,): 1 where all tasks share a unit; N where N units have equally many tasks.
    """
    shares = np.stack([(chosen == unit).mean(0) for unit in range(units)], axis=-1)
    return effective_units(shares)


def path_distances(chosen: NDArray[np.int64]) -> Floats:
    """The share of layers in which two tasks' paths take different units, (tasks, layers) -> (tasks, tasks)."""
    return (chosen[:, None] != chosen[None]).mean(-1)


def similarity_tree(distances: Floats) -> Floats:
    """Tasks joined by average linkage (UPGMA), scipy's linkage matrix (tasks - 1, 4); needs two tasks at least."""
    from scipy.cluster.hierarchy import linkage
    from scipy.spatial.distance import squareform

    return np.asarray(linkage(squareform(distances, checks=False), method="average", optimal_ordering=True))


def as_numbers(probabilities: Floats, tasks: Sequence[str], layers: Sequence[str]) -> dict[str, Any]:
    """What the pictures show at one step, for a json file.

    Args:
        probabilities: (tasks, layers, units).
        tasks, layers: their names.
    """
    chosen = paths(probabilities)
    return {
        "layers": list(layers),
        "paths": dict(zip(tasks, chosen.tolist(), strict=True)),
        "probabilities": dict(zip(tasks, probabilities.round(5).tolist(), strict=True)),
        "entropy_nats": dict(zip(tasks, entropy(probabilities).round(5).tolist(), strict=True)),
        "effective_units": dict(zip(tasks, effective_units(probabilities).round(5).tolist(), strict=True)),
        "units_in_use": dict(zip(layers, units_in_use(chosen, probabilities.shape[-1]).round(5).tolist(), strict=True)),
        "share_of_layers_that_differ": dict(zip(tasks, path_distances(chosen).round(5).tolist(), strict=True)),
    }
