"""A run that changes its number of ranks and its ZeRO stage twice, through ``gppf-ds train``."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import write_recipe
from safetensors.torch import load_file
from torch import Tensor

from distributed.ranks import run_ranks
from distributed.simt_case import relative
from gppf_ds.train.checkpoint import CheckpointReader

FIRST, SECOND, STEPS = 2, 4, 6
"""The steps before which the run changes, and its end."""
SAMPLES = {"normed": 7, "dense": 5}
BATCH = {"normed": 3, "dense": 2}
TOLERANCE = 1e-6
"""Of the relative error of every tensor (norm of the difference over norm); see :mod:`distributed.test_simt`."""


OPTIMIZERS: dict[str, dict[str, float]] = {
    "adamw": {"learning_rate": 0.001, "epsilon": 1e-3},
    "sgd": {"learning_rate": 0.03, "momentum": 0.9},
}
KINDS = {"adamw": {"step", "exp_avg", "exp_avg_sq"}, "sgd": {"momentum_buffer"}}
"""Of the optimizer's state."""


@dataclass
class Phase:
    """What one launch wrote down."""

    checkpoints: Path
    records: Path

    def state(self, step: int) -> dict[str, Tensor]:
        """All state before a step, from the live objects; the same on every rank."""
        states = [load_file(path) for path in sorted(self.records.glob(f"before-step-{step}-rank-*.safetensors"))]
        for state in states[1:]:
            assert_same(state, states[0])
        return states[0]

    def jobs(self, start: int, stop: int) -> list[list[Any]]:
        """[step, device, task, indices of the samples] of the steps from ``start`` up to ``stop``, in this order."""
        lines = map(json.loads, (self.records / "jobs.jsonl").read_text().splitlines())
        return sorted(line for line in lines if start <= line[0] < stop)


def assert_same(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert got.keys() == wanted.keys()
    assert not [key for key in wanted if not torch.equal(got[key], wanted[key])]


def recipe(output: Path, devices: int, stage: int, optimizer: str) -> dict[str, Any]:
    tasks = {
        name: {
            "class_path": "distributed.elastic_case.Toy",
            "init_args": {"samples": SAMPLES[name], "batch_size": BATCH[name], "dense": name == "dense"},
        }
        for name in SAMPLES
    }
    return {
        "output": str(output),
        "steps": STEPS,
        "backbone": {"options": {"layers": [1, 1, 1, 1], "channels": [4, 8, 8, 8], "act_layer": "gelu"}},
        "optimizer": {"name": optimizer, "warmup_steps": 1, **OPTIMIZERS[optimizer]},
        "loader": {"workers": 0},
        "engine": {"zero_stage": stage, "devices_per_rank": devices, "precision": "fp32", "timeout": 60},
        "checkpoint": {"every": FIRST, "keep": 3, "background": False},  # a rank ends right after its last save
        "tasks": tasks,
    }


def launch(
    folder: Path,
    optimizer: str,
    layout: tuple[int, int, int],
    marks: list[int],
    stop: int = 0,
    resume: Path | None = None,
) -> Phase:
    """Trains on ``layout`` (ranks, devices of each, ZeRO stage) in a folder, from a copy of a checkpoint."""
    ranks, devices, stage = layout
    records = folder / "records"
    records.mkdir(parents=True)
    checkpoints = folder / "run" / "checkpoints"
    if resume is not None:
        shutil.copytree(resume, checkpoints / resume.name)
    path = write_recipe(recipe(folder / "run", devices, stage, optimizer), folder)
    run_ranks("distributed.elastic_case", ranks, str(path), str(records), json.dumps(marks), str(stop))
    return Phase(checkpoints, records)


@pytest.fixture(scope="module", params=["adamw", pytest.param("sgd", marks=pytest.mark.long)])
def optimizer(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def history(tmp_path_factory: pytest.TempPathFactory, optimizer: str) -> list[Phase]:
    """4 ranks at stage 1, of which the steps after FIRST are the uninterrupted run; then 2 at stage 3, then 3 at 2."""
    folder = tmp_path_factory.mktemp("elastic")
    four = launch(folder / "four", optimizer, (4, 1, 1), [FIRST, SECOND], stop=SECOND)
    first = four.checkpoints / f"step-{FIRST:08d}"
    two = launch(folder / "two", optimizer, (2, 2, 3), [FIRST, SECOND], stop=SECOND, resume=first)
    second = two.checkpoints / f"step-{SECOND:08d}"
    return [four, two, launch(folder / "three", optimizer, (3, 1, 2), [SECOND], resume=second)]


def test_every_change_carries_all_state_bit_by_bit(history: list[Phase], optimizer: str) -> None:
    four, two, three = history
    for before, after, step in ((four, two, FIRST), (two, three, SECOND)):
        carried = before.state(step)
        assert_same(after.state(step), carried)
        kinds = {key.split()[0] for key in carried}
        assert kinds == {"parameter", "buffer", "controller", "master", *KINDS[optimizer]}
        assert any(key.startswith("buffer heads") for key in carried)
        assert any(key.endswith("exp_avg") for key in carried if key.startswith("controller"))


def test_each_sample_is_visited_once_in_every_epoch(history: list[Phase]) -> None:
    four, two, three = history
    jobs = four.jobs(0, FIRST) + two.jobs(FIRST, SECOND) + three.jobs(SECOND, STEPS)
    assert [job[:2] for job in jobs] == [[s, d] for s in range(STEPS) for d in range(4 if s < SECOND else 3)]
    cursors = CheckpointReader(three.checkpoints / f"step-{STEPS:08d}").state.cursors
    for task, size in SAMPLES.items():
        visits = [index for _, _, name, indices in jobs if name == task for index in indices]
        assert cursors[task] == len(visits) > 2 * size
        *epochs, last = [visits[start : start + size] for start in range(0, len(visits), size)]
        assert all(sorted(epoch) == list(range(size)) for epoch in epochs), (task, visits)
        assert len(set(last)) == len(last), (task, last)


def test_the_same_devices_on_fewer_ranks_continue_the_same_run(history: list[Phase]) -> None:
    four, two, _ = history
    assert two.jobs(FIRST, SECOND) == four.jobs(FIRST, SECOND)
    wanted, got, before = four.state(SECOND), two.state(SECOND), four.state(FIRST)
    rows = [f"controller {task}" for task in SAMPLES]
    # A head's own norm moves its running statistics once for every batch of its rank: these depend on the ranks.
    keys = [key for key in wanted if key.startswith(("parameter", "buffer backbone"))] + rows
    errors = {key: relative(got[key], wanted[key]) for key in keys}
    worst = max(errors, key=errors.__getitem__)
    print(worst, errors[worst])
    assert errors[worst] < TOLERANCE, worst
    moved = {key: relative(before[key], wanted[key]) for key in keys}
    assert [key for key in keys if moved[key] < 100 * TOLERANCE] == ["parameter heads.bank.dense.unused"]
