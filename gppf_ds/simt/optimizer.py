"""The optimizer of backbone and heads, and its learning rate."""

from __future__ import annotations

import math

import torch
from torch import nn

from gppf_ds.config import RunConfig
from gppf_ds.simt.model import SimtModel


def learning_rate(step: int, config: RunConfig) -> float:
    """Linear warm-up, then a cosine from the peak to 0 at the last step, or a tenth at every milestone."""
    settings = config.optimizer
    peak, warmup, milestones = settings.learning_rate, settings.warmup_steps, settings.milestones
    if step < warmup:
        return peak * (step + 1) / warmup
    if milestones:
        return peak * 0.1 ** sum(step >= milestone for milestone in milestones)
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, config.steps - warmup)))


def build_optimizer(model: SimtModel, config: RunConfig) -> torch.optim.Optimizer:
    """SGD or AdamW over two groups: what decays, and what does not.

    Norms, biases and what timm exempts (position embeddings, class tokens) do not, unless ``norm_decay`` is set.
    """
    settings = config.optimizer
    spared = {f"backbone.{name}" for name in model.backbone.undecayed()}
    decayed: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in ((n, p) for n, p in model.named_parameters() if p.requires_grad):
        decays = settings.norm_decay or (parameter.dim() > 1 and name not in spared)
        (decayed if decays else others).append(parameter)
    groups = [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": others, "weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]]
    if settings.name == "sgd":
        return torch.optim.SGD(groups, lr=settings.learning_rate, momentum=settings.momentum)
    # Fused: one pass over memory where torch's default makes several. Its fused SGD wants momentum of all parameters or
    # of none, and a head that is used for the first time has none yet.
    return torch.optim.AdamW(groups, lr=settings.learning_rate, betas=settings.betas, eps=settings.epsilon, fused=True)
