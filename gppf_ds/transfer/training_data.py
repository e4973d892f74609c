"""What a path was trained on, for ``model.json`` and the model card."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import Any

from gppf_ds.train.provenance import Provenance, part_name

HEAD = "head"
"""Stands beside the names of the layers."""
NOT_RECORDED = "not recorded"
WEIGHTS = "initial weights"


def of_path(
    checkpoint: Path, task: str, numbers: Mapping[str, int], head: bool, experts: Mapping[str, str] | None = None
) -> list[dict[str, Any]]:
    """The records of everything that trained a path, in the order of time.

    Args:
        checkpoint: a complete one.
        task: whose path it is.
        numbers: the unit of every layer, by the layers' names, first to last.
        head: whether the task's head belongs to what is described.
        experts: of token-level experts, by part (:func:`gppf_ds.train.provenance.part_name`), the name it gets.

    Returns:
        The fields of :class:`gppf_ds.train.provenance.Record`, with ``steps`` by layer ("head" for the head).
    """
    file = checkpoint / "state.json"
    values = json.loads(file.read_text()).get("provenance") if file.is_file() else None
    names = {part_name(("unit", str(i), str(unit))): layer for i, (layer, unit) in enumerate(numbers.items())}
    names |= experts or {}
    if head:
        names[part_name(("task", task))] = HEAD
    return [asdict(record) for record in Provenance.read(values).of_parts(names)]


def section(records: Sequence[Mapping[str, Any]], layers: Sequence[str]) -> str:
    """The section of the model card, in Markdown.

    Args:
        records: by :func:`of_path`.
        layers: names of the path's layers, first to last.
    """
    if not records:
        return (
            "## Training data\n\nNot recorded: the checkpoint was written by a version of gppf_ds that kept no record "
            "of what trained each unit."
        )
    names = _names(records)
    data = [
        f"| {record['data'] or NOT_RECORDED} | {record['licence'] or NOT_RECORDED} | {record['task'] or WEIGHTS} | "
        f"{_run(record)} | {_samples(record)} |"
        for record in records
    ]
    parts = [f"| {place} | {trained} |" for place, trained in _ranges(records, names, [*layers, HEAD])]
    return "\n".join(
        [
            "## Training data\n",
            "| data | licence | task | run | samples |\n|---|---|---|---|---|",
            *data,
            "\nSamples are what the most trained part of this path saw, repetitions included. By layer, in batches:\n",
            "| layers | trained by |\n|---|---|",
            *parts,
        ]
    )


def _names(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """What trained, in a word; with its run where those of several records are the same."""
    names = [record["task"] or WEIGHTS for record in records]
    often = Counter(names)
    return [
        f"{name} ({_run(record)})" if often[name] > 1 else name for name, record in zip(names, records, strict=True)
    ]


def _run(record: Mapping[str, Any]) -> str:
    return f"{record['run']}, seed {record['seed']}"


def _samples(record: Mapping[str, Any]) -> str:
    return f"{max(record['steps'].values()) * record['batch_size']:,}" if record["task"] is not None else ""


def _ranges(records: Sequence[Mapping[str, Any]], names: Sequence[str], places: Sequence[str]) -> list[tuple[str, str]]:
    """Neighbouring layers that the same records trained, and how often: ("Stem to Res3.0", "digits 12 to 15")."""
    trained = {place: [k for k, record in enumerate(records) if place in record["steps"]] for place in places}
    rows = []
    for (kinds, _), group in groupby(places, lambda place: (trained[place], place == HEAD)):
        members = list(group)
        if kinds or members != [HEAD]:
            title = members[0] if len(members) == 1 else f"{members[0]} to {members[-1]}"
            counts = [_count(names[k], [records[k]["steps"][place] for place in members]) for k in kinds]
            rows.append((title, "; ".join(counts) or NOT_RECORDED))
    return rows


def _count(name: str, batches: Sequence[int]) -> str:
    low, high = min(batches), max(batches)
    if high == 0:
        return name
    return f"{name} {low:,}" if low == high else f"{name} {low:,} to {high:,}"
