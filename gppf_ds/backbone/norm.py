"""Cross-task batch normalisation: statistics over every device of the step, whatever its task or input shape.

GPPF section 3.2 trains batch-norm backbones only with statistics that mix the tasks (without them it diverges, section
4.2). The devices of one rank, and the units of one lego layer, go through each position together, so that one position
costs one all-reduce forward and one backward, of the same size on every rank in soft and in hard mode.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gppf_ds.backbone.norm_kernels import backward_sums, dense, input_gradient, moments

Weighting = Literal["element", "device", "sample"]
BatchNormRule = Callable[[Sequence[nn.BatchNorm2d], Sequence[tuple[int, Tensor]]], list[Tensor]]
"""How batch norms are computed in training: (norms, lanes) -> outputs, see :func:`cross_task_batch_norm`."""


@dataclass(frozen=True)
class NormPolicy:
    """How batch norms of the backbone are computed in training.

    Attributes:
        weighting: what counts once in the pooled statistics: an element of the map, a device, or an image.
        synchronise: normalise with the pooled statistics, or each device with its own (the ablation). Running
            statistics are pooled either way, so that all ranks hold the same buffers.
        group: the process group of all ranks that hold devices.
    """

    weighting: Weighting = "element"
    synchronise: bool = True
    group: dist.ProcessGroup | None = None

    def share(self, x: Tensor) -> float:
        """The weight of one device's map (B, C, *spatial) in the pooled statistics."""
        return {"element": x.numel() / x.shape[1], "device": 1.0, "sample": float(x.shape[0])}[self.weighting]

    def __call__(self, norms: Sequence[nn.BatchNorm2d], lanes: Sequence[tuple[int, Tensor]]) -> list[Tensor]:
        """:func:`cross_task_batch_norm` with this policy: a policy is a :data:`BatchNormRule`."""
        return cross_task_batch_norm(norms, lanes, self)


def cross_task_batch_norm(
    norms: Sequence[nn.BatchNorm2d], lanes: Sequence[tuple[int, Tensor]], policy: NormPolicy
) -> list[Tensor]:
    """Normalises each lane with the pooled statistics of its norm, and updates the running statistics of all norms.

    Args:
        norms: the batch norms at one position of a lego layer, one for each unit (the slots).
        lanes: (slot, x) with x (B, C, *spatial), for every unit that this rank runs on every one of its devices.
        policy: see :class:`NormPolicy`.

    Returns:
        The normalised maps, lane by lane. A norm that no lane of any rank uses keeps its running statistics; one in
        evaluation mode (of a frozen unit) normalises with them.
    """
    if _alone(norms, [slot for slot, _ in lanes], policy):
        return [_by_torch(norms[slot], x) for slot, x in lanes]
    return pooled_batch_norm(norms, lanes, policy)


def pooled_batch_norm(
    norms: Sequence[nn.BatchNorm2d], lanes: Sequence[tuple[int, Tensor]], policy: NormPolicy
) -> list[Tensor]:
    """:func:`cross_task_batch_norm` of several ranks, also where one has all devices: with 16 bits to the last bit."""
    slots = [slot for slot, _ in lanes]
    used = sorted(set(slots))
    affine = [tensor for slot in used for tensor in (norms[slot].weight, norms[slot].bias)]
    frozen = {slot: norms[slot] for slot in used if not norms[slot].training}
    plan = _Plan(policy, norms[0].eps, len(norms), slots, used, frozen)
    *outputs, pooled, found = _CrossTaskBatchNorm.apply(plan, *affine, *[x for _, x in lanes])
    if not _recomputing():
        _update_running_statistics(norms, pooled, found)
    return outputs


def _alone(norms: Sequence[nn.BatchNorm2d], slots: Sequence[int], policy: NormPolicy) -> bool:
    """Whether each norm that runs has one device of one rank: there is nothing to pool."""
    ranks = dist.get_world_size(policy.group) if dist.is_initialized() else 1
    single = ranks == 1 and len(set(slots)) == len(slots)
    # Without synchronisation a device's numbers are to be the same bit for bit, whoever stands beside it.
    return single and policy.synchronise and all(norms[slot].training for slot in slots)


