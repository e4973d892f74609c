"""Usage counts against the table of the paper's task average (GPPF section 3.2)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from gppf_ds.backbone.lego import LegoBackbone
from gppf_ds.config import BackboneConfig
from gppf_ds.simt.model import SimtModel
from gppf_ds.simt.usage import Owner, Users, count_experts, count_units, owner_of, usage_counts

torch.set_num_threads(1)

OWNERS = [
    ("all",),
    ("task", "a"),
    ("task", "b"),
    ("task", "c"),
    ("unit", "0", "0"),
    ("unit", "0", "1"),
    ("unit", "1", "1"),
]
TASKS = ["a", "a", "b", "a"]
PATHS = np.array([[0, 1], [1, 1], [0, 0], [0, 0]])


def chosen(tasks: list[str], paths: np.ndarray | None, valid: Sequence[int]) -> Users:
    """Who chose each of three units in every layer, as the engine puts it together; nobody chooses on soft routes."""
    found: dict[Owner, Counter[str]] = {}
    if paths is not None:
        names = sorted(set(tasks))
        ran = np.zeros((len(names), paths.shape[1], 3), dtype=np.float32)
        for task, path, counted in zip(tasks, paths, valid, strict=True):
            ran[names.index(task), range(len(path)), path] += counted
        units = [("unit", str(layer), str(unit)) for layer in range(paths.shape[1]) for unit in range(3)]
        count_units(found, ran, names, units)
    return found


@pytest.mark.parametrize(
    ("paths", "valid", "wanted"),
    [
        (None, [1, 1, 1, 1], [4, 3, 1, 0, 4, 4, 4]),
        (None, [1, 0, 1, 1], [3, 2, 1, 0, 3, 3, 3]),
        (None, [0, 0, 0, 0], [0, 0, 0, 0, 0, 0, 0]),
        (PATHS, [1, 1, 1, 1], [4, 3, 1, 0, 3, 1, 2]),
        (PATHS, [1, 0, 1, 1], [3, 2, 1, 0, 3, 0, 1]),
        (PATHS, [1, 1, 0, 1], [3, 3, 0, 0, 2, 1, 2]),
    ],
)
def test_table(paths, valid, wanted):
    counts = usage_counts(OWNERS, TASKS, np.array(valid, dtype=bool), chosen(TASKS, paths, valid))
    assert [counts[owner] for owner in OWNERS] == wanted


@given(st.data())
def test_counts_add_up(data):
    devices = data.draw(st.integers(1, 12))
    tasks = data.draw(st.lists(st.sampled_from("abc"), min_size=devices, max_size=devices))
    valid = np.array(data.draw(st.lists(st.booleans(), min_size=devices, max_size=devices)))
    units = data.draw(st.lists(st.integers(0, 2), min_size=devices, max_size=devices))
    owners = [("all",), *(("task", t) for t in "abc"), *(("unit", "0", str(k)) for k in range(3))]
    counts = usage_counts(owners, tasks, valid, chosen(tasks, np.array(units)[:, None], valid))
    assert counts["all",] == valid.sum()
    assert sum(counts["task", t] for t in "abc") == valid.sum()
    assert sum(counts["unit", "0", str(k)] for k in range(3)) == valid.sum()


def test_experts_are_counted_over_the_groups_of_a_step():
    found: dict[Owner, Counter[str]] = {}
    for users in ([[1, 0], [2, 1]], [[0, 0], [1, 0]]):
        count_experts(found, {"3.mlp": torch.tensor(users)}, ["a", "b"], {"3.mlp": [4, 7]})
    assert found == {("expert", "3.mlp", "4"): {"a": 1, "b": 3}, ("expert", "3.mlp", "7"): {"b": 1}}
    owners = [("expert", "3.mlp", number) for number in ("4", "7", "9")]
    counts = usage_counts(owners, ["a", "b", "b", "b"], np.ones(4, dtype=bool), found)
    assert list(counts.values()) == [4, 1, 0]


def test_names_of_the_real_model():
    backbone = LegoBackbone(BackboneConfig(options={"layers": [1, 1, 1, 1], "channels": [4, 4, 4, 4]}))
    # A head whose own layers are called like the backbone's must not be taken for a unit.
    heads = {"a": nn.ModuleDict({"units": nn.Linear(2, 2)}), "heads": nn.Linear(2, 2), "backbone": nn.Linear(2, 2)}
    model = SimtModel(backbone, heads, dict.fromkeys(heads, 1.0))
    owners = {name: owner_of(name) for name, _ in model.named_parameters()}
    for layer, module in enumerate(backbone.layers):
        for unit, block in enumerate(module.units.values()):
            for name, _ in block.named_parameters():
                assert owners[f"backbone.layers.{layer}.units.{unit}.{name}"] == ("unit", str(layer), str(unit))
    for task, head in heads.items():
        for name, _ in head.named_parameters():
            assert owners[f"heads.bank.{task}.{name}"] == ("task", task)
    assert ("all",) not in owners.values()
    assert owner_of("backbone.something.weight") == ("all",)
