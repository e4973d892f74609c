"""``gppf-ds extract``: a run of its own, equal to its parent on the tasks that it serves, and what it costs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import yaml
from conftest import write_recipe
from distributed.ranks import run_ranks

from gppf_ds.backbone.lego import Pass
from gppf_ds.config import LoaderConfig
from gppf_ds.errors import UserError
from gppf_ds.simt.masked import Fragment
from gppf_ds.train import recipe
from gppf_ds.train.checkpoint import CONTROLLER, CheckpointReader, complete
from gppf_ds.train.evaluate import evaluate
from gppf_ds.train.restore import Trained, load_trained
from gppf_ds.train.saving import save
from gppf_ds.transfer import commands
from gppf_ds.transfer.predict import predict
from gppf_ds.transfer.subnetwork import extract, reduced

torch.set_num_threads(1)
CPU = torch.device("cpu")
PATHS = {"digits": (0, 0, 1, 0, 0), "again": (0, 0, 1, 1, 0), "other": (1, 0, 0, 0, 0), "distance": (0, 0, 1, 0, 1)}
"""Digits and again see the same images and share three units."""
CHOSEN = ["digits", "again"]
KEPT = [[0], [0], [1], [0, 1], [0]]


def content(data: Path, output: Path) -> dict[str, Any]:
    def digits(size: int) -> dict[str, Any]:
        arguments = {"data": str(data / "classification"), "batch_size": 4, "image_size": size}
        return {"class_path": "gppf_ds.tasks.classification.Classification", "init_args": arguments}

    depth = {"data": str(data / "scenes"), "batch_size": 2, "input_size": [64, 64], "head_channels": 32}
    tasks = {"digits": digits(64), "again": digits(64), "other": digits(96)}
    return {
        "output": str(output),
        "steps": 3,
        "log_every": 1,
        "backbone": {"options": {"layers": [1, 1, 1, 1], "channels": [8, 8, 16, 16]}, "routing": "hard"},
        "optimizer": {"learning_rate": 0.01},
        "loader": {"workers": 0},
        "schedule": {"kind": "static", "static": list(PATHS)},
        "engine": {"timeout": 60, "devices_per_rank": 4},
        "tasks": tasks | {"distance": {"class_path": "gppf_ds.tasks.depth.Depth", "init_args": depth}},
    }


@pytest.fixture(scope="module")
def run(demo_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained run, whose units and paths have then been made to differ."""
    folder = tmp_path_factory.mktemp("parent")
    file = write_recipe(content(demo_data, folder / "run"), folder)
    run_ranks("gppf_ds", 1, "train", "--config", str(file))
    [path] = complete(folder / "run" / "checkpoints")
    reader = CheckpointReader(path)
    generator = torch.Generator().manual_seed(2)
    fragments = []
    for name in reader.sizes():
        values = reader.whole(name)
        values += 0.05 * torch.rand(values.shape, generator=generator)
        state = {kind: reader.whole(name, kind) for kind in reader.kinds(name)}
        fragments.append(Fragment(name, 0, values, state, reader.shapes[name]))
    for name, chosen in PATHS.items():
        reader.shared[CONTROLLER + name][range(5), list(chosen)] += 10.0
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    save(path.parent, reader.state, fragments, reader.shared, keep=1)
    dist.destroy_process_group()
    return folder / "run"


@pytest.fixture(scope="module")
def parent(run: Path) -> Trained:
    return load_trained(run, None, recipe.read_run(run))


