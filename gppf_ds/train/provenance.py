"""Provenance: which task of which run, on which data and under which licence, trained each part of a network.

A part is what :func:`gppf_ds.simt.usage.owner_of` tells apart: a unit of a lego layer, a token-level expert, or the
head of a task. The counters follow from the schedule, the valid devices and who chose what, which the engine tells
every rank, so that all ranks count the same.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from gppf_ds.config import RunConfig
from gppf_ds.data.catalogue import SOURCES
from gppf_ds.simt.usage import Owner, Users, users_of, valid_by_task
from gppf_ds.tasks.task import Task


@dataclass
class Record:
    """One task of one run and the parts that it trained, or weights that a run started from."""

    run: str
    """Name of the run's folder."""
    seed: int
    task: str | None
    """None for weights."""
    source: str | None
    """Name of the public data set in the catalogue, if the task says that it is one."""
    data: str
    """Title of the public data set, name of the data's folder, or name of the weights."""
    licence: str
    """As the data set's or the weights' authors state it; empty where none is recorded."""
    batch_size: int
    """Images in one device's batch; 0 for weights."""
    steps: dict[str, int] = field(default_factory=dict)
    """By part (:func:`part_name`), how many of the task's batches went through it in steps that counted: one device
    adds 1 to an optimizer step. 0 for parts that started from weights."""


@dataclass
class Provenance:
    """The records of a network: JSON by :func:`dataclasses.asdict`, and back by :meth:`read`."""

    inherited: list[Record] = field(default_factory=list)
    """Of what the run started from, the oldest first."""
    own: list[Record] = field(default_factory=list)
    """Of the run itself."""

    @classmethod
    def read(cls, values: Mapping[str, Any] | None) -> Provenance:
        """What :func:`dataclasses.asdict` made; empty for None, as of a checkpoint that was written without."""
        values = values or {}
        return cls(*([Record(**record) for record in values.get(kind, [])] for kind in ("inherited", "own")))

    def begin(self, config: RunConfig, tasks: Mapping[str, Task], parts: Iterable[Owner]) -> None:
        """Opens the records of what a run trains; those of a resumed run go on, unless a task has changed.

        Args:
            config: of the run; ``backbone.pretrained`` becomes a record of a run that begins.
            tasks: those that it trains, by name.
            parts: of the network.
        """
        run, source = Path(config.output).name, config.backbone.pretrained
        if source is not None and not self.own:
            name, licence = describe_weights(source, config.backbone.name)
            units = {part_name(part): 0 for part in parts if part[0] == "unit"}
            self.inherited.append(Record(run, config.seed, None, None, name, licence, 0, units))
        for name, task in tasks.items():
            opened = Record(run, config.seed, name, task.source, *describe_data(task), task.batch_size)
            latest = self._latest().get(name)
            if latest is None or replace(latest, steps={}) != opened:
                self.own.append(opened)

    def add(self, tasks: Sequence[str], valid: np.ndarray, chosen: Users, learning: Iterable[Owner]) -> None:
        """Counts an optimizer step that was not skipped.

        Args:
            tasks: of every device.
            valid: which devices contributed, (devices,), bool.
            chosen: how many of them, of each task, chose each unit and expert.
            learning: the parts that have a parameter that learns, each once.
        """
        latest, by_task = self._latest(), valid_by_task(tasks, valid)
        for part in learning:
            name = part_name(part)
            for task, batches in users_of(part, by_task, chosen).items():
                if batches:
                    steps = latest[task].steps
                    steps[name] = steps.get(name, 0) + batches

    def restricted(self, parts: Collection[Owner]) -> Provenance:
        """The records of a network that has only these parts."""
        same = {part: part for part in parts}
        return Provenance(_moved(self.inherited, same), _moved(self.own, same))

    def handed_on(self, origins: Mapping[Owner, Owner]) -> Provenance:
        """The records of a network whose parts started from parts of this one: all of them inherited.

        Args:
            origins: by part of the new network, the part of this one; parts that start anew are left out.
        """
        return Provenance(_moved([record for record in [*self.inherited, *self.own] if record.steps], origins))

    def of_parts(self, names: Mapping[str, str]) -> list[Record]:
        """The records of some parts, under other names, in the order of time.

        Args:
            names: by part (:func:`part_name`), the name that it gets.
        """
        records = []
        for record in [*self.inherited, *self.own]:
            if steps := {name: record.steps[part] for part, name in names.items() if part in record.steps}:
                records.append(replace(record, steps=steps))
        return records

    def _latest(self) -> dict[str | None, Record]:
        return {record.task: record for record in self.own}


def part_name(part: Owner) -> str:
    """``unit.LAYER.UNIT``, ``expert.LAYER.PART.EXPERT`` or ``task.NAME``: a part as a key of JSON."""
    return ".".join(part)


def describe_data(task: Task) -> tuple[str, str]:
    """What a task's data are called, and their licence (empty where none is recorded)."""
    if task.source in SOURCES:
        return SOURCES[task.source].title, SOURCES[task.source].licence
    folder = task.data_folder()
    return folder.name if folder is not None else "", ""


def describe_weights(source: str, backbone: str) -> tuple[str, str]:
    """What pretrained weights are called, and their licence; only those of timm name one.

    Args:
        source: as ``backbone.pretrained`` has it.
        backbone: timm's name of the model.
    """
    kind, _, tag = source.partition(":")
    if kind != "timm":
        return Path(source).name, ""
    from timm import get_pretrained_cfg

    found = get_pretrained_cfg(f"{backbone.split('.')[0]}.{tag}" if tag else backbone, allow_unregistered=True)
    if found is None:
        return f"timm {backbone}", ""
    return f"timm {found.architecture}.{found.tag}" if found.tag else f"timm {backbone}", found.license or ""


def _moved(records: Iterable[Record], origins: Mapping[Owner, Owner]) -> list[Record]:
    """Records under the names of other parts; a record that loses all its parts is dropped."""
    moved = []
    for record in records:
        places = ((part_name(new), part_name(old)) for new, old in origins.items())
        steps = {new: record.steps[old] for new, old in places if old in record.steps}
        if steps or not record.steps:
            moved.append(replace(record, steps=steps))
    return moved