def _by_torch(norm: nn.BatchNorm2d, x: Tensor) -> Tensor:
    """torch's own batch norm: fewer passes over the map than with pooled statistics. Running statistics as below."""
    old_mean, old_variance, count = norm.running_mean, norm.running_var, norm.num_batches_tracked
    mean, variance = (None if values is None else values.clone() for values in (old_mean, old_variance))
    out = torch.batch_norm(x, norm.weight, norm.bias, mean, variance, True, _momentum(norm), norm.eps, True)
    if old_mean is None or old_variance is None or count is None or _recomputing():
        return out
    assert mean is not None
    assert variance is not None
    with torch.no_grad():
        used = (mean.isfinite() & variance.isfinite()).all()
        old_mean.copy_(torch.where(used, mean, old_mean))
        old_variance.copy_(torch.where(used, variance, old_variance))
        count += used
    return out


@dataclass(frozen=True)
class _Plan:
    policy: NormPolicy
    eps: float
    num_slots: int
    slots: list[int]
    used: list[int]
    frozen: dict[int, nn.BatchNorm2d]

    @property
    def places(self) -> Sequence[int]:
        """For every lane the row of the statistics that it is normalised with."""
        return self.slots if self.policy.synchronise else range(len(self.slots))


class _CrossTaskBatchNorm(torch.autograd.Function):
    """Rows of the pooled statistics: sum of w*mean, sum of w*E[x^2] (C each), sum of w, number of elements; float64.

    What is small is computed for all lanes or slots at once, for on a GPU every operation is a launch.
    """

    @staticmethod
    def forward(ctx: Any, plan: _Plan, *tensors: Tensor) -> tuple[Tensor, ...]:
        affine, xs = tensors[: 2 * len(plan.used)], [dense(x) for x in tensors[2 * len(plan.used) :]]
        local = _statistics(xs, plan.policy)
        pooled = _by_slot(plan, local, plan.frozen)
        _all_reduce(pooled, plan.policy.group)
        pooled_moments = _moments(pooled)
        rows, found = (pooled, pooled_moments) if plan.policy.synchronise else (local, _moments(local))

        outputs, means, variances = [], [], []
        for slot, place, x in zip(plan.slots, plan.places, xs, strict=True):
            mean, variance = _running(plan.frozen[slot]) if slot in plan.frozen else found[place]
            weight, bias = affine[2 * plan.used.index(slot) : 2 * plan.used.index(slot) + 2]
            outputs.append(nn.functional.batch_norm(x, mean, variance, weight, bias, False, 0.0, plan.eps))
            means.append(mean)
            variances.append(variance)
        ctx.save_for_backward(*affine, *xs, *means, *variances, rows[:, -2:-1])
        ctx.plan = plan
        ctx.mark_non_differentiable(pooled, pooled_moments)
        return (*outputs, pooled, pooled_moments)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        plan: _Plan = ctx.plan
        *saved, totals = ctx.saved_tensors
        count = len(plan.slots)
        affine, xs = saved[: 2 * len(plan.used)], saved[2 * len(plan.used) : -2 * count]
        means, variances = saved[-2 * count : -count], saved[-count:]
        weights = [affine[2 * plan.used.index(slot)] for slot in plan.slots]

        lanes = zip(grads[:-2], xs, means, variances, weights, strict=True)
        sums = [backward_sums(*lane, plan.eps) for lane in lanes]
        own = torch.stack([part for lane in sums for part in (lane.dot, lane.dy)]).double().view(count, -1)
        pooled = _by_slot(plan, own)
        parts = pooled.to(affine[0].dtype).unflatten(1, (2, -1))
        affine_grads = [part for slot in plan.used for part in parts[slot]]
        if plan.policy.synchronise:
            _all_reduce(pooled, plan.policy.group)

        rows = (pooled if plan.policy.synchronise else own) / totals
        x_grads = []
        for lane, (slot, place, x) in enumerate(zip(plan.slots, plan.places, xs, strict=True)):
            # The weight of one element of this lane in the statistics that it was normalised with.
            share = plan.policy.share(x) * x.shape[1] / x.numel()
            row = torch.zeros_like(rows[place]) if slot in plan.frozen else rows[place] * share
            x_grads.append(input_gradient(sums[lane], x, means[lane], weights[lane], row))
        return (None, *affine_grads, *x_grads)


