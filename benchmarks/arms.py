"""The arms of the benchmarks: one network, stepped by SIMT, by torch's DDP and by a plain DeepSpeed engine."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Protocol

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from gppf_ds.backbone.controller import Controller, temperature
from gppf_ds.backbone.lego import LegoBackbone, Pass
from gppf_ds.backbone.norm import NormPolicy
from gppf_ds.config import RunConfig
from gppf_ds.simt.engine import SimtEngine, StepReport
from gppf_ds.simt.model import Job, SimtModel
from gppf_ds.tasks.task import Batch, FeatureInfo, Head

Stage = Literal[0, 1, 2, 3]
Heads = Callable[[FeatureInfo], Mapping[str, Head]]


def build(config: RunConfig, heads: Heads, group: dist.ProcessGroup | None = None) -> tuple[SimtModel, Controller]:
    """The network, equal on every rank and in every arm.

    Args:
        config: of the run; all arms read it.
        heads: by task, for the backbone's maps.
        group: in which cross-task batch norm talks.
    """
    backbone = LegoBackbone(config.backbone, config.seed)
    torch.manual_seed(config.seed)
    named = heads(FeatureInfo(backbone.channels, backbone.strides))
    policy = NormPolicy(config.backbone.norm_weighting, config.backbone.norm_sync == "cross_task", group)
    model = SimtModel(backbone, named, dict.fromkeys(named, 1.0), policy)
    return model, Controller(list(named), backbone.units)


class Arm(Protocol):
    """A trainer of the network."""

    @property
    def module(self) -> nn.Module:
        """What holds the parameters."""

    def step(self, number: int, tasks: Sequence[str], batch: Batch) -> None:
        """One optimizer step: ``tasks`` of all ranks, ``batch`` of this one."""

    def parameters(self) -> dict[str, Tensor]:
        """Those of backbone and heads by name, whole, on the CPU; a collective call."""


class Simt:
    """The product, by default with one device per rank."""

    def __init__(self, config: RunConfig, heads: Heads, device: torch.device) -> None:
        model, controller = build(config, heads)
        self.engine = SimtEngine(model, controller, config, device)
        self.module = self.engine.model

    def step(self, number: int, tasks: Sequence[str], batch: Batch) -> None:
        """One optimizer step: ``tasks`` of all ranks, ``batch`` of this one."""
        self.step_devices(number, tasks, [batch])

    def step_devices(self, number: int, tasks: Sequence[str], batches: Sequence[Batch]) -> StepReport:
        """One optimizer step: ``tasks`` of all devices of all ranks, ``batches`` of this rank's."""
        jobs = []
        for device, batch in zip(self.engine.devices()[0], batches, strict=True):
            route = self.engine.route(tasks[device], number, device)
            passing = Pass(batch.images, route, (self.engine.config.seed, number, device))
            jobs.append(Job(device, tasks[device], batch, passing))
        return self.engine.step(number, tasks, [jobs])

    def parameters(self) -> dict[str, Tensor]:
        """By name, whole, on the CPU; a collective call."""
        return self.engine.full_parameters()


class PlainNetwork(nn.Module):
    """The same network as one would write it without SIMT: forward picks the head and returns the loss.

    Batch norm has a process group of its own: DDP and DeepSpeed send gradients when this rank's autograd gets to them,
    which on ranks with different tasks is not at the same place between two batch norms.
    """

    def __init__(self, config: RunConfig, heads: Heads, dummy: bool = False) -> None:
        super().__init__()
        self.network, self.controller = build(config, heads, dist.new_group())
        self.config = config
        self.dummy = dummy
        if config.controller.learning_rate == 0:
            self.controller.requires_grad_(False)

    def forward(self, number: int, task: str, batch: Batch) -> Tensor:
        """The loss of this rank; with ``dummy``, plus 0 times the sum of all parameters."""
        noise = self.controller.noise(self.config.seed, number, dist.get_rank())
        route = self.controller.soft_route(task, noise, temperature(number, self.config.steps, self.config.controller))
        maps = self.network.backbone([Pass(batch.images, route)], self.network.batch_norm)[0]
        terms = self.network.heads.bank[task].loss(maps, batch.targets)  # type: ignore[operator]
        loss = torch.stack(list(terms.values())).sum()
        if self.dummy:
            loss = loss + 0.0 * torch.stack([p.sum() for p in self.parameters() if p.requires_grad]).sum()
        return loss

    def values(self) -> dict[str, Tensor]:
        """Parameters of backbone and heads by name, on the CPU."""
        return {name: p.detach().cpu().clone() for name, p in self.network.named_parameters()}


