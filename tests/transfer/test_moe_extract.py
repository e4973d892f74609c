"""``gppf-ds extract`` of networks with token-level experts: lossless, thresholded, and by plan."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from moe_run import USED, content, make_run

from gppf_ds.backbone.moe.adapt import pruned, restricted
from gppf_ds.backbone.moe.layout import Layout, TaskLayout
from gppf_ds.backbone.moe.selections import as_array, running
from gppf_ds.cli import main
from gppf_ds.config import LoaderConfig, MoePlan
from gppf_ds.errors import UserError
from gppf_ds.train.calibration import batches, count_selections
from gppf_ds.train.checkpoint import CheckpointReader, complete
from gppf_ds.train.evaluate import evaluate
from gppf_ds.train.recipe import read_run
from gppf_ds.train.restore import Trained, load_trained
from gppf_ds.transfer import moe_extract
from gppf_ds.transfer.serving import drift

torch.set_num_threads(1)
CPU = torch.device("cpu")
LAYERS = ("1.attn", "2.mlp", "3.attn")


def load(folder: Path) -> Trained:
    return load_trained(folder, None, read_run(folder))


@pytest.fixture
def run(light_recipe: dict[str, Any], tmp_path: Path) -> Path:
    return make_run(content(light_recipe, tmp_path / "run"))


def images(trained: Trained, task: str, count: int = 20) -> list[Any]:
    return list(batches(trained.recipe.tasks[task], task, count, CPU))


def test_the_usage_matrix_counts_the_choices_of_validation_images(run: Path) -> None:
    trained = load(run)
    layout = trained.model.backbone.layout
    assert layout is not None
    counted = count_selections(trained, list(USED), 6, CPU)
    matrix, tasks, layers = as_array(counted, layout)
    assert (tasks, layers) == (["digits", "distance"], list(LAYERS))
    assert matrix.shape == (2, 3, 6)
    np.testing.assert_allclose(matrix.sum(-1), 1.0)
    for row, task in enumerate(tasks):
        assert [set(np.flatnonzero(shares)) <= set(USED[task]) for shares in matrix[row]] == [True] * 3
        # 6 images of 64 x 64 pixels (depth: evaluated at 128 x 128), one class token, k choices of each
        tokens = sum(
            len(b.images) * (b.images.shape[-2] // 16 * b.images.shape[-1] // 16 + 1) for b in images(trained, task, 6)
        )
        assert sum(counted[task]["2.mlp"].values()) == 2 * tokens
        assert sum(counted[task]["1.attn"].values()) == 3 * tokens
    shares, _, _ = as_array(running(trained.model.named_buffers(), layout), layout)
    np.testing.assert_allclose(shares[0, 0], np.array([0.4, 0.35, 0.3, 0.25, 0, 0]) / 1.3, rtol=1e-6)


def test_the_usage_matrix_is_drawn(run: Path) -> None:
    assert main(["analyze", "experts", str(run), "--images", "4"]) == 0
    found = json.loads((run / "analysis" / "experts.json").read_text())
    np.testing.assert_allclose(np.sum(found["shares"], -1), 1.0)
    assert len(found["mutual_information"]) == 3
    assert (run / "analysis" / "experts.png").is_file()


def test_without_unused_experts_all_numbers_stay(run: Path, tmp_path: Path) -> None:
    output = tmp_path / "sub"
    assert main(["extract", "--run", str(run), "--tasks", "digits", "--samples", "20", "--output", str(output)]) == 0
    parent, child = load(run), load(output)
    layout = child.model.backbone.layout
    counted = count_selections(parent, ["digits"], 20, CPU)["digits"]
    assert layout is not None
    assert list(layout.tasks) == ["digits"]
    for layer in LAYERS:
        assert layout.experts[layer] == [e for e, count in counted[layer].items() if count] == list(USED["digits"])
        assert layout.tasks["digits"].experts[layer] == layout.experts[layer]
    assert drift(parent, child, "digits", images(parent, "digits")) < 1e-6
    loader, tasks = LoaderConfig(workers=0), child.recipe.tasks
    theirs = evaluate(parent.model, parent.controller, {"digits": parent.recipe.tasks["digits"]}, CPU, loader)
    assert evaluate(child.model, child.controller, tasks, CPU, loader)["digits"] == pytest.approx(theirs["digits"])
    found = json.loads((output / "costs.json").read_text())
    ours, theirs = found["network"], found["parent"]
    assert ours["extraction"]["drift"]["digits"] < 1e-6
    assert ours["parameters"]["total"] == sum(p.numel() for p in child.model.parameters())
    assert ours["parameters"]["total"] < theirs["parameters"]["total"]
    one, other = ours["tasks"]["digits"], theirs["tasks"]["digits"]
    assert one["parameters"] == ours["parameters"]["total"] < other["parameters"]
    # as many experts for each token; of the router two rows less in each layer
    assert other["active_parameters"] - one["active_parameters"] == 3 * 2 * 48
    assert one["flops"]["total"] == pytest.approx(other["flops"]["total"], rel=1e-2)


def test_rows_of_routers_keep_their_values_and_optimizer_state(run: Path, tmp_path: Path) -> None:
    output = tmp_path / "sub"
    main(["extract", "--run", str(run), "--tasks", "distance", "--samples", "4", "--output", str(output)])
    ours, theirs = (CheckpointReader(complete(folder / "checkpoints")[-1]) for folder in (output, run))
    kept = list(USED["distance"])
    router = "backbone.layers.2.units.0.block.mlp.routers.distance"
    assert not any("digits" in name for name in [*ours.sizes(), *ours.shared])
    assert ours.shapes[f"{router}.weight"] == (4, 48)
    for kind in ("master", "exp_avg"):
        whole = theirs.whole(f"{router}.weight", kind).view(6, 48)
        assert torch.equal(ours.whole(f"{router}.weight", kind).view(4, 48), whole[kept])
    assert ours.whole(f"{router}.weight", "step") == 4
    assert torch.equal(ours.shared[f"buffer.{router}.usage"], theirs.shared[f"buffer.{router}.usage"][kept])
    assert torch.equal(ours.shared[f"buffer.{router}.updates"], theirs.shared[f"buffer.{router}.updates"])
    others = [name for name in ours.sizes() if ".routers." not in name]
    assert all(torch.equal(ours.whole(name), theirs.whole(name)) for name in others)
    assert {int(name.split(".")[8]) for name in others if ".mlp.experts." in name} == set(kept)


def layout_of_one() -> Layout:
    return Layout({"1.mlp": [0, 1, 2, 3]}, {"a": TaskLayout({"1.mlp": [0, 1, 2, 3]}, {"1.mlp": 2})})


def test_a_threshold_keeps_what_has_more_than_theta_over_k_percent() -> None:
    used = {"a": {"1.mlp": {0: 60.0, 1: 30.0, 2: 6.0, 3: 4.0}}}
    assert pruned(layout_of_one(), used, 10.0).experts == {"1.mlp": [0, 1, 2]}  # above 10 / 2 percent
    assert pruned(layout_of_one(), used, 12.0).experts == {"1.mlp": [0, 1]}
    assert pruned(layout_of_one(), used, 90.0).experts == {"1.mlp": [0, 1]}  # never below k
    with pytest.raises(UserError, match=r"task 'a' has chosen no expert of layer 1\.mlp yet"):
        pruned(layout_of_one(), {"a": {"1.mlp": {}}}, 1.0)


def test_experts_stay_that_one_of_several_tasks_keeps() -> None:
    layout = layout_of_one()
    layout.tasks["b"] = TaskLayout({"1.mlp": [1, 2, 3]}, {"1.mlp": 1})
    used = {"a": {"1.mlp": {0: 50.0, 1: 50.0, 2: 0.0, 3: 0.0}}, "b": {"1.mlp": {1: 0.0, 2: 0.0, 3: 7.0}}}
    found = pruned(layout, used, 0.0)
    assert found.experts == {"1.mlp": [0, 1, 3]}
    assert found.tasks["a"].experts == {"1.mlp": [0, 1, 3]}
    assert found.tasks["b"].experts == {"1.mlp": [1, 3]}
    assert restricted(layout, ["b"]).experts == {"1.mlp": [1, 2, 3]}


def test_a_plan_is_costed_before_and_does_what_it_says(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = tmp_path / "plan.yaml"
    plan.write_text(yaml.safe_dump({"tasks": ["digits"], "prune": 60, "mlp_top_k": 1, "attention_top_k": 2}))
    arguments = ["extract", "--run", str(run), "--plan", str(plan), "--samples", "0"]
    assert main([*arguments, "--dry-run"]) == 0
    foreseen = capsys.readouterr().out
    assert main([*arguments, "--output", str(tmp_path / "sub")]) == 0
    parent, child = load(run), load(tmp_path / "sub")
    layout = child.model.backbone.layout
    assert layout is not None
    # of the running shares 31, 27, 23 and 19 percent; attention keeps what is above 60 / 3, the MLP above 60 / 2
    assert layout.experts == {"1.attn": [0, 1, 2], "2.mlp": [0, 1], "3.attn": [0, 1, 2]}
    assert layout.tasks["digits"].top_k == {"1.attn": 2, "2.mlp": 1, "3.attn": 2}
    costs = json.loads((tmp_path / "sub" / "costs.json").read_text())
    ours, theirs = (costs[which]["tasks"]["digits"] for which in ("network", "parent"))
    assert f"{ours['active_parameters']:,} of {theirs['active_parameters']:,} active parameters" in foreseen
    held = f"resident parameters: {costs['network']['parameters']['total']:,}"
    assert held in foreseen
    assert ours["flops"]["total"] < 0.9 * theirs["flops"]["total"]
    assert ours["active_parameters"] < theirs["active_parameters"]
    assert costs["network"]["extraction"]["plan"]["prune"] == 60
    assert drift(parent, child, "digits", images(parent, "digits", 4)) > 1e-3


def test_with_gates_over_all_experts_the_drift_is_reported(light_recipe: dict[str, Any], tmp_path: Path) -> None:
    run = load(make_run(content(light_recipe, tmp_path / "run", {"gate_norm": "full"}), apart=0.5))
    found, _ = moe_extract.apply(run, MoePlan(tasks=["digits"], prune=0.0), 20, CPU)
    assert 4 <= len(found.layout.experts["2.mlp"]) < 6
    assert 1e-6 < found.drift["digits"] < 1e-1  # type: ignore[operator]


def test_bad_plans_are_one_sentence(run: Path, tmp_path: Path, light_recipe: dict[str, Any]) -> None:
    from gppf_ds.train.moe_plan import read_plan

    trained, file = load(run), tmp_path / "plan.yaml"
    with pytest.raises(UserError, match=r"no task 'cats'"):
        moe_extract.apply(trained, MoePlan(tasks=["cats"]), 4, CPU)
    with pytest.raises(UserError, match=r"are for fine-tuning"):
        moe_extract.apply(trained, MoePlan(experts=2), 4, CPU)
    for text, sentence in (
        ("prune: -1", "prune must not be negative"),
        ("prun: 1", "prun"),
        ("learn: some", "learn"),
        ("just words", "must be a mapping"),
        ("{", "no readable plan"),
    ):
        file.write_text(text)
        with pytest.raises(UserError, match=sentence):
            read_plan(file)
    assert main(["extract", "--run", str(run), "--tasks", "digits"]) == 2
