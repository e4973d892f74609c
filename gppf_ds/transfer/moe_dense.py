"""A task's backbone as a dense model, where its tokens have no choice left: one MLP in every block."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from gppf_ds.backbone.controller import Controller
from gppf_ds.backbone.lego import LegoBackbone, LegoLayer
from gppf_ds.backbone.moe.block import VitMoeBlock
from gppf_ds.backbone.moe.mlp import MoeMlp
from gppf_ds.backbone.vit import Embedding
from gppf_ds.simt.model import SimtModel
from gppf_ds.train.restore import Trained


def obstacle(small: Trained, task: str) -> str | None:
    """Why timm's own architecture does not compute what a task's backbone computes; None where it does.

    Args:
        small: the network of this task alone, see :func:`gppf_ds.transfer.serving.serving`.
        task: its name.
    """
    backbone = small.model.backbone
    for name, layer in backbone.moe_layers().items():
        if not isinstance(layer, MoeMlp):
            return f"in layer {name} attention heads share one key and value, which no dense attention of timm does"
        if len(layer.experts) > 1:
            return f"in layer {name} tokens choose among {len(layer.experts)} experts"
    widths = {_hidden(unit.block.mlp) for unit in _units(backbone) if hasattr(unit, "block")}
    widths |= {_hidden(unit.mlp) for unit in _units(backbone) if hasattr(unit, "mlp")}
    if len(widths) > 1:
        return f"its MLPs have the hidden widths {sorted(widths)}, where timm's model has one for all"
    return _no_place_for_embeddings(backbone)


def _no_place_for_embeddings(backbone: LegoBackbone) -> str | None:
    """The task's embedding can be added to the bias of the MLP before it, or to the position embedding."""
    assert backbone.config.moe is not None
    if not backbone.config.moe.task_embedding:
        return None
    before: Any = None
    for unit in _units(backbone):
        if isinstance(unit, VitMoeBlock):
            if isinstance(before, Embedding):
                model: Any = before.model
                if model.pos_embed is None or model.no_embed_class or not isinstance(model.norm_pre, nn.Identity):
                    return "the embedding of the task before the first block has no place in timm's model"
            elif not isinstance(getattr(before, "block", before).ls2, nn.Identity):
                return "the embedding of the task has no place in timm's model, which scales its layers"
        elif hasattr(unit, "task_embeddings"):
            return "the embedding of the task has no place in timm's model"
        before = unit
    return None


@torch.no_grad()
def dense(small: Trained, task: str) -> Trained:
    """The same numbers as a network of timm's own blocks, for a task without an :func:`obstacle`.

    Args:
        small: the network of this task alone.
        task: its name.
    """
    backbone, config = small.model.backbone, small.recipe.config
    state = _state(backbone, task)
    [width] = {_hidden(layer) for layer in backbone.moe_layers().values()}
    channels = next(iter(backbone.moe_layers().values())).width
    options = {**config.backbone.options, "mlp_ratio": width / channels}
    plain = replace(config.backbone, moe=None, options=options)
    made = LegoBackbone(plain, config.seed)
    for layer in made.layers:
        assert isinstance(layer, LegoLayer)
        for name, tensor in layer.units["0"].state_dict().items():
            tensor.copy_(state[layer.timm_name(name)])
    head: Any = small.model.heads.bank[task]
    model = SimtModel(made, {task: head}, {task: 1.0}, small.model.batch_norm)
    recipe = replace(small.recipe, config=replace(config, backbone=plain))
    return Trained(small.path, small.step, model.eval(), Controller([task], made.units), recipe)


def _state(backbone: LegoBackbone, task: str) -> dict[str, Tensor]:
    """The backbone's tensors under timm's names, its experts' as those of MLPs."""
    state: dict[str, Tensor] = {}
    bias = ""
    for layer in backbone.layers:
        assert isinstance(layer, LegoLayer)
        unit: Any = layer.units["0"]
        for name, tensor in unit.state_dict().items():
            if not layer.moe_parts or not name.startswith(("block.mlp.", "task_embeddings.")):
                state[layer.timm_name(name)] = tensor.clone()
        if layer.moe_parts:
            for name, tensor in _mlp(unit.block.mlp).items():
                state[layer.timm_name(f"block.mlp.{name}")] = tensor
            if task in unit.task_embeddings:
                state[bias or "pos_embed"] += unit.task_embeddings[task]
        inner = "block.mlp.fc2.bias" if hasattr(unit, "block") else "mlp.fc2.bias"
        bias = layer.timm_name(inner) if layer.index else ""
    return state


def _mlp(layer: Any) -> dict[str, Tensor]:
    """One MLP of an expert and the shared ones: their hidden units side by side, their outputs added up."""
    [expert] = layer.experts.values()
    parts = [expert, *layer.shared]
    return {
        "fc1.weight": torch.cat([part.fc1.weight for part in parts]),
        "fc1.bias": torch.cat([part.fc1.bias for part in parts]),
        "fc2.weight": torch.cat([part.fc2.weight for part in parts], 1),
        "fc2.bias": torch.stack([part.fc2.bias for part in parts]).sum(0),
    }


def _hidden(mlp: Any) -> int:
    """Hidden width of an MLP, or of what an MoE-MLP with one expert is."""
    if isinstance(mlp, MoeMlp):
        return sum(part.fc1.out_features for part in [*mlp.experts.values(), *mlp.shared])
    return int(mlp.fc1.out_features)


def _units(backbone: LegoBackbone) -> list[Any]:
    return [next(iter(layer.units.values())) for layer in backbone.layers]  # type: ignore[operator]