class Ddp:
    """torch's DistributedDataParallel.

    Buffers are not broadcast, as SIMT does not either: those of the backbone are equal on all ranks anyway.

    Args:
        config, heads, device: as for the others.
        dummy: touch every parameter by a zero loss in place of ``find_unused_parameters=True``.
    """

    def __init__(self, config: RunConfig, heads: Heads, device: torch.device, dummy: bool = False) -> None:
        self.module = PlainNetwork(config, heads, dummy).to(device)
        self.wrapped = DistributedDataParallel(self.module, find_unused_parameters=not dummy, broadcast_buffers=False)
        self.optimizer = _optimizer(self.module, config)
        self.clip_norm = config.optimizer.clip_norm

    def step(self, number: int, tasks: Sequence[str], batch: Batch) -> None:
        """One optimizer step."""
        self.optimizer.zero_grad()
        self.wrapped(number, tasks[dist.get_rank()], batch).backward()
        if self.clip_norm:
            nn.utils.clip_grad_norm_(self.module.network.parameters(), self.clip_norm)
        self.optimizer.step()

    def parameters(self) -> dict[str, Tensor]:
        """By name, on the CPU."""
        return self.module.values()


class OneTaskDdp:
    """One task per iteration on all ranks: plain DDP, with a wrapper for every task around what that task runs.

    Hooks of a wrapper do nothing in the iterations of the others, so that no graph is searched for what is unused.
    """

    def __init__(self, config: RunConfig, heads: Heads, device: torch.device) -> None:
        self.module = PlainNetwork(config, heads).to(device)
        names = self.module.controller.logits
        self.wrapped = {n: DistributedDataParallel(_OneTask(self.module, n), broadcast_buffers=False) for n in names}
        self.optimizer = _optimizer(self.module, config)

    def step(self, number: int, tasks: Sequence[str], batch: Batch) -> None:
        """One optimizer step; ``tasks`` are the same on all ranks."""
        self.optimizer.zero_grad()
        self.wrapped[tasks[dist.get_rank()]](number, batch).backward()
        self.optimizer.step()

    def parameters(self) -> dict[str, Tensor]:
        """By name, on the CPU."""
        return self.module.values()


class _OneTask(nn.Module):
    """What a task runs of a network, and nothing else."""

    def __init__(self, plain: PlainNetwork, task: str) -> None:
        super().__init__()
        self.parts = nn.ModuleList([plain.network.backbone, plain.network.heads.bank[task]])
        self.logits = plain.controller.logits[task]
        self.task = task
        self.run = plain.forward

    def forward(self, number: int, batch: Batch) -> Tensor:
        return self.run(number, self.task, batch)


class EveryTaskDdp:
    """Every task in every step on every rank: a backward pass for each, and gradients are reduced in the last one.

    There a zero dummy loss touches the parameters that only the other tasks use, so that DDP reduces what they left.
    """

    def __init__(self, config: RunConfig, heads: Heads, device: torch.device) -> None:
        self.ddp = Ddp(config, heads, device, dummy=True)
        self.module = self.ddp.module

    def step_tasks(self, number: int, batches: Mapping[str, Batch]) -> None:
        """One optimizer step on this rank's ``batches`` of all tasks."""
        self.ddp.optimizer.zero_grad()
        *others, last = batches
        with self.ddp.wrapped.no_sync():
            for task in others:
                self.ddp.wrapped(number, task, batches[task]).backward()
        self.ddp.wrapped(number, last, batches[last]).backward()
        self.ddp.optimizer.step()

    def parameters(self) -> dict[str, Tensor]:
        """By name, on the CPU."""
        return self.module.values()


class PlainDeepSpeed:
    """A DeepSpeed engine as its own tutorial drives it, at the ZeRO stage of the configuration (0 to 2)."""

    def __init__(self, config: RunConfig, heads: Heads, device: torch.device) -> None:
        self.module = PlainNetwork(config, heads).to(device)
        settings: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": 1,
            "steps_per_print": 2**31 - 1,
            "gradient_clipping": config.optimizer.clip_norm,
            "zero_optimization": {"stage": config.engine.zero_stage},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
        }
        self.engine = deepspeed.initialize(
            model=self.module,
            optimizer=_optimizer(self.module, config),
            config=settings,
            dist_init_required=False,
        )[0]

    def step(self, number: int, tasks: Sequence[str], batch: Batch) -> None:
        """One optimizer step."""
        self.engine.backward(self.engine(number, tasks[dist.get_rank()], batch))
        self.engine.step()

    def parameters(self) -> dict[str, Tensor]:
        """By name, on the CPU."""
        return self.module.values()


def _optimizer(module: PlainNetwork, config: RunConfig) -> torch.optim.Optimizer:
    """The product's optimizer; the controllers are one more group of it, which costs less than their own Adam."""
    settings = config.optimizer
    network = list(module.network.parameters())
    groups = [
        {"params": [p for p in network if p.dim() > 1], "weight_decay": settings.weight_decay},
        {"params": [p for p in network if p.dim() <= 1], "weight_decay": 0.0},
        {"params": [p for p in module.controller.parameters() if p.requires_grad], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if settings.name == "sgd":
        return torch.optim.SGD(groups, lr=settings.learning_rate, momentum=settings.momentum)
    return torch.optim.AdamW(groups, lr=settings.learning_rate, betas=settings.betas, eps=settings.epsilon, fused=True)
