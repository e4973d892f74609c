"""Smaller networks in memory: of a network with token-level experts, what some tasks and a layout need."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from gppf_ds.backbone.lego import Pass
from gppf_ds.backbone.moe.adapt import restricted, rows_kept
from gppf_ds.backbone.moe.layout import Layout
from gppf_ds.config import FinetuneConfig
from gppf_ds.tasks.task import Batch
from gppf_ds.train.restore import Trained, build_model
from gppf_ds.transfer.extract import relative_difference


@torch.no_grad()
def serving(trained: Trained, tasks: Sequence[str], layout: Layout | None = None) -> Trained:
    """A network that holds only what some tasks need, with the same values.

    Args:
        trained: with token-level experts; stays as it is.
        tasks: their names.
        layout: of the experts, with these tasks; by default all that one of them can choose.

    Returns:
        It, on the CPU.
    """
    before, config = trained.model.backbone.layout, trained.recipe.config
    assert before is not None
    assert config.backbone.moe is not None
    layout = layout or restricted(before, tasks)
    moe = replace(config.backbone.moe, task_mlp_top_k={}, task_attention_top_k={})
    backbone = replace(config.backbone, moe=moe)
    chosen = {name: task for name, task in trained.recipe.tasks.items() if name in tasks}
    model, controller = build_model(backbone, chosen, config.seed, layout=layout)
    held = trained.model.state_dict()
    for name, tensor in model.state_dict().items():
        rows = rows_kept(name, before, layout)
        tensor.copy_(held[name] if rows is None else held[name][rows])
    recipe = replace(trained.recipe, tasks=chosen, config=replace(config, backbone=backbone, finetune=FinetuneConfig()))
    return Trained(trained.path, trained.step, model.eval(), controller, recipe)


class TaskBackbone(nn.Module):
    """The backbone of one task of a network with token-level experts, alone, in evaluation mode.

    Args:
        trained: stays as it is.
        task: its name.

    Attributes:
        numbers: the one unit of every layer, by the layers' names.
    """

    def __init__(self, trained: Trained, task: str) -> None:
        super().__init__()
        small = serving(trained, [task])
        self.backbone, self.batch_norm = small.model.backbone, small.model.batch_norm
        self.route = small.controller.fixed_route(task)
        self.numbers = {str(layer.name): 0 for layer in self.backbone.layers}
        self.eval().requires_grad_(False)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """(B, 3, H, W) -> the maps that the head was trained on, finest first."""
        return tuple(self.backbone([Pass(images, self.route)], self.batch_norm)[0])


@torch.no_grad()
def maps(trained: Trained, task: str, batch: Batch) -> list[Tensor]:
    """What a task's head is given of a batch."""
    passing = Pass(batch.images, trained.controller.fixed_route(task), sizes=batch.sizes)
    return trained.model.backbone([passing], trained.model.batch_norm)[0]


def drift(parent: Trained, child: Trained, task: str, batches: Sequence[Batch]) -> float:
    """How far a smaller network's maps are from its parent's: the largest difference over the largest value."""
    worst = 0.0
    for batch in batches:
        for ours, theirs in zip(maps(parent, task, batch), maps(child, task, batch), strict=True):
            worst = max(worst, relative_difference(ours, theirs))
    return worst