@pytest.fixture(scope="module")
def output(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("extracted") / "sub"
    assert commands.extract(["--run", str(run), "--tasks", *CHOSEN, "--output", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def child(output: Path) -> Trained:
    return load_trained(output, None, recipe.read_run(output))


def test_it_holds_what_the_tasks_need_and_nothing_else(child: Trained, run: Path) -> None:
    reader = CheckpointReader(child.path)
    whole = CheckpointReader(complete(run / "checkpoints")[-1])
    assert reader.state.kept == KEPT
    assert reader.state.paths_fixed
    assert reader.state.step == 3
    assert reader.state.cursors == {"digits": 12, "again": 12}
    units = {(int(name.split(".")[2]), int(name.split(".")[4])) for name in reader.sizes() if ".units." in name}
    assert units == {(layer, unit) for layer, kept in enumerate(KEPT) for unit in kept}
    assert {name.split(".")[2] for name in reader.sizes() if name.startswith("heads.")} == set(CHOSEN)
    for name in reader.sizes():
        assert reader.shapes[name] == whole.shapes[name]
        assert torch.equal(reader.whole(name), whole.whole(name))
        assert reader.kinds(name) == whole.kinds(name)
        for kind in reader.kinds(name):
            assert torch.equal(reader.whole(name, kind), whole.whole(name, kind))
    assert any(reader.kinds(name) for name in reader.sizes())
    assert all(torch.equal(tensor, whole.shared[key]) for key, tensor in reader.shared.items())
    assert not any("other" in key or "distance" in key for key in reader.shared)
    assert {key for key in reader.shared if key.startswith(CONTROLLER)} == {CONTROLLER + name for name in CHOSEN}
    assert child.model.backbone.layers[3].units.keys() == {"0", "1"}  # type: ignore[union-attr,operator]


@torch.no_grad()
def test_maps_and_predictions_are_equal_to_the_last_bit(parent: Trained, child: Trained) -> None:
    for name in CHOSEN:
        task = parent.recipe.tasks[name]
        samples = task.dataset("val")
        batch = task.preprocess(task.collate([samples[index] for index in range(5)]), CPU, training=False)
        found = []
        for trained in (parent, child):
            passing = Pass(batch.images, trained.controller.fixed_route(name))
            maps = trained.model.backbone([passing], trained.model.batch_norm)[0]
            found.append([*maps, *trained.model.predict(name, batch, passing)])
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(*found, strict=True))
    loader = LoaderConfig(workers=0)
    tasks = {name: parent.recipe.tasks[name] for name in CHOSEN}
    theirs = evaluate(parent.model, parent.controller, tasks, CPU, loader)
    assert evaluate(child.model, child.controller, child.recipe.tasks, CPU, loader) == theirs


def test_the_commands_work_on_it_as_on_the_parent(run: Path, output: Path, demo_data: Path, tmp_path: Path) -> None:
    image = demo_data / "scenes/images/val/000001.jpg"
    written = []
    for folder, name in ((run, "theirs"), (output, "ours")):
        target = tmp_path / name
        arguments = ["--run", str(folder), "--task", *CHOSEN, "--output"]
        assert commands.export([*arguments, str(target / "exports")]) == 0
        assert commands.predict([str(image), *arguments, str(target)]) == 0
        files = [target / "exports" / task / file for task in CHOSEN for file in ("model.safetensors", "model.json")]
        written.append([(target / "000001.json").read_text(), *(file.read_bytes() for file in files)])
    assert written[0] == written[1]


def test_a_shared_prefix_runs_once(parent: Trained, child: Trained, demo_data: Path) -> None:
    image = demo_data / "scenes/images/val/000001.jpg"
    ours, theirs = (predict(trained, CHOSEN, image, CPU) for trained in (child, parent))
    assert (ours.units_run, ours.units_alone) == (theirs.units_run, theirs.units_alone) == (7, 10)


def test_the_record_is_that_of_the_tasks(run: Path, output: Path) -> None:
    theirs, ours = (yaml.safe_load((folder / "config.yaml").read_text()) for folder in (run, output))
    assert list(ours["tasks"]) == ["again", "digits"]  # in the order of the run
    assert all(ours["tasks"][name] == theirs["tasks"][name] for name in CHOSEN)
    assert ours["schedule"] == {"kind": "static", "static": ["digits", "again"]}
    assert ours["output"] == str(output)
    differing = ("tasks", "schedule", "output", "finetune", "trainable", "frozen_tasks")
    assert {k: v for k, v in ours.items() if k not in differing} == {
        k: v for k, v in theirs.items() if k not in differing
    }
    theirs, ours = (json.loads((folder / "results.json").read_text()) for folder in (run, output))
    assert [entry["step"] for entry in ours] == [0, 3]
    for one, other in zip(ours, theirs, strict=True):
        assert one["metrics"] == {name: other["metrics"][name] for name in ("digits", "again")}
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 3
    assert all(line["tasks"] == {"digits": 1, "again": 1} and set(line["losses"]) == set(CHOSEN) for line in lines)


def test_it_goes_on_as_a_run_of_its_own(output: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(output, copy)
    more = ["--output", str(copy), "--steps", "5"]
    [text] = run_ranks("gppf_ds", 1, "train", "--config", str(output / "config.yaml"), *more)
    assert "at step 3 of 5" in text
    reader = CheckpointReader(complete(copy / "checkpoints")[-1])
    assert (reader.state.step, reader.state.kept, reader.state.paths_fixed) == (5, KEPT, True)


def test_one_task_is_a_plain_path(parent: Trained, run: Path, tmp_path: Path) -> None:
    extract(parent, run, ["other"], tmp_path / "one")
    child = load_trained(tmp_path / "one", None, recipe.read_run(tmp_path / "one"))
    assert [len(layer.units) for layer in child.model.backbone.layers] == [1] * 5  # type: ignore[arg-type,union-attr]
    assert child.controller.path("other") == PATHS["other"]
    images = torch.randn(2, 3, 96, 96)
    maps = []
    with torch.no_grad():
        for trained in (parent, child):
            passing = Pass(images, trained.controller.fixed_route("other"))
            maps.append(trained.model.backbone([passing], trained.model.batch_norm)[0])
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*maps, strict=True))


def test_costs_stand_beside_the_parents(run: Path, output: Path, parent: Trained, child: Trained) -> None:
    found = json.loads((output / "costs.json").read_text())
    ours, theirs = found["network"], found["parent"]
    for trained, costs in ((child, ours), (parent, theirs)):
        assert costs["parameters"]["total"] == sum(p.numel() for p in trained.model.parameters())
        assert list(costs["tasks"]) == CHOSEN
        for one in costs["tasks"].values():
            assert one["input"] == [64, 64]
            assert one["flops"]["backbone"] > one["flops"]["head"] > 0
            assert one["measured_on"].startswith("a validation image")
        for one in (*costs["tasks"].values(), costs["together"]):
            assert 0 < one["latency_ms"]["lower_quartile"] <= one["latency_ms"]["median"]
            assert one["latency_ms"]["median"] <= one["latency_ms"]["upper_quartile"]
            assert one["peak_memory"] > 4 * costs["parameters"]["total"]
        together = costs["together"]
        assert (together["units_run"], together["units_unshared"]) == (7, 10)
        assert 0 < together["flops"]["shared"] < together["flops"]["unshared"]
        assert together["flops"]["unshared"] == sum(one["flops"]["total"] for one in costs["tasks"].values())
    assert [one["flops"] for one in ours["tasks"].values()] == [one["flops"] for one in theirs["tasks"].values()]
    assert ours["parameters"]["total"] < theirs["parameters"]["total"]
    assert theirs["tasks"]["digits"]["peak_memory"] > ours["tasks"]["digits"]["peak_memory"]
    assert (theirs["run"], theirs["tasks_served"]) == (run.name, sorted(PATHS))
    assert {"flops", "latency_ms", "peak_memory", "together"} <= set(found["notes"])
    assert found["measured_with"]["device"] == "cpu"


def test_bad_input_is_one_sentence(run: Path, parent: Trained, tmp_path: Path) -> None:
    target = tmp_path / "target"
    with pytest.raises(UserError, match=r"no task 'digit'.*digits"):
        commands.extract(["--run", str(run), "--tasks", "digit", "--output", str(target)])
    assert not target.exists()
    fresh = tmp_path / "fresh"
    fresh.mkdir()
    shutil.copy(run / "config.yaml", fresh)
    with pytest.raises(UserError, match=r"fresh has no complete checkpoint: train it first"):
        commands.extract(["--run", str(fresh), "--tasks", "digits", "--output", str(target)])
    with pytest.raises(UserError, match=r"--output .*fresh is not an empty folder"):
        commands.extract(["--run", str(run), "--tasks", "digits", "--output", str(fresh)])
    assert [file.name for file in fresh.iterdir()] == ["config.yaml"]
    target.mkdir()
    extract(parent, run, ["digits"], target)
    assert complete(target / "checkpoints")


def test_what_was_frozen_for_other_tasks_is_free() -> None:
    started = {"finetune": {"mode": "grow"}, "trainable": ["heads.bank.new.*"], "frozen_tasks": ["old"]}
    schedule = {"kind": "static", "static": ["new"]}
    left = reduced({"tasks": {"old": 1, "new": 2}, "schedule": schedule, **started}, ["old"])
    assert left["tasks"] == {"old": 1}
    assert left["schedule"] == {"kind": "iid", "static": []}
    assert not started.keys() & left.keys()
