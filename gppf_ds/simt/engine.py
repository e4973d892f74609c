"""SIMT in a DeepSpeed engine. With ``partitions.py`` and ``expert_parallel.py`` it touches DeepSpeed's internals."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from gppf_ds.backbone.controller import Controller, Route, temperature
from gppf_ds.backbone.lego import LegoLayer
from gppf_ds.config import RunConfig
from gppf_ds.simt.audit import Audit
from gppf_ds.simt.buffers import average_head_buffers
from gppf_ds.simt.deepspeed_config import deepspeed_config
from gppf_ds.simt.expert_parallel import ExpertParallel
from gppf_ds.simt.job import import_deepspeed, resolve_precision
from gppf_ds.simt.loss_scale import LossScale
from gppf_ds.simt.masked import Fragment, MaskedOptimizer, fragments_of
from gppf_ds.simt.model import DeviceLoss, HeadBank, Job, SimtModel
from gppf_ds.simt.optimizer import build_optimizer, learning_rate
from gppf_ds.simt.partitions import own_parts, partitions
from gppf_ds.simt.reduction import LayerwiseReduction, split_into_parts
from gppf_ds.simt.usage import Owner, Users, count_experts, count_units, divisors, owner_of, usage_counts


@dataclass
class StepReport:
    """What a step did, on this rank."""

    losses: list[DeviceLoss]
    """Of this rank's devices."""
    valid: np.ndarray
    """Which of all devices contributed, (devices,), bool."""
    skipped: str | None = None
    """Why the whole step changed nothing, if so."""
    counts: Mapping[Owner, int] = field(default_factory=dict)
    chosen: Users = field(default_factory=dict)
    """Who chose each unit and expert."""
    norms: Sequence[tuple[Owner, Tensor]] = ()
    """Of the fused gradient of every parameter that this rank holds, before clipping."""

    def gradient_norms(self) -> dict[Owner, float]:
        """The norm of the fused gradient by owner, 0 for those that nobody used; waits for the device."""
        values = torch.stack([norm for _, norm in self.norms]).tolist() if self.norms else []
        squares = dict.fromkeys(self.counts, 0.0) if values else {}
        for (owner, _), value in zip(self.norms, values, strict=True):
            squares[owner] = squares.get(owner, 0.0) + value**2
        return {owner: square**0.5 for owner, square in squares.items()}