def _statistics(xs: Sequence[Tensor], policy: NormPolicy) -> Tensor:
    """The devices' rows, (lanes, 2 C + 2)."""
    found = torch.stack([values for x in xs for values in moments(x)])
    # Filled where they are: numbers from the host would have to be waited for.
    rows = torch.ones(len(xs), 2 * found.shape[1] + 2, dtype=torch.float64, device=found.device)
    mean, square = rows[:, :-2].unflatten(1, (2, -1)).copy_(found.unflatten(0, (-1, 2))).unbind(1)
    square.addcmul_(mean, mean)
    if policy.weighting != "element":
        for row, x in zip(rows, xs, strict=True):
            row[-1] = x.numel() / x.shape[1] / policy.share(x)
    torch._foreach_mul_(list(rows.unbind(0)), [policy.share(x) for x in xs])
    return rows


def _by_slot(plan: _Plan, rows: Tensor, but: Collection[int] = ()) -> Tensor:
    """Sums over the lanes of each slot, (slots, n) of (lanes, n); zeros for the slots in ``but``."""
    pooled = rows.new_zeros(plan.num_slots, rows.shape[1])
    for slot, row in zip(plan.slots, rows, strict=True):
        if slot not in but:
            pooled[slot].add_(row)
    return pooled


def _moments(rows: Tensor) -> Tensor:
    """Mean and biased variance of every row, fp32, (rows, 2, C); what no element came to is not a number.

    float64 sums leave 1e-16 * mean^2 of rounding in the variance.
    """
    found = (rows[:, :-2] / rows[:, -2:-1]).unflatten(1, (2, -1))
    mean, square = found.unbind(1)
    square.addcmul_(mean, mean, value=-1).clamp_(min=0)
    return found.float()


def _running(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    assert norm.running_mean is not None
    assert norm.running_var is not None
    return norm.running_mean, norm.running_var


@torch.no_grad()
def _update_running_statistics(norms: Sequence[nn.BatchNorm2d], pooled: Tensor, found: Tensor) -> None:
    """torch's exponential average, with the unbiased variance; left alone where no finite element came."""
    elements = pooled[:, -1]
    used = (elements > 1) & (pooled.abs().sum(1) < math.inf)
    new = found.clone()
    new[:, 1].mul_((elements / (elements - 1)).float().unsqueeze(1))
    new.nan_to_num_(0, 0, 0)  # by a weight of 0 it moves nothing
    for slot, norm in enumerate(norms):
        if norm.running_mean is None or norm.running_var is None or norm.num_batches_tracked is None:
            continue
        if norm.training:
            weight = used[slot] * _momentum(norm)
            norm.running_mean.lerp_(new[slot, 0], weight)
            norm.running_var.lerp_(new[slot, 1], weight)
            norm.num_batches_tracked += used[slot]


def _momentum(norm: nn.BatchNorm2d) -> float:
    if norm.momentum is None and norm.num_batches_tracked is not None:
        return 1.0 / float(norm.num_batches_tracked + 1)
    return norm.momentum or 0.0


def _all_reduce(tensor: Tensor, group: dist.ProcessGroup | None) -> None:
    if dist.is_initialized() and dist.get_world_size(group) > 1:
        dist.all_reduce(tensor, group=group)


def _recomputing() -> bool:
    """Whether activation checkpointing is re-running a forward inside backward."""
    return torch._C._current_graph_task_id() != -1
