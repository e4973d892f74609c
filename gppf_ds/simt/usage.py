"""Usage counts: how many devices use each parameter in a step.

Whose heads run every rank knows from the schedule; which units and experts its own devices chose, a rank tells the
others, so that none has to draw the routes of all.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import compress

import numpy as np
from torch import Tensor

from gppf_ds.config import RunConfig

Owner = tuple[str, ...]
"""Who decides whether a device uses a parameter: ``("all",)``, ``("task", name)``, ``("unit", layer, unit)`` or
``("expert", MoE layer, expert)``."""

Users = Mapping[Owner, Mapping[str, int]]
"""How many valid devices of each task chose a unit, or sent tokens to an expert. With soft routes no unit is in it:
every device uses all of them."""


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


def count_units(
    chosen: dict[Owner, Counter[str]], ran: np.ndarray, tasks: Sequence[str], units: Iterable[Owner]
) -> None:
    """Adds the users of every unit to ``chosen``; ``ran`` counts them, shape (tasks, layers, max units)."""
    for unit in units:
        _, layer, number = unit
        counts = zip(tasks, ran[:, int(layer), int(number)].tolist(), strict=True)
        chosen.setdefault(unit, Counter()).update({task: int(count) for task, count in counts if count})


def count_experts(
    chosen: dict[Owner, Counter[str]],
    users: Mapping[str, Tensor],
    tasks: Iterable[str],
    experts: Mapping[str, Sequence[int]],
) -> None:
    """Adds the users of every expert to ``chosen``; ``users`` counts them by MoE layer, shape (tasks, experts)."""
    for layer, counts in users.items():
        for task, row in zip(tasks, counts.tolist(), strict=True):
            for expert, count in zip(experts[layer], row, strict=True):
                if count:
                    chosen.setdefault(("expert", layer, str(expert)), Counter())[task] += int(count)


def usage_counts(
    owners: Iterable[Owner], tasks: Sequence[str], valid: np.ndarray, chosen: Users
) -> Mapping[Owner, int]:
    """How many devices use each owner's parameters (GPPF section 3.2, "task average"; table of methods 1.5).

    Args:
        owners: all owners.
        tasks: the task of every device.
        valid: which devices contribute to this step, shape (devices,), bool.
        chosen: who chose each unit and expert.
    """
    by_task = valid_by_task(tasks, valid)
    return {owner: sum(users_of(owner, by_task, chosen).values()) for owner in owners}


def valid_by_task(tasks: Sequence[str], valid: np.ndarray) -> Mapping[str, int]:
    """How many valid devices run each task; the arguments are those of :func:`usage_counts`."""
    return Counter(tasks if valid.all() else compress(tasks, valid.tolist()))


def users_of(owner: Owner, by_task: Mapping[str, int], chosen: Users) -> Mapping[str, int]:
    """How many valid devices of each task use an owner's parameters, from what :func:`valid_by_task` says."""
    match owner:
        case ("task", name):
            return {name: by_task.get(name, 0)}
        case ("expert", *_):
            return chosen.get(owner, {})
        case _:
            return chosen.get(owner, by_task)


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
