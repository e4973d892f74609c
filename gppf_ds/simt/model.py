"""The network of a SIMT step: one backbone, one head per task, and the devices of this rank that pass through them."""

from __future__ import annotations

import difflib
import fnmatch
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gppf_ds.backbone.lego import LegoBackbone, Pass
from gppf_ds.backbone.moe.statistics import Routing, routing_of
from gppf_ds.backbone.norm import BatchNormRule, NormPolicy
from gppf_ds.errors import UserError
from gppf_ds.seeding import FORWARD, seed_global_generators
from gppf_ds.tasks.task import Batch, Head

HEAD_STREAM = "head"
"""Stands for the head where a lego layer would give its index, in the key of a device's randomness."""


@dataclass
class Job:
    """What one device does in one step."""

    device: int
    task: str
    batch: Batch
    passing: Pass


@dataclass
class DeviceLoss:
    """The outcome of one device's head."""

    terms: dict[str, float]
    """Loss terms as the head named them, unweighted."""
    finite: bool
    """Whether the loss and the norm of every gradient the head produced are finite."""


class HeadBank(nn.Module):
    """The heads of all tasks behind one module, so that ZeRO-3 gathers them as one.

    Heads run forward and backward here, one device after another, against detached features. What they leave is their
    gradients, which :class:`_StoredGradients` hands to autograd as if the heads stood in the graph. So a device whose
    loss or gradients are not finite is known, and its share dropped, before anything has been mixed; activations of
    one head are freed before the next starts; and the graph that DeepSpeed sees has the same shape on every rank.
    """

    def __init__(self, heads: Mapping[str, Head], loss_weights: Mapping[str, float]) -> None:
        super().__init__()
        self.bank = nn.ModuleDict(heads)
        self.loss_weights = dict(loss_weights)

    def forward(self, jobs: Sequence[Job], loss_scale: float, *maps: Tensor) -> tuple[Tensor, list[DeviceLoss]]:
        """The sum of the weighted losses of all finite devices, differentiable, and the outcome of each device.

        Args:
            jobs: this rank's devices.
            loss_scale: that backward will start from: the heads' gradients are computed scaled by it.
            maps: the feature maps of the first device, then those of the second, ...
        """
        taps = len(maps) // len(jobs)
        learning = {
            name: [p for p in self.bank[name].parameters() if p.requires_grad]
            for name in sorted({job.task for job in jobs})
        }
        parameters = [p for own in learning.values() for p in own]
        sums: dict[Tensor, Tensor] = {}
        feature_grads: list[Tensor | None] = []
        outcomes: list[DeviceLoss] = []
        total = maps[0].new_zeros((), dtype=torch.float32)
        for number, job in enumerate(jobs):
            own = maps[number * taps : (number + 1) * taps]
            head_parameters = learning[job.task]
            loss, outcome, grads = self._run(job, own, head_parameters, loss_scale)
            outcomes.append(outcome)
            if outcome.finite:
                total = total + loss
                for parameter, grad in zip(head_parameters, grads, strict=False):
                    if grad is not None:
                        sums[parameter] = sums[parameter] + grad if parameter in sums else grad
            map_grads = [grad if outcome.finite else None for grad in grads[len(head_parameters) :]]
            if map_grads[-1] is None:  # backward has to pass every layer, whatever the head reads
                map_grads[-1] = torch.zeros_like(own[-1])
            feature_grads += map_grads
        stored = feature_grads + [sums[p] if p in sums else torch.zeros_like(p) for p in parameters]
        return _StoredGradients.apply(total, stored, *maps, *parameters), outcomes

    def _run(
        self, job: Job, maps: Sequence[Tensor], parameters: Sequence[Tensor], loss_scale: float
    ) -> tuple[Tensor, DeviceLoss, Sequence[Tensor | None]]:
        """Loss, outcome, and the scaled gradients of the head's parameters followed by those of the features."""
        seed, step, device = job.passing.key
        seed_global_generators(seed, FORWARD, step, device, HEAD_STREAM)
        buffers = list(self.bank[job.task].buffers())
        before = [buffer.clone() for buffer in buffers]
        leaves = [x.detach().requires_grad_() for x in maps]
        with torch.enable_grad():
            terms = self.bank[job.task].loss(leaves, job.batch.targets)  # type: ignore[operator]
            loss = torch.stack([term.float() for term in terms.values()]).sum() * self.loss_weights[job.task]
            inputs = [*parameters, *leaves]
            grads = torch.autograd.grad(loss, inputs, torch.full_like(loss, loss_scale), allow_unused=True)
        # A scaled gradient that overflows is the loss scaler's business: it must see it to lower the scale.
        checked = [grad for grad in grads if grad is not None and grad.numel()] if loss_scale <= 1.0 else []
        norms = torch._foreach_norm([loss.detach(), *checked])
        # One wait for the device, not one for each number.
        numbers = torch.stack([value.detach().float() for value in (*terms.values(), *norms)]).tolist()
        finite = all(map(math.isfinite, numbers[len(terms) :]))
        outcome = DeviceLoss(dict(zip(terms, numbers, strict=False)), finite)
        if not outcome.finite:  # running statistics must not keep what made it so
            for buffer, value in zip(buffers, before, strict=True):
                buffer.copy_(value)
        return loss.detach(), outcome, grads


