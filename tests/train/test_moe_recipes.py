"""The recipes of the modular MoE transformer: each can be built, and every baseline sees as many images per task."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from distributed.ranks import ROOT

from gppf_ds.backbone.lego import LegoBackbone
from gppf_ds.simt.schedule import Schedule
from gppf_ds.train.recipe import Recipe, read

FOLDER = ROOT / "ds_configs/recipes/moe"
LARGE = ("imagenet1k", "coco", "ade20k")
BASELINES = {
    **{
        f"imagenet_coco_ade20k_{size}": [
            f"imagenet_coco_ade20k_{size}_dense",
            *(f"single/{task}_{size}" for task in LARGE),
        ]
        for size in ("vit_s", "swin_t")
    },
    "imagenet_coco_ade20k_vit_s_small": [],
    "demo": ["demo_dense", *(f"demo_single_{task}" for task in ("digits", "objects", "regions", "distance"))],
}


def recipe(name: str) -> Recipe:
    return read(["--config", str(FOLDER / f"{name}.yaml")])


def images(made: Recipe, ranks: int = 2) -> dict[str, int]:
    """Of every task, in the whole run."""
    config, engine = made.config, made.config.engine
    weights = {name: task.weight for name, task in made.tasks.items()}
    schedule = Schedule.from_weights(weights, config.schedule, 0, engine.devices_per_rank, engine.accumulation)
    dealt = schedule(0, ranks * engine.devices_per_rank * engine.accumulation).tolist()
    return {
        name: config.steps * dealt.count(place) * made.tasks[name].batch_size
        for place, name in enumerate(schedule.tasks)
    }


def test_every_recipe_is_looked_at() -> None:
    found = {str(path.relative_to(FOLDER).with_suffix("")) for path in FOLDER.rglob("*.yaml")}
    assert found == {name for joint, others in BASELINES.items() for name in (joint, *others)}


@pytest.mark.parametrize("joint", BASELINES)
def test_baselines_have_the_joint_runs_budget_and_no_experts(joint: str) -> None:
    made = recipe(joint)
    config = made.config
    assert config.schedule.kind == "accumulate"
    assert config.backbone.moe is not None
    for name in BASELINES[joint]:
        other = recipe(name)
        assert images(other) == {task: count for task, count in images(made).items() if task in other.tasks}
        assert other.config.backbone.moe is None
        assert (other.config.backbone.name, other.config.backbone.options) == (
            config.backbone.name,
            config.backbone.options,
        )
        assert Path(other.config.output).name == Path(name).name


@pytest.mark.parametrize("joint", BASELINES)
def test_the_backbone_can_be_built(joint: str) -> None:
    made = recipe(joint)
    with torch.device("meta"):
        backbone = LegoBackbone(made.config.backbone, tasks=list(made.tasks))
    parts = [name.rpartition(".")[2] for name in backbone.moe_layers()]
    assert parts.count("mlp") == parts.count("attn") == {"demo": 2, "imagenet_coco_ade20k_swin_t": 5}.get(joint, 6)
