"""The specification of a SIMT step in plain PyTorch: all devices in one process, nothing distributed, no DeepSpeed.

GPPF section 3.2. Whatever the engine does with ranks, partitions and overlapping collectives, it must come to this.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from gppf_ds.backbone.controller import Controller, Route, temperature
from gppf_ds.backbone.lego import Pass
from gppf_ds.backbone.moe.statistics import keep_running, losses, running_rows
from gppf_ds.backbone.norm import BatchNormRule, Weighting
from gppf_ds.config import RunConfig
from gppf_ds.seeding import FORWARD, seed_global_generators
from gppf_ds.simt.model import HEAD_STREAM, SimtModel
from gppf_ds.simt.optimizer import build_optimizer, learning_rate
from gppf_ds.tasks.task import Batch

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


class Reference:
    """Steps a model and its controllers.

    Args:
        model: with its initial values, on the device that computes; built without activation checkpointing.
        controller: of all tasks.
        config: of the run.
        precision: fp32, or bf16 or fp16 (autocast).
        rule: how batch norms are computed; None for :func:`batch_norm`.

    Attributes:
        optimizer, controller_optimizer: of plain torch.
    """

    def __init__(
        self,
        model: SimtModel,
        controller: Controller,
        config: RunConfig,
        precision: str = "fp32",
        rule: BatchNormRule | None = None,
    ) -> None:
        self.model = model
        self.controller = controller
        self.config = config
        self.dtype = AUTOCAST[precision]
        backbone = config.backbone
        explicit = partial(
            batch_norm, weighting=backbone.norm_weighting, synchronise=backbone.norm_sync == "cross_task"
        )
        self.rule = rule or explicit
        model.backbone.detach_statistics(config.schedule.kind)
        self.optimizer = build_optimizer(model, config)
        self.controller_optimizer = torch.optim.Adam(controller.parameters(), lr=config.controller.learning_rate)

    def step(
        self, step: int, tasks: Sequence[str], batches: Sequence[Batch], loss_scale: float = 1.0
    ) -> tuple[list[dict[str, float]], dict[str, int]]:
        """One optimizer step; none where a gradient is not finite.

        Args:
            step: its number.
            tasks: the task of every device.
            batches: of every device.
            loss_scale: that backward starts from.

        Returns:
            The loss terms of every device, unweighted; and how many devices used each parameter, by name.
        """
        self.model.train()
        self.model.zero_grad()
        self.controller.zero_grad()
        routes = [self._route(task, step, device) for device, task in enumerate(tasks)]
        terms: list[dict[str, float]] = []
        passed: list[Pass | None] = []
        span = len(tasks) // self.config.engine.accumulation
        for start in range(0, len(tasks), span):  # devices of one accumulation group share batch statistics
            for named, one in self._backward(step, range(start, start + span), tasks, batches, routes, loss_scale):
                terms.append(named)
                passed.append(one)

        contributing = [one for one in passed if one is not None]
        choices = [(one.route.task, one.route.path, self._chosen(one)) for one in contributing]
        users = {
            name: sum(uses(name, *choice) for choice in choices) if parameter.requires_grad else 0
            for name, parameter in self.model.named_parameters()
        }
        trained = [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]
        for name, parameter in trained:
            parameter.grad = _average(parameter, self._divisor(users[name], tasks) * loss_scale)
        for task, row in self.controller.logits.items():
            own = sum(one.route.task == task for one in contributing)
            row.grad = _average(row, self._divisor(own, tasks) * loss_scale)
        if not all(p.grad.isfinite().all() for _, p in trained if p.grad is not None):
            return terms, dict.fromkeys(users, 0)
        if self.config.optimizer.clip_norm:
            nn.utils.clip_grad_norm_([p for _, p in trained], self.config.optimizer.clip_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(step, self.config)
        self.optimizer.step()
        self.controller_optimizer.step()
        return terms, users

    def _divisor(self, users: int, tasks: Sequence[str]) -> int:
        """Of the sum of a parameter's gradients: how many devices use it.

        With schedule.kind accumulate, the devices that run one task: the gradient of the sum of tasks' means. With
        engine.average world, all devices.
        """
        if self.config.engine.average == "world":
            return len(tasks)
        per_task = len(tasks) // len(set(tasks)) if self.config.schedule.kind == "accumulate" else None
        return users and (per_task or users)

    def _backward(
        self,
        step: int,
        devices: range,
        tasks: Sequence[str],
        batches: Sequence[Batch],
        routes: Sequence[Route],
        loss_scale: float,
    ) -> list[tuple[dict[str, float], Pass | None]]:
        """Adds the gradients of these devices' weighted losses, and returns their loss terms and passes.

        A device whose loss is not finite takes part in batch statistics and in nothing else: it has no pass.
        """
        seed = self.config.seed
        passes = [Pass(batches[d].images, routes[d], (seed, step, d), batches[d].sizes) for d in devices]
        weighted: list[Tensor] = []
        outcomes: list[tuple[dict[str, float], Pass | None]] = []
        with torch.autocast(passes[0].images.device.type, self.dtype, enabled=self.dtype != torch.float32):
            features = self.model.backbone(passes, self.rule)
            for device, one, maps in zip(devices, passes, features, strict=True):
                seed_global_generators(seed, FORWARD, step, device, HEAD_STREAM)
                named = self.model.heads.bank[tasks[device]].loss(maps, batches[device].targets)  # type: ignore[operator]
                loss = torch.stack([term.float() for term in named.values()]).sum()
                finite = bool(torch.isfinite(loss))
                if finite:
                    weighted.append(loss * self.model.heads.loss_weights[tasks[device]])
                elif one.route.weights.requires_grad:
                    one.route.weights.register_hook(torch.zeros_like)
                outcomes.append(({name: float(term.detach()) for name, term in named.items()}, one if finite else None))
        weighted.append(self._routing_loss([one for _, one in outcomes if one is not None]))
        total = torch.stack(weighted).sum()
        if total.requires_grad:
            (total * loss_scale).backward()
        return outcomes

    def _chosen(self, one: Pass) -> set[tuple[str, str]]:
        """The experts that got tokens of this device."""
        layout = self.model.backbone.layout
        return {
            (layer, str(expert))
            for layer, (_, selected, _) in one.statistics.items()
            for expert, count in zip(layout.experts[layer] if layout else (), selected, strict=True)
            if count > 0
        }

    def _routing_loss(self, passes: Sequence[Pass]) -> Tensor:
        """The losses on what tokens choose, each task's as often as devices run it: the average divides by that."""
        total = torch.zeros((), device=next(self.model.parameters()).device)
        layout, config = self.model.backbone.layout, self.model.backbone.config.moe
        if layout is None or config is None:
            return total
        tasks = list(layout.tasks)
        for name, layer in self.model.backbone.moe_layers().items():
            rows = []
            for task in tasks:
                own = [one.statistics[name] for one in passes if one.route.task == task]
                row = torch.stack(own).sum(0) if own else total.new_zeros(3, layer.count)
                rows.append(row.detach() + len(own) * (row - row.detach()))
            total = total + losses(torch.stack(rows), running_rows(layer, tasks), config)
            keep_running(layer, tasks, torch.stack(rows), config.momentum)
        return total

    def _route(self, task: str, step: int, device: int) -> Route:
        if self.controller.frozen:
            return self.controller.fixed_route(task)
        noise = self.controller.noise(self.config.seed, step, device)
        tau = temperature(step, self.config.steps, self.config.controller)
        hard = self.config.backbone.routing == "hard"
        return (self.controller.hard_route if hard else self.controller.soft_route)(task, noise, tau)