class _StoredGradients(torch.autograd.Function):
    """A loss whose gradients with respect to its inputs are known already, scaled as backward will be."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, stored: list[Tensor | None], *inputs: Tensor) -> Tensor:
        ctx.stored = stored
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor | None, ...]:
        stored, ctx.stored = ctx.stored, None  # so that autograd may keep the tensors rather than copy them
        return (None, None, *stored)


def learns(name: str, patterns: Sequence[str]) -> bool:
    """Whether a parameter of this name is among those that ``trainable`` lets learn; no patterns: all are."""
    return not patterns or any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _rest(module: nn.Module) -> None:
    """Evaluation mode for the largest submodules that have parameters, none of which learns."""
    parameters = list(module.parameters())
    if parameters and not any(parameter.requires_grad for parameter in parameters):
        module.eval()
        return
    for child in module.children():
        _rest(child)


class SimtModel(nn.Module):
    """Backbone and heads; what the DeepSpeed engine holds."""

    def __init__(
        self,
        backbone: LegoBackbone,
        heads: Mapping[str, Head],
        loss_weights: Mapping[str, float],
        batch_norm: BatchNormRule | None = None,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.heads = HeadBank(heads, loss_weights)
        self.batch_norm = batch_norm or NormPolicy()
        self._partly_frozen = False
        self._moe_layers = backbone.moe_layers()

    def freeze_all_but(self, patterns: Sequence[str]) -> None:
        """Only parameters whose names fit a pattern (with * and ?) learn from now on.

        A module none of whose parameters learns stays in evaluation mode, so that its batch norms use, and keep, their
        running statistics.

        Raises:
            UserError: a pattern fits no parameter.
        """
        names = [name for name, _ in self.named_parameters()]
        for pattern in patterns:
            if not fnmatch.filter(names, pattern):
                near = difflib.get_close_matches(pattern, names, 1)
                raise UserError(
                    f"trainable: no parameter's name fits {pattern!r}" + (f" (there is {near[0]})." if near else ".")
                )
        for name, parameter in self.named_parameters():
            if not learns(name, patterns):
                parameter.requires_grad_(False)
        self._partly_frozen = True
        self.train(self.training)

    def train(self, mode: bool = True) -> SimtModel:
        """As in torch, save that what does not learn stays in evaluation mode."""
        super().train(mode)
        if mode and self._partly_frozen:
            _rest(self)
        return self

    def forward(self, jobs: Sequence[Job], loss_scale: float = 1.0) -> tuple[Tensor, list[DeviceLoss], Routing | None]:
        """Runs this rank's devices through backbone and heads; see :meth:`HeadBank.forward`.

        Where tokens choose experts, their losses are in the sum, and what all devices of all ranks chose comes along:
        a collective call.
        """
        features = self.backbone([job.passing for job in jobs], self.batch_norm)
        loss, outcomes = self.heads(jobs, loss_scale, *(x for maps in features for x in maps))
        if not self._moe_layers:
            return loss, outcomes, None
        own = [(job.task, job.passing.statistics) for job, done in zip(jobs, outcomes, strict=True) if done.finite]
        routing = routing_of(self._moe_layers, list(self.backbone.layout.tasks), own, self.backbone.config.moe)  # type: ignore[union-attr,arg-type]
        return loss + routing.loss, outcomes, routing

    @torch.no_grad()
    def predict(self, task: str, batch: Batch, passing: Pass) -> list[Any]:
        """One task's predictions for one batch, without any collective."""
        features = self.backbone([passing], self.batch_norm)[0]
        return self.heads.bank[task].predict(features, batch.targets)  # type: ignore[operator]
