"""Provenance of real runs: the same on any ranks and after a resume; extracts, fine-tuned runs and exports carry it."""

from __future__ import annotations

import json
import shutil
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import write_recipe

from distributed.ranks import run_ranks
from gppf_ds.simt.usage import owner_of
from gppf_ds.train import recipe
from gppf_ds.train.checkpoint import CheckpointReader, TrainState, complete
from gppf_ds.train.provenance import Provenance
from gppf_ds.train.restore import load_trained
from gppf_ds.transfer import commands
from gppf_ds.transfer.subnetwork import extract

torch.set_num_threads(1)
pytestmark = pytest.mark.skipif(
    "provenance" not in {field.name for field in fields(TrainState)}, reason="the trainer keeps no provenance yet"
)
STEPS = 4


def content(data: Path, output: Path) -> dict[str, Any]:
    def digits(size: int) -> dict[str, Any]:
        arguments = {"data": str(data / "classification"), "batch_size": 4, "image_size": size}
        return {"class_path": "gppf_ds.tasks.classification.Classification", "init_args": arguments}

    return {
        "output": str(output),
        "steps": STEPS,
        "backbone": {"options": {"layers": [1, 1, 1, 1], "channels": [8, 8, 16, 16]}, "routing": "hard"},
        "optimizer": {"learning_rate": 0.01},
        "loader": {"workers": 0},
        "checkpoint": {"every": 2},
        "schedule": {"kind": "stratified"},
        "engine": {"timeout": 60, "devices_per_rank": 4},
        "tasks": {"large": digits(64), "small": digits(48)},
    }


def provenance(run: Path) -> Provenance:
    return CheckpointReader(complete(run / "checkpoints")[-1]).state.provenance  # type: ignore[attr-defined,no-any-return]


@pytest.fixture(scope="module")
def run(demo_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of one rank with four devices."""
    folder = tmp_path_factory.mktemp("one")
    file = write_recipe(content(demo_data, folder / "run"), folder)
    run_ranks("gppf_ds", 1, "train", "--config", str(file))
    return folder / "run"


def test_every_batch_is_counted_once_in_every_layer(run: Path) -> None:
    reader = CheckpointReader(complete(run / "checkpoints")[-1])
    found = provenance(run)
    assert found.inherited == []
    assert [(record.task, record.run, record.seed) for record in found.own] == [
        ("large", "run", 0),
        ("small", "run", 0),
    ]
    assert sum(record.steps[f"task.{record.task}"] for record in found.own) == STEPS * 4
    for record in found.own:
        batches = record.steps[f"task.{record.task}"]
        assert batches * record.batch_size == reader.state.cursors[str(record.task)]
        for layer in range(5):
            assert sum(record.steps.get(f"unit.{layer}.{unit}", 0) for unit in range(2)) == batches
    other = {"large": "small", "small": "large"}
    assert not any(f"task.{other[str(record.task)]}" in record.steps for record in found.own)


def test_two_ranks_count_what_one_counts(run: Path, demo_data: Path, tmp_path: Path) -> None:
    twice = content(demo_data, tmp_path / "run") | {"engine": {"timeout": 60, "devices_per_rank": 2}}
    run_ranks("gppf_ds", 2, "train", "--config", str(write_recipe(twice, tmp_path)))
    assert provenance(tmp_path / "run") == provenance(run)


def test_a_resumed_run_counts_on(run: Path, demo_data: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    shutil.rmtree(complete(copy / "checkpoints")[-1])
    assert provenance(copy) != provenance(run)
    run_ranks("gppf_ds", 1, "train", "--config", str(write_recipe(content(demo_data, copy), tmp_path)))
    assert provenance(copy) == provenance(run)


def test_an_extract_has_the_records_of_what_it_holds(run: Path, tmp_path: Path) -> None:
    trained = load_trained(run, None, recipe.read_run(run))
    extract(trained, run, ["small"], tmp_path / "sub")
    found = provenance(tmp_path / "sub")
    path = trained.controller.path("small")
    held = {f"unit.{layer}.{unit}" for layer, unit in enumerate(path)} | {"task.small"}
    for record, whole in zip(found.own, provenance(run).own, strict=True):
        assert record.steps == {part: steps for part, steps in whole.steps.items() if part in held}
    reader = CheckpointReader(complete(tmp_path / "sub" / "checkpoints")[-1])
    assert {".".join(owner_of(name)) for name in reader.sizes()} == held


def test_the_sparse_phase_forgets_what_it_drops(demo_data: Path, tmp_path: Path) -> None:
    sparse = content(demo_data, tmp_path / "run") | {"controller": {"sparse": True, "decay_share": 0.5}}
    run_ranks("gppf_ds", 1, "train", "--config", str(write_recipe(sparse, tmp_path)))
    reader = CheckpointReader(complete(tmp_path / "run" / "checkpoints")[-1])
    held = {".".join(owner_of(name)) for name in reader.sizes()}
    found = provenance(tmp_path / "run")
    assert {part for record in found.own for part in record.steps} <= held
    assert sum(record.steps[f"task.{record.task}"] for record in found.own) == STEPS * 4


def test_a_fine_tuned_run_says_so_and_its_export_too(run: Path, demo_data: Path, tmp_path: Path) -> None:
    made = content(demo_data, tmp_path / "tuned")
    made["tasks"] = {"mine": made["tasks"]["small"]}
    made["finetune"] = {
        "source": str(run),
        "mode": "fixed",
        "path": "large",
        "heads": {"mine": "small"},
        "final_layers": True,
    }
    del made["backbone"]
    run_ranks("gppf_ds", 1, "finetune", "--config", str(write_recipe(made, tmp_path)))
    found = provenance(tmp_path / "tuned")
    assert [(record.run, record.task) for record in found.inherited] == [("run", "large"), ("run", "small")]
    large, small = found.inherited
    assert "task.large" not in large.steps
    assert small.steps["task.mine"] == provenance(run).own[1].steps["task.small"]
    [own] = found.own
    trained = load_trained(tmp_path / "tuned", None, recipe.read_run(tmp_path / "tuned"))
    path = [f"unit.{layer}.{unit}" for layer, unit in enumerate(trained.controller.path("mine"))]
    assert own.steps == dict.fromkeys([*path, "task.mine"], STEPS * 4)

    commands.export(["--run", str(tmp_path / "tuned"), "--head", "--output", str(tmp_path / "out")])
    about = json.loads((tmp_path / "out/mine/model.json").read_text())
    assert [(record["run"], record["task"]) for record in about["trained_on"]][-1] == ("tuned", "mine")
    assert about["trained_on"][-1]["steps"] == dict.fromkeys([*about["path"], "head"], STEPS * 4)
    card = (tmp_path / "out/mine/README.md").read_text()
    assert "## Training data" in card
    assert f"| classification | not recorded | mine | tuned, seed 0 | {STEPS * 4 * 4} |" in card
    assert "| head | small" in card
