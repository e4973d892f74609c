"""Usage counts: how many devices use each parameter in a step, from the schedule and the routes alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

Owner = tuple[str, ...]
"""Who decides whether a device uses a parameter: ``("all",)``, ``("task", name)`` or ``("unit", layer, unit)``."""


def owner_of(name: str) -> Owner:
    """The owner of a parameter of :class:`gppf_ds.simt.model.SimtModel`, from its name."""
    parts = name.split(".")
    if parts[0] == "heads":
        return ("task", parts[2])
    if parts[:2] == ["backbone", "layers"] and "units" in parts:
        return ("unit", parts[2], parts[parts.index("units") + 1])
    return ("all",)


def usage_counts(
    owners: Iterable[Owner],
    tasks: Sequence[str],
    paths: np.ndarray | None,
    valid: np.ndarray,
) -> Mapping[Owner, int]:
    """How many devices use each owner's parameters (GPPF section 3.2, "task average"; table of methods 1.5).

    Args:
        owners: all owners.
        tasks: the task of every device.
        paths: hard mode: the chosen unit, shape (devices, layers); soft mode: None, every device uses every unit.
        valid: which devices contribute to this step, shape (devices,), bool.
    """
    names = np.asarray(tasks)
    counts: dict[Owner, int] = {}
    for owner in owners:
        match owner:
            case ("task", name):
                counts[owner] = int(np.sum(valid & (names == name)))
            case ("unit", layer, unit) if paths is not None:
                counts[owner] = int(np.sum(valid & (paths[:, int(layer)] == int(unit))))
            case _:
                counts[owner] = int(np.sum(valid))
    return counts
