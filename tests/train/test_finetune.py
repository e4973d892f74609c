"""Runs that start from a finished one: what they take, what they leave, what they refuse."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import write_recipe
from distributed.ranks import end_ranks, run_ranks

from gppf_ds.cli import main
from gppf_ds.errors import UserError
from gppf_ds.train import certificate
from gppf_ds.train.checkpoint import CheckpointReader, complete
from gppf_ds.train.recipe import check, read, read_run
from gppf_ds.train.restore import load_trained
from gppf_ds.train.start import start

Content = dict[str, Any]


def last(folder: Path) -> CheckpointReader:
    return CheckpointReader(complete(folder / "checkpoints")[-1])


def train(path: Path, *arguments: str, command: str = "finetune", ranks: int = 1) -> None:
    codes, outputs = end_ranks([["-m", "gppf_ds", command, "--config", str(path), *arguments]] * ranks, 240)
    assert codes == [0] * ranks, outputs


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder for a finished run of two tasks; made by the first test that asks for :func:`finished`."""
    return tmp_path_factory.mktemp("source") / "run"


@pytest.fixture
def finished(source: Path, light_recipe: Content, tmp_path: Path) -> Path:
    """A finished run of two tasks, whose paths differ."""
    if not source.exists():
        light_recipe |= {"output": str(source), "steps": 4, "controller": {"learning_rate": 0.5}}
        train(write_recipe(light_recipe, tmp_path, "source.yaml"), command="train")
    return source


@pytest.fixture
def new(light_recipe: Content, finished: Path, tmp_path: Path) -> Content:
    """A recipe of one new task that starts from the finished run."""
    task = light_recipe["tasks"]["digits"]
    return {
        **{key: value for key, value in light_recipe.items() if key != "backbone"},
        "steps": 4,
        "checkpoint": {"every": 2, "keep": 9},
        "finetune": {"source": str(finished), "mode": "dynamic"},
        "tasks": {"other": task},
    }


def begun(content: Content, folder: Path) -> tuple[Any, Any]:
    run = read(["--config", str(write_recipe(content, folder))])
    check(run)
    return run, start(run.config, run.tasks)


def test_the_source_decides_the_backbone_and_gives_its_values(new: Content, tmp_path: Path) -> None:
    run, made = begun(new, tmp_path)
    source = read_run(Path(new["finetune"]["source"]))
    assert run.config.backbone.options == source.config.backbone.options
    reader = last(Path(new["finetune"]["source"]))
    for name, parameter in made.model.backbone.named_parameters():
        assert torch.equal(parameter.flatten(), reader.whole(f"backbone.{name}"))
    for name, buffer in made.model.backbone.named_buffers():
        assert torch.equal(buffer, reader.shared[f"buffer.backbone.{name}"])
    assert made.controller.logits["other"].count_nonzero() == 0
    assert made.kept is None


def test_a_fixed_path_holds_one_unit_in_every_layer(new: Content, tmp_path: Path) -> None:
    new["finetune"] |= {"mode": "fixed", "path": "distance"}
    _, made = begun(new, tmp_path)
    trained = load_trained(Path(new["finetune"]["source"]), None, read_run(Path(new["finetune"]["source"])))
    path = trained.controller.path("distance")
    assert path != trained.controller.path("digits")
    assert made.kept == [[unit] for unit in path]
    assert made.controller.path("other") == path
    assert made.controller.frozen


