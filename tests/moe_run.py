"""A finished run of a small network with token-level experts, made without training: the experts in use are known."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import yaml

from gppf_ds.backbone.moe.layer import MoeLayer
from gppf_ds.simt.masked import Fragment
from gppf_ds.simt.model import SimtModel
from gppf_ds.train.checkpoint import TrainState
from gppf_ds.train.recipe import from_content
from gppf_ds.train.record import write_record
from gppf_ds.train.restore import build_model, shared_tensors
from gppf_ds.train.saving import save

VIT = {"name": "vit_tiny_patch16_224", "options": {"embed_dim": 48, "depth": 3, "num_heads": 3}, "units": 1}
SWIN = {
    "name": "swin_tiny_patch4_window7_224",
    "options": {"embed_dim": 24, "depths": [1, 2, 1, 1], "num_heads": [1, 2, 4, 8]},
    "units": 1,
}
MOE: dict[str, Any] = {"mlp_experts": 6, "mlp_top_k": 2, "attention_experts": 6}
USED = {"digits": (0, 1, 2, 3), "distance": (2, 3, 4, 5)}
"""The experts that a task's tokens choose among, in every layer."""


def content(recipe: dict[str, Any], folder: Path, moe: dict[str, Any] | None = None) -> dict[str, Any]:
    """The light recipe with a network of experts."""
    backbone = {**VIT, "moe": {**MOE, **(moe or {})}}
    return {**recipe, "output": str(folder), "backbone": backbone, "loader": {"workers": 0}}


def make_run(recipe: dict[str, Any], step: int = 4, apart: float = 2.0) -> Path:
    """Writes the record and one checkpoint, with optimizer state, into the recipe's output folder.

    Args:
        recipe: of the run.
        step: of the checkpoint.
        apart: see :func:`prefer_experts`.
    """
    run = from_content(yaml.safe_load(yaml.safe_dump(recipe)))
    folder = Path(run.config.output)
    model, controller = build_model(run.config.backbone, run.tasks, run.config.seed)
    prefer_experts(model, apart)
    fragments = []
    for name, parameter in model.named_parameters():
        flat = parameter.detach().flatten().clone()
        moments = {"exp_avg": torch.randn_like(flat), "step": torch.tensor(float(step))}
        fragments.append(Fragment(name, 0, flat, moments, tuple(parameter.shape)))
    optimizer = torch.optim.Adam(controller.parameters())
    shared = {name: tensor.clone() for name, tensor in shared_tensors(model, controller, optimizer).items()}
    state = TrainState(step, dict.fromkeys(run.tasks, step), run.config.seed, layout=model.backbone.layout)
    write_record(folder, run.text, run.config.seed)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        save(folder / "checkpoints", state, fragments, shared, keep=1)
    finally:
        dist.destroy_process_group()
    return folder


@torch.no_grad()
def prefer_experts(model: SimtModel, apart: float) -> None:
    """Lets every task choose among :data:`USED` only, whatever the image; what they use most stands in ``usage``.

    The logits of the other experts are lower by 16 times ``apart``.
    """
    generator = torch.Generator().manual_seed(5)
    for name, layer in model.backbone.moe_layers().items():
        lego_layer: Any = model.backbone.layers[int(name.split(".")[0])]
        block = lego_layer.units["0"].block
        norm = block.norm2 if name.endswith("mlp") else block.norm1
        norm.bias[0] = 8.0
        set_rows(layer, generator, apart)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))


def set_rows(layer: MoeLayer, generator: torch.Generator, apart: float) -> None:
    for task, used in USED.items():
        router: Any = layer.routers[task]
        router.weight.normal_(0, 0.3, generator=generator)
        router.weight[:, 0] = torch.tensor([apart if expert in used else -apart for expert in router.experts])
        router.usage.copy_(torch.tensor([0.4 - 0.05 * expert if expert in used else 0.0 for expert in router.experts]))
        router.probability.copy_(router.usage / router.usage.sum())
        router.updates.fill_(4.0)
