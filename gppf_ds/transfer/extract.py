"""Extraction: a task's path as a plain timm model (GPPF section 3.3). A renaming, with the same numbers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import gppf_ds
from gppf_ds.backbone.controller import Route
from gppf_ds.backbone.lego import LegoBackbone, LegoLayer, Pass
from gppf_ds.backbone.norm import NormPolicy
from gppf_ds.config import BackboneConfig
from gppf_ds.train.restore import Trained


def path_state(backbone: LegoBackbone, path: Sequence[int]) -> dict[str, Tensor]:
    """The parameters and buffers of the chosen units under timm's names.

    Args:
        backbone: trained.
        path: the unit of every lego layer.
    """
    state = {}
    for layer, unit in zip(backbone.layers, path, strict=True):
        assert isinstance(layer, LegoLayer)
        for name, tensor in layer.units[unit].state_dict().items():
            state[layer.prefix + name] = tensor
    return state


def plain_model(config: BackboneConfig, state: dict[str, Tensor]) -> Any:
    """The timm model without a classifier that a path loads into, strictly."""
    model = timm.create_model(config.name, pretrained=False, num_classes=0, **config.options)
    model.load_state_dict(state, strict=True)
    return model.eval()


@torch.no_grad()
def largest_difference(backbone: LegoBackbone, path: Sequence[int], model: Any, size: int = 64) -> float:
    """The largest difference between the last maps of a path and its plain model, relative to the largest value."""
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    route = Route(torch.ones(len(backbone.layers), max(backbone.units)), tuple(path))
    ours = backbone.eval()([Pass(images, route)], NormPolicy())[0][-1]
    return float((ours - model.forward_features(images)).abs().max() / ours.abs().max().clamp_min(1e-12))


def export(trained: Trained, task: str, folder: Path) -> Path:
    """Writes ``folder/task/model.safetensors`` and ``model.json``, after comparing the plain model with the path.

    Args:
        trained: the network.
        task: whose path to write.
        folder: of all exports.

    Returns:
        The safetensors file.

    Raises:
        RuntimeError: the plain model does not give the numbers of the path.
    """
    backbone, path = trained.model.backbone, trained.controller.path(task)
    state = {name: tensor.contiguous().clone() for name, tensor in path_state(backbone, path).items()}
    target = folder / task
    target.mkdir(parents=True, exist_ok=True)
    file = target / "model.safetensors"
    save_file(state, file, metadata={"format": "pt"})
    model = plain_model(backbone.config, load_file(file))
    difference = largest_difference(backbone, path, model)
    if difference > 1e-5:
        raise RuntimeError(f"the exported model of {task} differs from its path by {difference:.1e}; nothing is usable")
    description = {
        "task": task,
        "timm_model": backbone.config.name,
        "timm_options": {**backbone.config.options, "num_classes": 0},
        "path": {layer.name: unit for layer, unit in zip(backbone.layers, path, strict=True)},
        "checkpoint": trained.path.name,
        "step": trained.step,
        "difference_to_path": difference,
        "gppf_ds": gppf_ds.__version__,
    }
    (target / "model.json").write_text(json.dumps(description, indent=1) + "\n")
    return file