def test_a_head_starts_from_another_but_for_its_final_layers(
    new: Content, light_recipe: Content, tmp_path: Path
) -> None:
    new["tasks"] = {"far": light_recipe["tasks"]["distance"]}
    new["finetune"]["heads"] = {"far": "distance"}
    _, made = begun(new, tmp_path)
    reader = last(Path(new["finetune"]["source"]))
    same = {
        name: torch.equal(p.flatten(), reader.whole(f"heads.bank.distance.{name}"))
        for name, p in made.model.heads.bank["far"].named_parameters()
    }
    assert [name for name, equal in same.items() if not equal] == ["decoder.fuse.1.weight", "decoder.fuse.1.bias"]
    assert "not decoder.fuse.1.weight: a final prediction layer" in made.report
    new["finetune"]["final_layers"] = True
    _, made = begun(new, tmp_path)
    assert torch.equal(
        made.model.heads.bank["far"].decoder.fuse[1].weight.flatten(),
        reader.whole("heads.bank.distance.decoder.fuse.1.weight"),
    )


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"source": "nowhere"}, r"finetune\.source: nowhere is no run"),
        ({"mode": "fixed"}, r"finetune\.path belongs to finetune\.mode fixed"),
        ({"mode": "fixed", "path": "cats"}, r"finetune\.path: the source has no task 'cats'.*digits"),
        ({"mode": "retrain", "path": "nowhere"}, r"nowhere has no complete checkpoint"),
        ({"heads": {"other": "cats"}}, r"finetune\.heads: the source has no task 'cats'"),
        ({"heads": {"cats": "digits"}}, r"finetune\.heads: the recipe has no task 'cats'"),
        ({"heads": {"other": "distance"}}, r"no tensor in common"),
        ({"mode": "grow", "grow_layers": [7]}, r"finetune\.grow_layers must be among 0 to 4"),
    ],
)
def test_what_cannot_be_started_from_is_said(new: Content, tmp_path: Path, change: Content, sentence: str) -> None:
    new["finetune"] |= change
    with pytest.raises(UserError, match=sentence):
        begun(new, tmp_path)


def test_a_new_task_may_not_take_the_name_of_an_old_one_that_stays(new: Content, tmp_path: Path) -> None:
    new["finetune"]["mode"] = "grow"
    new["tasks"] = {"digits": new["tasks"]["other"]}
    with pytest.raises(UserError, match=r"tasks\.digits: finetune\.source has a task of this name"):
        begun(new, tmp_path)


def test_patterns_that_fit_nothing_are_refused(new: Content, tmp_path: Path) -> None:
    new["trainable"] = ["heads.bank.other.fc.*"]
    with pytest.raises(UserError, match=r"trainable: no parameter's name fits 'heads.bank.other.fc"):
        begun(new, tmp_path)


@pytest.mark.parametrize("stage", [1, 3])
def test_growing_leaves_everything_old_as_it_is(new: Content, tmp_path: Path, stage: int) -> None:
    """Two ranks, hard routes: some ranks run old units only; cut in the middle and resumed."""
    new["finetune"] |= {"mode": "grow", "grow_layers": [2, 4], "grow_units": 1}
    new |= {"backbone": {"routing": "hard"}, "engine": {"zero_stage": stage, "timeout": 60, "devices_per_rank": 2}}
    new["output"] = str(tmp_path / "grown")
    path = write_recipe(new, tmp_path)
    train(path, "--finetune.source", new["finetune"]["source"], ranks=2)
    folder, old = Path(new["output"]), last(Path(new["finetune"]["source"]))
    grown = last(folder)
    for name in old.sizes():
        assert torch.equal(grown.whole(name), old.whole(name)), name
    for key, value in old.shared.items():
        if key.startswith("buffer."):
            assert torch.equal(grown.shared[key], value), key
    added = grown.sizes().keys() - old.sizes().keys()
    assert {tuple(n.split(".")[2:5:2]) for n in added if n.startswith("backbone")} == {("2", "2"), ("4", "2")}
    moved = CheckpointReader(complete(folder / "checkpoints")[0])
    changed = [name for name in added if not torch.equal(moved.whole(name), grown.whole(name))]
    assert any("units.2" in name for name in changed)
    assert any(name.startswith("heads.bank.other") for name in changed)
    before, after = load_trained(Path(new["finetune"]["source"]), None, read_run(Path(new["finetune"]["source"]))), None
    after = load_trained(folder, None, read_run(folder))
    for task in ("digits", "distance"):
        assert after.controller.path(task) == before.controller.path(task)
    assert read_run(folder).config.frozen_tasks == ["digits", "distance"]
    assert [finding.differing for finding in certificate.verify(folder)] == [[], []]

    assert main(["extract", "--run", str(folder), "--remove", "other", "--output", str(tmp_path / "less")]) == 0
    left = last(tmp_path / "less")
    assert left.sizes() == old.sizes()
    assert all(torch.equal(left.whole(name), old.whole(name)) for name in old.sizes())
    assert left.state.kept == [[0, 1]] * 5
    assert not left.state.paths_fixed