class SimtEngine:
    """A DeepSpeed engine whose step is a SIMT step with the exact task average.

    Args:
        model: backbone and heads, equal on every rank.
        controller: of all tasks; kept outside DeepSpeed, replicated, fp32, with an Adam of its own.
        config: of the run.
        device: of this rank.
    """

    def __init__(self, model: SimtModel, controller: Controller, config: RunConfig, device: torch.device) -> None:
        deepspeed = import_deepspeed()
        self.config = config
        self.device = device
        self.stage = config.engine.zero_stage
        precision = resolve_precision(config.engine.precision, device)
        self.loss_scale = LossScale() if precision == "fp16" else None
        self.world_size, self.rank = dist.get_world_size(), dist.get_rank()
        self.controller = controller.to(device)
        self.controller_optimizer = torch.optim.Adam(controller.parameters(), lr=config.controller.learning_rate)
        if self.stage == 3:
            # Gathered and reduced as a whole, so that all ranks do the same whatever units and heads they run.
            deepspeed.utils.set_z3_leaf_modules(model, [LegoLayer, HeadBank])
        self.owners = {name: owner_of(name) for name, _ in model.named_parameters()}
        self.learning = {self.owners[name] for name, p in model.named_parameters() if p.requires_grad}
        size = config.engine.expert_parallel
        self.expert_parallel = ExpertParallel(model, size) if size > 1 else None
        optimizer = build_optimizer(model, config)
        if self.expert_parallel is not None:
            self.expert_parallel.split_groups(optimizer)
        self.engine = deepspeed.initialize(
            model=model,
            optimizer=optimizer,
            config=deepspeed_config(config, precision, sum(p.numel() for p in model.parameters())),
            dist_init_required=False,
        )[0]
        self.model: SimtModel = self.engine.module
        self.model.backbone.detach_statistics(config.schedule.kind)
        self.shapes = {n: tuple(getattr(p, "ds_shape", p.shape)) for n, p in self.model.named_parameters()}
        self._distinct_owners = {*self.owners.values(), *(("task", task) for task in controller.logits)}
        one_unit = max(controller.units) > 1 and (controller.frozen or config.backbone.routing == "hard")
        self._choices = [owner for owner in self._distinct_owners if owner[0] == "unit"] if one_unit else []
        self.parameters = [(p, self.owners[n]) for n, p in self.model.named_parameters() if p.requires_grad]
        self.frozen = [(n, p) for n, p in self.model.named_parameters() if not p.requires_grad]
        # DeepSpeed's hook on a leaf module needs an input with a gradient. So do batch norms where some units are
        # frozen: a rank that runs only such ones must take part in the collectives of backward all the same.
        learning = {p.requires_grad for p in self.model.backbone.parameters()}
        self._images_need_gradients = self.stage == 3 or learning == {True, False}
        self.masked = None
        if self.stage:
            self.masked = MaskedOptimizer(self.engine.optimizer.optimizer, partitions(self.engine, self.stage))
        self.reduction = self._take_over_reduction()
        self._norm = torch.zeros((), device=device)
        self._take_over_norm()
        self.audit = Audit() if config.engine.audit else None
        self._head_batches: Counter[str] = Counter()

    def _take_over_reduction(self) -> LayerwiseReduction:
        """Gradients are scaled, and summed layer by layer during backward, here; DeepSpeed only partitions them."""
        optimizer = self.engine.optimizer
        if self.stage == 0:
            self.engine.enable_backward_allreduce = False
            self.engine.torch_autocast_z0_gradscaler = None
        else:
            optimizer.torch_autocast_gradscaler = None
        if self.stage == 3:
            optimizer._DeepSpeedZeroOptimizer_Stage3__avg_scatter_grads = partial(own_parts, self.rank)
        elif self.stage:
            optimizer.average_tensor = lambda tensor, dtype: None
        named = [(n, p, self.owners[n]) for n, p in self.model.named_parameters() if p.requires_grad]
        parts = split_into_parts(named, self._rows(), len(self.model.backbone.layers), self._peers)
        reduction = LayerwiseReduction(parts, {p: math.prod(self.shapes[n]) for n, p, _ in named})
        self.model.backbone.after_backward = reduction.backward_reached
        return reduction

    def _take_over_norm(self) -> None:
        """Clipping goes by the norms that the step has anyway; DeepSpeed would read all gradients once more."""
        if self.stage == 3:
            self.engine.optimizer._get_norm_groups = lambda: [self._norm.to(self.engine.optimizer.device)]
        elif self.stage:  # where the optimizer is offloaded, its device is the CPU
            self.engine.optimizer.scaled_global_norm = lambda norm_type=2: self._norm.to(self.engine.optimizer.device)
        else:
            limit = self.config.optimizer.clip_norm
            clip = nn.utils.clip_grads_with_norm_
            self.engine.clip_fp32_gradients = lambda: clip(self.model.parameters(), limit, self._norm)
            self.engine.zero_grad = self._drop_gradients  # DeepSpeed's walks over every module

    def _drop_gradients(self) -> None:
        for parameter, _ in self.parameters:
            parameter.grad = None

    def _rows(self) -> list[tuple[nn.Parameter, Owner]]:
        """The controller's rows that learn, each its task's."""
        return [] if self.controller.frozen else [(row, ("task", name)) for name, row in self.controller.logits.items()]

    def _peers(self, parameter: Any) -> Any:
        """The process group of the ranks that hold a parameter; None for all."""
        spread = self.expert_parallel
        return spread.peers if spread is not None and spread.is_spread(parameter) else None

    @property
    def num_devices(self) -> int:
        """Virtual devices of all ranks in one optimizer step."""
        return self.world_size * self.config.engine.devices_per_rank * self.config.engine.accumulation

    def devices(self) -> list[list[int]]:
        """This rank's devices, group by group: the groups of one step run one after another (accumulation)."""
        per_rank, groups = self.config.engine.devices_per_rank, self.config.engine.accumulation
        return [
            [(group * self.world_size + self.rank) * per_rank + k for k in range(per_rank)] for group in range(groups)
        ]

    def route(self, task: str, step: int, device: int) -> Route:
        """The route of one device in one step: a function of (seed, step, device) and the controller."""
        if self.controller.frozen:
            return self.controller.fixed_route(task)
        noise = self.controller.noise(self.config.seed, step, device)
        tau = temperature(step, self.config.steps, self.config.controller)
        if self.config.backbone.routing == "hard":
            return self.controller.hard_route(task, noise, tau)
        return self.controller.soft_route(task, noise, tau)

    def step(self, step: int, tasks: Sequence[str], groups: Sequence[Sequence[Job]]) -> StepReport:
        """One optimizer step.

        Args:
            step: its number.
            tasks: the task of every device of all ranks, in device order.
            groups: this rank's jobs, in the order of :meth:`devices`.

        Raises:
            UserError: engine.audit found that the ranks' collectives differ.
        """
        with self.audit.step(step) if self.audit else nullcontext():
            return self._step(step, tasks, groups)

    def _step(self, step: int, tasks: Sequence[str], groups: Sequence[Sequence[Job]]) -> StepReport:
        self._set_learning_rate(learning_rate(step, self.config))
        if not self.model.training:  # it walks over every module
            self.engine.train()
        losses: list[DeviceLoss] = []
        layout = self.model.backbone.layout
        # Backward starts from the mean over the devices: what all of them use needs no more scaling.
        scale = self.loss_scale.value if self.loss_scale else 1.0 / len(tasks)
        chosen: dict[Owner, Counter[str]] = {}
        valid = np.ones(len(tasks), dtype=bool)
        with self._local_gradients():
            for number, jobs in enumerate(groups, start=1):
                if self._images_need_gradients:
                    for job in jobs:
                        job.passing.images.requires_grad_()
                loss, outcomes, routing = self.engine(jobs, scale)
                if routing is not None and layout is not None:
                    count_experts(chosen, routing.users, layout.tasks, layout.experts)
                losses.extend(outcomes)
                self._head_batches.update(job.task for job in jobs)
                valid &= self._agree(jobs, outcomes, len(tasks), chosen)
                for job in jobs:
                    if not valid[job.device] and job.passing.route.weights.requires_grad:
                        # Batch statistics couple devices: other losses reach this route too, and must not count for it.
                        job.passing.route.weights.register_hook(torch.zeros_like)
                if number == len(groups):
                    counts = usage_counts(self._distinct_owners, tasks, valid, chosen)
                    shares = divisors(counts, len(tasks), len(set(tasks)), self.config)
                    # What overflows may reach what nobody used, as nan.
                    self.reduction.begin(shares, scale, strict=bool(valid.all()) and scale <= 1.0)
                self.engine.backward(loss * scale, scale_wrt_gas=False)
            self.reduction.finish()
            norms = self._norms(valid)
            skipped = self._reason_to_skip(valid, norms, scale)
            if skipped is not None:
                counts = shares = dict.fromkeys(counts, 0)
                self._drop_gradients()
            self._norm = self._total(norms) if skipped is None else torch.zeros_like(self._norm)
        self._update(shares, skipped)
        return StepReport(losses, valid, skipped, counts, chosen, norms)

    def _update(self, shares: Mapping[Owner, int], skipped: str | None) -> None:
        """Lets the optimizers step, unless something not finite speaks against it."""
        if self.masked is not None:
            self.masked.users = lambda name: shares[self.owners[name]]
        if self.stage > 0 or skipped is None:
            self.engine.step()
        if self.loss_scale and skipped != "non_finite_loss":
            self.loss_scale.update(overflow=skipped is not None)
        self._controller_step(skipped is not None)

    def close(self) -> None:
        """Takes DeepSpeed's hooks off the model and frees its buffers; the engine is of no use afterwards."""
        self.engine.destroy()

    def average_head_buffers(self) -> None:
        """One answer for the heads' running statistics, before evaluating and saving; a collective call."""
        average_head_buffers(self.model.heads.bank, self._head_batches)
        self._head_batches.clear()

    def fragments(self) -> list[Fragment]:
        """Every parameter part that this rank owns, with its optimizer state; together the ranks own each part once."""
        optimizer = self.masked.optimizer if self.masked is not None else self.engine.optimizer
        fragments = fragments_of(self._owned(), optimizer.state if optimizer is not None else {})
        for fragment in fragments:
            fragment.shape = self.shapes[fragment.name]
        return fragments

    def load_fragments(self, whole: Callable[[str, str], Tensor], kinds: Callable[[str], list[str]]) -> None:
        """Sets parameters and optimizer state from whole, flat tensors.

        Args:
            whole: (parameter, kind) -> values; kind "master" for the parameter itself.
            kinds: parameter -> the kinds of optimizer state it has.
        """
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                self._set_parameter(parameter, whole(name, "master"))
        optimizer = self.masked.optimizer if self.masked is not None else self.engine.optimizer
        for name, start, tensor in self._owned(every_rank=True):
            values = {kind: whole(name, kind) for kind in kinds(name)}
            end = start + tensor.numel()
            with torch.no_grad():
                tensor.copy_(whole(name, "master")[start:end].view_as(tensor))
            if optimizer is not None and values:
                optimizer.state[tensor] = {
                    kind: (value if value.dim() == 0 else value[start:end].view_as(tensor)).to(tensor.device, copy=True)
                    for kind, value in values.items()
                }

    def _set_parameter(self, parameter: Any, values: Tensor) -> None:
        if self.stage < 3:
            parameter.copy_(values.view_as(parameter))
            return
        part = parameter.ds_tensor
        start = self.rank * part.numel()
        own = values[start : start + part.numel()]
        part.data.view(-1)[: own.numel()].copy_(own)

    def full_parameters(self) -> dict[str, Tensor]:
        """Every parameter by name, whole, on the CPU; a collective call where ranks hold parts."""
        if self.stage < 3:
            here = {name: p.detach().cpu().clone() for name, p in self.model.named_parameters()}
            return here if self.expert_parallel is None else self.expert_parallel.gathered(here)
        whole = {}
        for name, parameter in self.model.named_parameters():
            with import_deepspeed().zero.GatheredParameters([parameter]):
                whole[name] = parameter.detach().cpu().clone()
        return whole

    def _owned(self, every_rank: bool = False) -> list[tuple[str, int, Tensor]]:
        """The parameter parts that this rank steps, as (name, start, tensor); at stage 0 rank 0 stands for all.

        Frozen parameters, which no optimizer holds, are rank 0's, and at stage 3 every rank's in parts.
        """
        if self.masked is None:
            return [(name, 0, p) for name, p in self.model.named_parameters() if every_rank or self._stands_for(p)]
        owned = [(segment.name, segment.start, view) for segment, view in self.masked.views]
        if self.stage < 3:
            return owned + [(name, 0, p) for name, p in self.frozen if self._stands_for(p)]
        for name, parameter in self.frozen:
            part = parameter.ds_tensor.data.view(-1)
            start = self.rank * part.numel()
            own = part[: max(0, min(part.numel(), parameter.ds_numel - start))]
            if own.numel():
                owned.append((name, start, own))
        return owned

    def _stands_for(self, parameter: Any) -> bool:
        """Whether this rank stands for all that hold the same parameter: the first of them does."""
        return dist.get_rank(self._peers(parameter)) == 0

    @contextmanager
    def _local_gradients(self) -> Iterator[None]:
        """DeepSpeed leaves gradients alone inside; on exit it partitions them."""
        if self.stage == 0:
            yield
        else:
            with self.engine.coalesce_grad_reduction():
                yield

    def _agree(
        self, jobs: Sequence[Job], outcomes: Sequence[DeviceLoss], num_devices: int, chosen: dict[Owner, Counter[str]]
    ) -> np.ndarray:
        """Which of all devices gave a finite loss and finite gradients, (devices,): the same answer on every rank.

        Where each runs one unit of a layer, the same message says which: their users are added to ``chosen``.
        """
        names = list(self.controller.logits)
        bad = torch.zeros(num_devices)
        ran = torch.zeros(len(names), *self.controller.mask.shape) if self._choices else torch.zeros(0)
        for job, outcome in zip(jobs, outcomes, strict=True):
            bad[job.device] = float(not outcome.finite)
            if outcome.finite and self._choices:
                path = torch.tensor(job.passing.route.path)
                ran[names.index(job.task), torch.arange(len(path)), path] += 1.0
        shared = torch.cat([bad, ran.flatten()]).to(self.device)
        if self.world_size > 1:
            dist.all_reduce(shared)
        told = shared.cpu().numpy()
        count_units(chosen, told[num_devices:].reshape(ran.shape), names, self._choices)
        return told[:num_devices] == 0

    def _norms(self, valid: np.ndarray) -> list[tuple[Owner, Tensor]]:
        """See :attr:`StepReport.norms`; none where no device contributes."""
        if not valid.any():
            return []
        held = [(p.grad, owner) for p, owner in self.parameters if p.grad is not None]
        norms = torch._foreach_norm([gradient for gradient, _ in held])
        return [(owner, norm) for (_, owner), norm in zip(held, norms, strict=True)]

    def _total(self, norms: Sequence[tuple[Owner, Tensor]]) -> Tensor:
        """The norm of the whole gradient: a collective call where experts are spread over ranks."""
        if self.expert_parallel is not None:
            return self.expert_parallel.total_norm(norms)
        return torch.linalg.vector_norm(torch.stack([norm for _, norm in norms]))

    def _reason_to_skip(self, valid: np.ndarray, norms: Sequence[tuple[Owner, Tensor]], scale: float) -> str | None:
        """Why this step must change nothing, if so: the same answer on every rank."""
        if not valid.any():
            return "non_finite_loss"
        bad = ~torch.isfinite(torch.stack([norm for _, norm in norms])).all()
        if self.expert_parallel is not None:  # otherwise all ranks hold the same sums: an all-reduce makes each once
            agreed = bad.float()
            dist.all_reduce(agreed)
            bad = agreed > 0
        if not bad:
            return None
        return "loss_scale_overflow" if scale > 1.0 else "non_finite_gradient"

    def _controller_step(self, skipped: bool) -> None:
        """Adam step of the controller rows, whose gradients are task averages by now."""
        gradients = [row.grad for row, _ in self._rows() if row.grad is not None]
        if gradients and not skipped and torch.isfinite(torch.stack(gradients)).all():
            self.controller_optimizer.step()
        self.controller_optimizer.zero_grad()

    def _set_learning_rate(self, value: float) -> None:
        for group in self.engine.optimizer.param_groups:
            group["lr"] = value
