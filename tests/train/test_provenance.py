"""Provenance: counters that follow from tasks, routes and valid devices, and records that move with units and heads."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict
from typing import Any

import numpy as np
import pytest

from gppf_ds.config import BackboneConfig, RunConfig
from gppf_ds.data.catalogue import SOURCES
from gppf_ds.data.licences import LICENCES
from gppf_ds.simt.usage import Owner, Users, usage_counts
from gppf_ds.tasks.classification import Classification
from gppf_ds.tasks.task import Task
from gppf_ds.train.provenance import Provenance, Record, describe_data, describe_weights

UNITS: list[Owner] = [("unit", str(layer), str(unit)) for layer in range(3) for unit in range(2)]
PARTS: list[Owner] = [*UNITS, ("task", "a"), ("task", "b")]


def config(**more: Any) -> RunConfig:
    return RunConfig(output="runs/first", steps=9, seed=4, **more)


def tasks(batch_size: int = 8) -> dict[str, Task]:
    return {"a": Classification("sets/mine", batch_size, classes=3), "b": Classification("pets", 2, source="cls_pets")}


def begun(**more: Any) -> Provenance:
    made = Provenance()
    made.begin(config(**more), tasks(), PARTS)
    return made


def count(made: Provenance, names: list[str], paths: Any, valid: list[bool], frozen: tuple[Owner, ...] = ()) -> None:
    made.add(names, np.array(valid), chosen(names, paths, valid), set(PARTS) - set(frozen))


def chosen(names: list[str], paths: Any, valid: Any) -> Users:
    """Who chose each unit; with soft routes (paths None) nobody chooses."""
    if paths is None:
        return {}
    users: dict[Owner, Counter[str]] = {unit: Counter() for unit in UNITS}
    for name, path, counted in zip(names, paths, valid, strict=True):
        for layer, unit in enumerate(path):
            users["unit", str(layer), str(unit)][name] += int(counted)
    return users


def steps(made: Provenance, task: str) -> dict[str, int]:
    return {record.task: record.steps for record in made.own}[task]


def test_soft_routes_train_every_unit() -> None:
    made = begun()
    count(made, ["a", "b", "a"], None, [True, True, True])
    count(made, ["b", "b", "b"], None, [True, False, True])
    assert steps(made, "a") == {f"unit.{layer}.{unit}": 2 for layer in range(3) for unit in range(2)} | {"task.a": 2}
    assert steps(made, "b") == {f"unit.{layer}.{unit}": 3 for layer in range(3) for unit in range(2)} | {"task.b": 3}


def test_hard_routes_train_what_they_choose() -> None:
    made = begun()
    count(made, ["a", "b", "a"], [[0, 1, 1], [1, 1, 0], [0, 0, 1]], [True, True, True])
    assert steps(made, "a") == {"unit.0.0": 2, "unit.1.1": 1, "unit.1.0": 1, "unit.2.1": 2, "task.a": 2}
    assert steps(made, "b") == {"unit.0.1": 1, "unit.1.1": 1, "unit.2.0": 1, "task.b": 1}


def test_what_is_frozen_or_not_valid_learns_nothing() -> None:
    made = begun()
    count(made, ["a", "b"], [[0, 1, 1], [0, 0, 0]], [True, False], frozen=(("unit", "0", "0"), ("task", "a")))
    assert steps(made, "a") == {"unit.1.1": 1, "unit.2.1": 1}
    assert steps(made, "b") == {}


@pytest.mark.parametrize("soft", [True, False])
def test_over_all_tasks_the_counts_are_the_usage_counts(soft: bool) -> None:
    random = np.random.default_rng(0)
    made = begun()
    total = dict.fromkeys(PARTS, 0)
    for _ in range(20):
        names = [str(name) for name in random.choice(["a", "b"], 5)]
        paths = None if soft else random.integers(0, 2, (5, 3))
        valid = random.random(5) < 0.8
        users = chosen(names, paths, valid)
        made.add(names, valid, users, PARTS)
        counts = usage_counts(PARTS, names, valid, users)
        for part in PARTS:
            total[part] += counts[part]
    for part in PARTS:
        assert sum(record.steps.get(".".join(part), 0) for record in made.own) == total[part]


def test_records_survive_json_and_a_resumed_run_goes_on_with_them() -> None:
    made = begun()
    count(made, ["a", "b"], None, [True, True])
    read = Provenance.read(json.loads(json.dumps(asdict(made))))
    assert read == made
    read.begin(config(), tasks(), PARTS)
    assert read == made
    assert Provenance.read(None) == Provenance()


def test_another_batch_size_begins_another_record() -> None:
    made = begun()
    count(made, ["a", "b"], None, [True, True])
    made.begin(config(), tasks(batch_size=16), PARTS)
    count(made, ["a", "b"], None, [True, True])
    assert [(record.task, record.batch_size, record.steps["unit.0.0"]) for record in made.own] == [
        ("a", 8, 1),
        ("b", 2, 2),
        ("a", 16, 1),
    ]


def test_a_record_names_data_and_licence() -> None:
    mine, pets = begun().own
    assert (mine.run, mine.seed, mine.source, mine.data, mine.licence) == ("first", 4, None, "mine", "")
    assert (pets.source, pets.data, pets.licence) == ("cls_pets", SOURCES["cls_pets"].title, LICENCES["cls_pets"])
    assert "CC BY-SA 4.0" in pets.licence
    assert describe_data(Classification("x", 1, source="cls_cars")) == ("Stanford Cars", "")


def test_every_licence_is_of_a_known_set() -> None:
    assert set(LICENCES) <= set(SOURCES)
    assert {name for name, source in SOURCES.items() if source.licence} == set(LICENCES)


def test_pretrained_weights_are_a_record_of_all_units() -> None:
    made = begun(backbone=BackboneConfig(pretrained="weights/mine.pth"))
    [weights] = made.inherited
    assert (weights.task, weights.data, weights.licence, weights.batch_size) == (None, "mine.pth", "", 0)
    assert weights.steps == {".".join(unit): 0 for unit in UNITS}
    made.begin(config(backbone=BackboneConfig(pretrained="weights/mine.pth")), tasks(), PARTS)
    assert len(made.inherited) == 1


def test_weights_of_timm_bring_their_licence() -> None:
    assert describe_weights("timm", "resnet50") == ("timm resnet50.a1_in1k", "apache-2.0")
    assert describe_weights("timm:ms_in1k", "swin_tiny_patch4_window7_224") == (
        "timm swin_tiny_patch4_window7_224.ms_in1k",
        "mit",
    )
    assert describe_weights("folder/resnet50.safetensors", "resnet50") == ("resnet50.safetensors", "")


def trained() -> Provenance:
    made = begun(backbone=BackboneConfig(pretrained="mine.pth"))
    count(made, ["a", "b"], [[0, 0, 0], [1, 1, 0]], [True, True])
    return made


def test_a_smaller_network_keeps_the_records_of_what_is_left() -> None:
    left = trained().restricted([("unit", "0", "0"), ("unit", "1", "0"), ("unit", "2", "0"), ("task", "a")])
    assert [record.task for record in left.inherited] == [None]
    assert {record.task: record.steps for record in left.own} == {
        "a": {"unit.0.0": 1, "unit.1.0": 1, "unit.2.0": 1, "task.a": 1},
        "b": {"unit.2.0": 1},
    }
    assert [record.task for record in trained().restricted([("unit", "0", "0")]).own] == ["a"]


def test_a_run_that_starts_from_another_inherits_its_records_first() -> None:
    origins: dict[Owner, Owner] = {
        ("unit", "0", "0"): ("unit", "0", "1"),
        ("unit", "0", "1"): ("unit", "0", "1"),  # grown: a copy
        ("task", "new"): ("task", "b"),
    }
    made = trained().handed_on(origins)
    assert made.own == []
    assert [(record.task, record.steps) for record in made.inherited] == [
        (None, {"unit.0.0": 0, "unit.0.1": 0}),
        ("b", {"unit.0.0": 1, "unit.0.1": 1, "task.new": 1}),
    ]
    made.begin(RunConfig(output="runs/second", steps=1), {"new": Classification("x", 1)}, PARTS)
    count(made, ["new"], [[1, 0, 0]], [True])
    found = made.of_parts({"unit.0.1": "Stem", "task.new": "head"})
    assert [(record.run, record.task, record.steps) for record in found] == [
        ("first", None, {"Stem": 0}),
        ("first", "b", {"Stem": 1, "head": 1}),
        ("second", "new", {"Stem": 1}),
    ]
    assert isinstance(found[0], Record)
