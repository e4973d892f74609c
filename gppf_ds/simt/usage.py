"""Usage counts: how many devices use each parameter in a step.

They follow from the schedule and the routes alone, but for token-level experts, whose users the ranks tell each other.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import compress

import numpy as np

from gppf_ds.config import RunConfig

Owner = tuple[str, ...]
"""Who decides whether a device uses a parameter: ``("all",)``, ``("task", name)``, ``("unit", layer, unit)`` or
``("expert", MoE layer, expert)``."""

ExpertUsers = Mapping[Owner, Mapping[str, int]]
"""How many devices of each task sent tokens to each expert."""


def owner_of(name: str) -> Owner:
    """The owner of a parameter of :class:`gppf_ds.simt.model.SimtModel`, from its name."""
    parts = name.split(".")
    if parts[0] == "heads":
        return ("task", parts[2])
    if parts[0] == "backbone" and "experts" in parts:  # backbone.layers.LAYER.units.0.block.PART.experts.EXPERT
        place = parts.index("experts")
        return ("expert", f"{parts[2]}.{parts[place - 1]}", parts[place + 1])
    for own in ("routers", "task_embeddings"):
        if parts[0] == "backbone" and own in parts:
            return ("task", parts[parts.index(own) + 1])
    if parts[:2] == ["backbone", "layers"] and "units" in parts:
        return ("unit", parts[2], parts[parts.index("units") + 1])
    return ("all",)


def usage_counts(
    owners: Iterable[Owner],
    tasks: Sequence[str],
    paths: np.ndarray | None,
    valid: np.ndarray,
    experts: ExpertUsers | None = None,
) -> Mapping[Owner, int]:
    """How many devices use each owner's parameters (GPPF section 3.2, "task average"; table of methods 1.5).

    Args:
        owners: all owners.
        tasks: the task of every device.
        paths: hard mode: the chosen unit, shape (devices, layers); soft mode: None, every device uses every unit.
        valid: which devices contribute to this step, shape (devices,), bool.
        experts: the valid devices that sent tokens to each expert.
    """
    everyone = int(np.count_nonzero(valid))
    by_task = Counter(tasks if everyone == len(tasks) else compress(tasks, valid.tolist()))
    by_unit: list[np.ndarray] = []
    if paths is not None:
        counted = valid.astype(np.float32)  # sums of ones are exact below 2**24 devices
        last = int(paths.max(initial=0))
        by_unit = [counted @ (paths == unit).astype(np.float32) for unit in range(last)]
        # Every device chooses one unit of each layer: the rest chose the last.
        by_unit.append(everyone - sum(by_unit, np.zeros(paths.shape[1])))
    counts: dict[Owner, int] = {}
    for owner in owners:
        match owner:
            case ("task", name):
                counts[owner] = by_task[name]
            case ("expert", *_):
                counts[owner] = sum((experts or {}).get(owner, {}).values())
            case ("unit", layer, unit) if paths is not None:
                counts[owner] = int(by_unit[int(unit)][int(layer)]) if int(unit) < len(by_unit) else 0
            case _:
                counts[owner] = everyone
    return counts


def divisors(counts: Mapping[Owner, int], num_devices: int, tasks: int, config: RunConfig) -> Mapping[Owner, int]:
    """What the sum of a parameter's gradients is divided by: its users, see :func:`usage_counts`.

    With schedule.kind accumulate the gradient is that of the sum over the tasks of each task's mean over the ranks, so
    that what is used at all is divided by the number of devices that run one task. With engine.average world everything
    is divided by the number of devices, and what nobody used takes its step, with a gradient of zero.

    Args:
        counts: of users.
        num_devices: of all ranks.
        tasks: how many.
        config: of the run.
    """
    if config.engine.average == "world":
        return dict.fromkeys(counts, num_devices)
    if config.schedule.kind != "accumulate":
        return counts
    return {owner: num_devices // tasks if count else 0 for owner, count in counts.items()}
