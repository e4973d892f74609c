"""Files of costs: what ``gppf-ds plan`` is told in the place of measuring, and what it has measured."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from gppf_ds.errors import UserError
from gppf_ds.train.simulation import Cost, Costs

TASK_KEYS = ("seconds", "start", "memory", "batch_size")
RANK_KEYS = ("seconds", "group_seconds", "memory", "capacity")


def read(path: Path, batch_sizes: Mapping[str, int]) -> Costs:
    """The costs in a YAML or json file.

    ``tasks`` has for every task ``seconds`` of one device's batch (a number, or a list by phase) and, if known, the
    part of them that does not depend on the batch size (``start``), ``memory`` in bytes, and the ``batch_size`` that
    these belong to (the recipe's, if it is left out). ``rank``, if it is there: ``seconds`` that every step takes
    besides, ``group_seconds`` that every group of devices takes besides (each of ``engine.accumulation``), ``memory``
    that is held between steps, and the ``capacity`` of a rank's memory.

    Args:
        path: of the file.
        batch_sizes: of the recipe's tasks.

    Raises:
        UserError: the file cannot be read, lacks a task, or a value in it is of no use.
    """
    try:
        content = yaml.safe_load(path.read_text())
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): name a file of costs.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is neither YAML nor json: {' '.join(str(error).split())}.") from error
    tasks = content.get("tasks") if isinstance(content, dict) else None
    if not isinstance(tasks, dict):
        raise UserError(f"{path} needs a key tasks: a mapping of every task to its seconds and memory.")
    if missing := [name for name in batch_sizes if name not in tasks]:
        raise UserError(f"{path} has no tasks.{missing[0]}: add its seconds, or measure it (plan without --costs).")
    costs = {name: _cost(path, name, tasks[name], batch_size) for name, batch_size in batch_sizes.items()}
    counts = {len(cost.seconds) for cost in costs.values()}
    if len(counts) > 1:
        raise UserError(f"{path}: some tasks have {min(counts)} phases of seconds, others {max(counts)}: give as many.")
    rank = _mapping(path, "rank", content.get("rank") or {}, RANK_KEYS)
    numbers = {key: _number(path, f"rank.{key}", value) for key, value in rank.items() if value is not None}
    return Costs(costs, **numbers)


def write(path: Path, costs: Costs) -> None:
    """Writes a file for :func:`read`."""
    tasks = {
        name: {
            "batch_size": cost.batch_size,
            "seconds": [round(value, 6) for value in cost.seconds],
            "start": [round(value, 6) for value in cost.start],
            "memory": int(cost.memory),
        }
        for name, cost in costs.tasks.items()
    }
    rank = {
        "seconds": round(costs.seconds, 6),
        "group_seconds": round(costs.group_seconds, 6),
        "memory": int(costs.memory),
        "capacity": costs.capacity,
    }
    path.write_text(yaml.safe_dump({"tasks": tasks, "rank": rank}, sort_keys=False, default_flow_style=None))


def _cost(path: Path, name: str, given: Any, batch_size: int) -> Cost:
    key = f"tasks.{name}"
    given = _mapping(path, key, {"seconds": given} if isinstance(given, int | float | list) else given, TASK_KEYS)
    if "seconds" not in given:
        raise UserError(f"{path}: {key} needs seconds: of one device's batch, forward and backward.")
    seconds = _numbers(path, f"{key}.seconds", given["seconds"])
    if sum(seconds) <= 0:
        raise UserError(f"{path}: {key}.seconds must be above 0, not {given['seconds']}.")
    start = _numbers(path, f"{key}.start", given.get("start", [0.0] * len(seconds)))
    if len(start) != len(seconds) or any(part > whole for part, whole in zip(start, seconds, strict=True)):
        raise UserError(f"{path}: {key}.start must have as many phases as seconds and be at most as large in each.")
    size = given.get("batch_size", batch_size)
    if not isinstance(size, int) or size < 1:
        raise UserError(f"{path}: {key}.batch_size must be a whole number from 1, not {size!r}.")
    cost = Cost(size, seconds, start, _number(path, f"{key}.memory", given.get("memory", 0.0)))
    return cost.at(batch_size)


def _mapping(path: Path, key: str, given: Any, keys: tuple[str, ...]) -> dict[str, Any]:
    if not isinstance(given, dict):
        raise UserError(f"{path}: {key} must be a mapping with the keys {', '.join(keys)}, not {given!r}.")
    if unknown := [name for name in given if name not in keys]:
        raise UserError(f"{path}: {key} has no key {unknown[0]!r}: choose from {', '.join(keys)}.")
    return given


def _numbers(path: Path, key: str, given: Any) -> tuple[float, ...]:
    return tuple(_number(path, key, value) for value in (given if isinstance(given, list) and given else [given]))


def _number(path: Path, key: str, value: Any) -> float:
    try:
        number = float(value)  # YAML takes 1e9 for a word
    except (TypeError, ValueError):
        number = -1.0
    if not 0 <= number < float("inf") or isinstance(value, bool):
        raise UserError(f"{path}: {key} must be a number from 0, not {value!r}.")
    return number
