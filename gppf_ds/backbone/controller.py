"""Controllers: each task's learnt choice of a unit in every lego layer (GPPF equation 1)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from gppf_ds.config import ControllerConfig
from gppf_ds.seeding import GUMBEL, generator

NEVER = -1e4
"""The logit of a unit that a task must not choose: no noise lifts it, its probability is exactly 0."""


def temperature(step: int, steps: int, config: ControllerConfig) -> float:
    """Gumbel-softmax temperature: falls linearly over the first ``decay_share`` of the steps (GPPF D.1)."""
    share = min(step / (config.decay_share * steps), 1.0)
    return config.temperature_start + (config.temperature_end - config.temperature_start) * share


def settled_step(steps: int, config: ControllerConfig) -> int:
    """The first step at which the temperature no longer falls."""
    return math.ceil(config.decay_share * steps)


@dataclass
class Route:
    """For one device and one step, the units of every lego layer."""

    weights: Tensor
    """(layers, max units) fp32: in soft mode the mixing weights, in hard mode 1 with the straight-through gradient."""
    path: tuple[int, ...] | None
    """Hard mode and evaluation: the chosen unit of every layer; soft mode: None."""
    task: str = ""
    """Whose route it is: the routers of token-level experts are the task's own."""


class Controller(nn.Module):
    """The logits of every task, shape (layers, max units), fp32; a layer with fewer units has -inf in the rest.

    It lives outside the DeepSpeed engine: the logits are tiny, any rank may run any task, and they keep fp32 and their
    own optimizer at every ZeRO stage.
    """

    mask: Tensor

    def __init__(self, tasks: Sequence[str], units: Sequence[int]) -> None:
        super().__init__()
        self.units = list(units)
        mask = torch.full((len(units), max(units)), -torch.inf)
        for layer, count in enumerate(units):
            mask[layer, :count] = 0
        self.register_buffer("mask", mask, persistent=False)
        self.logits = nn.ParameterDict({task: torch.zeros(mask.shape) for task in tasks})
        self.frozen = max(units) == 1
        """Where there is nothing to choose, and in the sparse phase, every device takes its task's path, and the logits
        stay as they are."""

    def probabilities(self, task: str) -> Tensor:
        """(layers, max units), each row summing to 1."""
        return torch.softmax(self.logits[task] + self.mask, dim=-1)

    @torch.no_grad()
    def path(self, task: str) -> tuple[int, ...]:
        """The most likely unit of every layer: the route at evaluation and in extraction."""
        return tuple(self.probabilities(task).argmax(-1).tolist())

    def units_on_paths(self) -> list[list[int]]:
        """For every layer the units that some task's path uses."""
        paths = [self.path(task) for task in self.logits]
        return [sorted(set(chosen)) for chosen in zip(*paths, strict=True)]

    def fixed_route(self, task: str) -> Route:
        """The route along the task's path."""
        return Route(torch.ones_like(self.mask), self.path(task), task)

    def noise(self, seed: int, step: int, device: int) -> Tensor:
        """Gumbel(0, 1) noise, (layers, max units): a function of (seed, step, device)."""
        uniform = generator(seed, GUMBEL, step, device).random(self.mask.shape)
        return torch.from_numpy(-np.log(-np.log(np.clip(uniform, 1e-20, 1 - 1e-16)))).float()

    def soft_route(self, task: str, noise: Tensor, tau: float) -> Route:
        """u = softmax((log p + G) / tau): equation 1."""
        log_p = torch.log_softmax(self.logits[task] + self.mask, dim=-1)
        return Route(torch.softmax((log_p + noise.to(log_p.device)) / tau, dim=-1), None, task)

    def hard_route(self, task: str, noise: Tensor, tau: float) -> Route:
        """The unit with the largest u; its factor is exactly 1 and carries the gradient of u (straight-through)."""
        path = self.hard_path(task, noise)
        soft = self.soft_route(task, noise, tau).weights
        return Route(1 + (soft - soft.detach()), path, task)

    @torch.no_grad()
    def hard_path(self, task: str, noise: Tensor) -> tuple[int, ...]:
        """The chosen units, computed on the CPU so that ranks with different hardware agree on ties and rounding."""
        logits = (self.logits[task] + self.mask).cpu().double()
        return tuple((logits + noise.double()).argmax(-1).tolist())
