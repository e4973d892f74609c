"""Fine-tuning from runs with token-level experts: plans, what learns, growing and its certificate, taking away."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import write_recipe
from distributed.ranks import end_ranks
from moe_run import USED, content, make_run

from gppf_ds.backbone.lego import Pass
from gppf_ds.cli import main
from gppf_ds.errors import UserError
from gppf_ds.train import certificate
from gppf_ds.train.checkpoint import CheckpointReader, complete
from gppf_ds.train.recipe import check, read, read_run
from gppf_ds.train.restore import load_trained
from gppf_ds.train.start import Start, start

torch.set_num_threads(1)
Content = dict[str, Any]
ATTENTION, MLP = "backbone.layers.{}.units.0.block.attn", "backbone.layers.2.units.0.block.mlp"
NEW_ROUTERS = [
    f"{ATTENTION.format(1)}.routers.other.weight",
    f"{MLP}.routers.other.weight",
    f"{ATTENTION.format(3)}.routers.other.weight",
    *(f"backbone.layers.{layer}.units.0.task_embeddings.other" for layer in (1, 2, 3)),
]


@pytest.fixture
def new(light_recipe: Content, tmp_path: Path) -> Content:
    """A recipe of one new task that starts from a finished run of experts."""
    source = make_run(content(light_recipe, tmp_path / "source"))
    kept = {key: light_recipe[key] for key in ("log_every", "engine")}
    return {
        **kept,
        "output": str(tmp_path / "tuned"),
        "steps": 4,
        "loader": {"workers": 0},
        "optimizer": {"name": "adamw", "learning_rate": 0.01},
        "checkpoint": {"every": 2, "keep": 9},
        "finetune": {"source": str(source), "mode": "dynamic"},
        "tasks": {"other": light_recipe["tasks"]["digits"]},
    }


def begun(recipe: Content, folder: Path, *arguments: str) -> Start:
    run = read(["--config", str(write_recipe(recipe, folder)), *arguments])
    check(run)
    return start(run.config, run.tasks)


def learning(made: Start) -> list[str]:
    return sorted(name for name, parameter in made.model.named_parameters() if parameter.requires_grad)


def last(folder: Path) -> CheckpointReader:
    return CheckpointReader(complete(folder / "checkpoints")[-1])


def test_router_only_is_exactly_these_parameters(new: Content, tmp_path: Path) -> None:
    new["finetune"]["plan"] = {"learn": "routers"}
    made = begun(new, tmp_path)
    heads = [name for name, _ in made.model.named_parameters() if name.startswith("heads.bank.other.")]
    assert learning(made) == sorted([*NEW_ROUTERS, *heads])
    assert f"{sum(p.numel() for p in made.model.parameters() if p.requires_grad):,} of" in made.report


def test_routers_and_new_experts_learn_and_nothing_else(new: Content, tmp_path: Path) -> None:
    plan = tmp_path / "plan.yaml"
    plan.write_text(yaml.safe_dump({"learn": "routers_and_new"}))
    arguments = ["--finetune.plan", str(plan), "--finetune.plan.experts", "2"]
    made = begun(new, tmp_path, *arguments)
    experts = [
        f"{part}.experts.{number}.{tensor}"
        for number in (6, 7)
        for part, tensors in (
            (ATTENTION.format(1), ["query.weight", "output.weight"]),
            (MLP, ["fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"]),
            (ATTENTION.format(3), ["query.weight", "output.weight"]),
        )
        for tensor in tensors
    ]
    found = [name for name in learning(made) if not name.startswith("heads.bank.other.")]
    assert found == sorted([*NEW_ROUTERS, *experts])


@torch.no_grad()
def test_routers_and_experts_start_from_those_of_a_related_task(new: Content, tmp_path: Path) -> None:
    new["finetune"] |= {"plan": {"experts": 1, "learn": "routers_and_new"}, "routers": {"other": "distance"}}
    made, reader = begun(new, tmp_path), last(Path(new["finetune"]["source"]))
    assert "other from distance" in made.report
    tensors = dict(made.model.named_parameters())
    router = tensors[f"{MLP}.routers.other.weight"]
    assert router.shape == (7, 48)
    assert torch.equal(router[:6].flatten(), reader.whole(f"{MLP}.routers.distance.weight"))
    middle = router[:6].mean(0)
    assert 0 < (router[6] - middle).abs().max() < 0.01
    embedding = reader.whole("backbone.layers.2.units.0.task_embeddings.distance")
    assert torch.equal(tensors["backbone.layers.2.units.0.task_embeddings.other"], embedding)
    # distance uses expert 2 most
    expert, origin = (tensors[f"{MLP}.experts.{number}.fc1.weight"] for number in (6, 2))
    difference = (expert - origin).std() / origin.std()
    assert 0.005 < difference < 0.02
    buffers = dict(made.model.named_buffers())
    assert buffers[f"{MLP}.routers.other.usage"].count_nonzero() == 0
    assert buffers[f"{MLP}.routers.other.updates"] == 0
    records = made.provenance.inherited
    assert records == []  # the source was not trained


def test_by_default_the_related_task_is_of_the_same_kind(new: Content, light_recipe: Content, tmp_path: Path) -> None:
    new["tasks"] = {"other": light_recipe["tasks"]["digits"], "far": light_recipe["tasks"]["distance"]}
    assert "far from distance, other from digits" in begun(new, tmp_path).report


def test_a_plan_prunes_by_the_related_task_and_lowers_k(new: Content, tmp_path: Path) -> None:
    new["finetune"]["plan"] = {"prune": 60, "mlp_top_k": 1, "experts": 1}
    made = begun(new, tmp_path)
    layout = made.model.backbone.layout
    assert layout is not None
    # digits' shares are 31, 27, 23 and 19 percent: above 60 / 3 in attention, the 2 most used of the MLP
    assert layout.experts == {"1.attn": [0, 1, 2, 6], "2.mlp": [0, 1, 6], "3.attn": [0, 1, 2, 6]}
    assert layout.tasks["other"].experts == layout.experts
    assert layout.tasks["other"].top_k == {"1.attn": 3, "2.mlp": 1, "3.attn": 3}
    assert all(parameter.requires_grad for parameter in made.model.parameters())
    reader, tensors = last(Path(new["finetune"]["source"])), dict(made.model.named_parameters())
    rows = reader.whole(f"{MLP}.routers.digits.weight").view(6, 48)
    assert torch.equal(tensors[f"{MLP}.routers.other.weight"][:2], rows[:2])


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"mode": "fixed", "path": "digits"}, r"finetune\.mode fixed follows a path through units"),
        ({"mode": "grow", "plan": {"prune": 1}}, r"mode grow keeps everything old"),
        ({"mode": "grow", "plan": {"learn": "all"}}, r"mode grow keeps everything old"),
        ({"mode": "grow", "grow_units": 2}, r"set finetune\.plan\.experts"),
        ({"plan": {"tasks": ["digits"]}}, r"gppf-ds extract drops tasks"),
        ({"plan": {"expert": 1}}, r"finetune\.plan: .*expert"),
        ({"plan": {"experts": 1, "learn": "routers"}}, r"set learn to routers_and_new"),
        ({"plan": "nowhere.yaml"}, r"nowhere\.yaml is no readable plan"),
        ({"routers": {"other": "cats"}}, r"finetune\.routers: the source has no task 'cats'"),
        ({"routers": {"cats": "digits"}}, r"finetune\.routers: the recipe has no new task 'cats'"),
    ],
)
def test_what_a_plan_cannot_do_is_said(new: Content, tmp_path: Path, change: Content, sentence: str) -> None:
    new["finetune"] |= change
    with pytest.raises(UserError, match=sentence):
        begun(new, tmp_path)


def test_growing_leaves_old_tasks_as_they_are_and_can_be_undone(
    new: Content, light_recipe: Content, tmp_path: Path
) -> None:
    """Two ranks; then the new task is taken away again."""
    source, folder = make_run(content(light_recipe, tmp_path / "near"), apart=0.0), Path(new["output"])
    new["finetune"] = {"source": str(source), "mode": "grow", "plan": {"experts": 2}}
    command = ["-m", "gppf_ds", "finetune", "--config", str(write_recipe(new, tmp_path))]
    codes, outputs = end_ranks([command] * 2, 240)
    assert codes == [0, 0], outputs
    old, grown, halfway = last(source), last(folder), CheckpointReader(complete(folder / "checkpoints")[0])
    for name in old.sizes():
        assert torch.equal(grown.whole(name), old.whole(name)), name
    for key, value in old.shared.items():
        if key.startswith("buffer."):
            assert torch.equal(grown.shared[key], value), key
    changed = [name for name in grown.sizes() if not torch.equal(grown.whole(name), halfway.whole(name))]
    assert not set(changed) & set(old.sizes())
    assert f"{MLP}.routers.other.weight" in changed
    assert any(".experts." in name for name in changed)
    assert grown.shared[f"buffer.{MLP}.routers.other.updates"] == 4
    assert [finding.differing for finding in certificate.verify(folder)] == [[], []]

    before, after = (load_trained(one, None, read_run(one)) for one in (source, folder))
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        for task in USED:
            maps = [
                trained.model.backbone([Pass(images, trained.controller.fixed_route(task))], trained.model.batch_norm)
                for trained in (before, after)
            ]
            assert torch.equal(maps[0][0][0], maps[1][0][0])

    assert main(["extract", "--run", str(folder), "--remove", "other", "--output", str(tmp_path / "less")]) == 0
    left = last(tmp_path / "less")
    assert left.sizes() == old.sizes()
    assert left.state.layout == old.state.layout
    assert all(torch.equal(left.whole(name), old.whole(name)) for name in old.sizes())
    assert all(torch.equal(left.shared[key], value) for key, value in old.shared.items() if key.startswith("buffer."))


def test_a_certificate_names_what_has_changed(new: Content, tmp_path: Path) -> None:
    """A router's running row counts as much as a parameter."""
    from gppf_ds.simt.masked import Fragment
    from gppf_ds.train.saving import save

    source = Path(new["finetune"]["source"])
    certificate.write(source, source)
    assert [finding.differing for finding in certificate.verify(source)] == [[], []]
    reader = last(source)
    key = f"{MLP}.routers.digits.usage"
    reader.shared[f"buffer.{key}"][0] += 1e-7
    fragments = [Fragment(name, 0, reader.whole(name), {}, reader.shapes[name]) for name in reader.sizes()]
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    save(source / "checkpoints", reader.state, fragments, reader.shared, keep=1)
    torch.distributed.destroy_process_group()
    assert [finding.differing for finding in certificate.verify(source)] == [[key], []]


def test_plans_are_for_experts(light_recipe: Content, new: Content, tmp_path: Path) -> None:
    folder = Path(new["finetune"]["source"])
    dense = yaml.safe_load((folder / "config.yaml").read_text())
    dense["backbone"]["moe"] = None
    (folder / "config.yaml").write_text(yaml.safe_dump(dense))
    new["finetune"]["plan"] = {"learn": "routers"}
    with pytest.raises(UserError, match=r"finetune\.plan and finetune\.routers are for token-level experts"):
        begun(new, tmp_path)