def batch_norm(
    norms: Sequence[nn.BatchNorm2d],
    lanes: Sequence[tuple[int, Tensor]],
    weighting: Weighting = "element",
    synchronise: bool = True,
) -> list[Tensor]:
    """Batch norm by concatenation: all elements of all devices that use a norm, whatever their task and shape.

    Args:
        norms: of the units of one layer.
        lanes: (unit, x) of every device, x (B, C, H, W).
        weighting: whether an element of the map, a device, or an image counts once.
        synchronise: normalise with the statistics of all devices, or each device with its own. Running statistics
            cover all devices either way.
    """
    outputs = [x for _, x in lanes]
    for unit, norm in enumerate(norms):
        users = [lane for lane, (k, _) in enumerate(lanes) if k == unit]
        if not users:
            continue
        if not norm.training:  # of a frozen unit
            for lane in users:
                outputs[lane] = norm(lanes[lane][1])
            continue
        together = _moments([lanes[lane][1] for lane in users], weighting)
        _update_running_statistics(norm, *together, sum(lanes[lane][1][:, 0].numel() for lane in users))
        for lane in users:
            x = lanes[lane][1]
            mean, variance = together if synchronise else _moments([x], weighting)
            scale = norm.weight * torch.rsqrt(variance + norm.eps)
            y = (x.float() - _column(mean)) * _column(scale) + _column(norm.bias)
            outputs[lane] = y.to(x.dtype)
    return outputs


def _moments(xs: Sequence[Tensor], weighting: Weighting) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of the concatenation, (C,) each."""
    elements = torch.cat([x.float().transpose(0, 1).flatten(1) for x in xs], dim=1)
    share = {"element": lambda x: x[:, 0].numel(), "device": lambda x: 1, "sample": len}[weighting]
    weights = torch.cat([x.new_full((x[:, 0].numel(),), share(x) / x[:, 0].numel(), dtype=torch.float32) for x in xs])
    weights = weights / weights.sum()
    mean = (elements * weights).sum(1)
    return mean, ((elements - mean[:, None]).square() * weights).sum(1)


@torch.no_grad()
def _update_running_statistics(norm: nn.BatchNorm2d, mean: Tensor, variance: Tensor, elements: int) -> None:
    if norm.running_mean is None or norm.running_var is None or norm.num_batches_tracked is None:
        return
    norm.num_batches_tracked += 1
    momentum = norm.momentum if norm.momentum is not None else 1 / float(norm.num_batches_tracked)
    norm.running_mean.lerp_(mean, momentum)
    norm.running_var.lerp_(variance * elements / (elements - 1), momentum)


def _column(values: Tensor) -> Tensor:
    return values.view(1, -1, 1, 1)


def uses(name: str, task: str, path: tuple[int, ...] | None, chosen: Collection[tuple[str, str]] = ()) -> bool:
    """Whether a device with this task, path (None: soft, all units) and chosen experts uses the parameter of this name.

    ``chosen`` are (MoE layer, expert) that got tokens.
    """
    parts = name.split(".")
    if parts[0] == "heads":  # heads.bank.<task>
        return parts[2] == task
    if "routers" in parts or "task_embeddings" in parts:  # ....routers.<task>.weight, ....task_embeddings.<task>
        return task in parts
    if "experts" in parts:  # backbone.layers.<layer>.units.0.block.<part>.experts.<expert>
        place = parts.index("experts")
        return (f"{parts[2]}.{parts[place - 1]}", parts[place + 1]) in chosen
    if "units" in parts and path is not None:  # backbone.layers.<layer>.units.<unit>
        return path[int(parts[2])] == int(parts[4])
    return True


def _average(parameter: nn.Parameter, divisor: float) -> Tensor | None:
    """The sum of the devices' gradients, divided; None, for no step at all, where the divisor is 0."""
    if divisor == 0:
        return None
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad / divisor