@pytest.mark.parametrize("mode", ["dynamic", "fixed", "retrain", "grow"])
def test_every_mode_resumes_to_the_same_bits(new: Content, tmp_path: Path, mode: str) -> None:
    if mode in ("fixed", "retrain"):
        new["finetune"] |= {"path": "digits"}
    if mode == "retrain":
        new["output"] = str(tmp_path / "dynamic")
        train(write_recipe(new | {"finetune": {"source": new["finetune"]["source"], "mode": "dynamic"}}, tmp_path))
        new["finetune"]["path"] = str(tmp_path / "dynamic")
    new["finetune"]["mode"] = mode
    new["output"] = str(tmp_path / mode)
    path = write_recipe(new, tmp_path)
    train(path)
    whole = last(tmp_path / mode)
    second = complete(tmp_path / mode / "checkpoints")[0]
    new["output"] = str(tmp_path / "cut" / mode)
    (tmp_path / "cut" / mode / "checkpoints").mkdir(parents=True)
    (tmp_path / "cut" / mode / "checkpoints" / second.name).symlink_to(second)
    train(write_recipe(new, tmp_path))
    resumed = last(tmp_path / "cut" / mode)
    assert whole.state == resumed.state
    for name in whole.sizes():
        assert torch.equal(whole.whole(name), resumed.whole(name)), name
    metrics = json.loads((tmp_path / mode / "results.json").read_text())
    assert "other" in json.dumps(metrics)


def test_a_certificate_names_what_has_changed(new: Content, finished: Path, tmp_path: Path) -> None:
    """A run that goes on training the old tasks does not keep them, and the command says so."""
    new |= {"output": str(tmp_path / "learns"), "steps": 1}
    train(write_recipe(new, tmp_path))
    folder = Path(new["output"])
    certificate.write(folder, finished)
    content = json.loads((folder / certificate.FILE).read_text())
    content["outputs"] = {}  # the run has none of the old tasks
    content["tensors"] = {k: v for k, v in content["tensors"].items() if "heads" not in k}
    (folder / certificate.FILE).write_text(json.dumps(content))
    [codes, outputs] = end_ranks([["-m", "gppf_ds", "verify", "--certificate", str(folder)]], 120)
    assert codes == [1]
    assert "parameters and buffers: MISMATCH in" in outputs[0]
    assert "outputs on the probe image: 0 equal" in outputs[0]


def test_a_run_that_did_not_grow_has_no_certificate(finished: Path) -> None:
    with pytest.raises(UserError, match=r"has no certificate\.json: only runs with finetune\.mode grow"):
        certificate.verify(finished)


def test_what_does_not_learn_agrees_with_the_reference(new: Content, tmp_path: Path) -> None:
    new["finetune"] |= {"mode": "grow", "grow_layers": [1, 3]}
    new["steps"] = 20
    outputs = run_ranks("gppf_ds", 2, "verify", "--config", str(write_recipe(new, tmp_path)), timeout=200)
    assert "MISMATCH" not in outputs[0]
    assert "ok" in outputs[0]


def test_a_run_can_be_read_when_its_source_is_gone(new: Content, tmp_path: Path) -> None:
    run, _ = begun(new, tmp_path)
    content = yaml.safe_load(run.text)
    content["finetune"]["source"] = "gone"
    write_recipe(content, tmp_path, "config.yaml")
    assert read_run(tmp_path).config.backbone.options == run.config.backbone.options
