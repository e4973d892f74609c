"""Cross-task batch normalisation: statistics over every device of the step, whatever its task or input shape.

GPPF section 3.2 trains batch-norm backbones only with statistics that mix the tasks (without them it diverges, section
4.2). The devices of one rank, and the units of one lego layer, go through each position together, so that one position
costs one all-reduce forward and one backward, of the same size on every rank in soft and in hard mode.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
    *outputs, pooled = _CrossTaskBatchNorm.apply(plan, *affine, *[x for _, x in lanes])
    if not _recomputing():
        for norm, row in zip(norms, pooled, strict=True):
            if norm.training:
                _update_running_statistics(norm, row)
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


class _CrossTaskBatchNorm(torch.autograd.Function):
    """Rows of the pooled statistics: sum of w*mean, sum of w*E[x^2] (C each), sum of w, number of elements; float64."""

    @staticmethod
    def forward(ctx: Any, plan: _Plan, *tensors: Tensor) -> tuple[Tensor, ...]:
        affine, xs = tensors[: 2 * len(plan.used)], [dense(x) for x in tensors[2 * len(plan.used) :]]
        channels = xs[0].shape[1]
        local = [_statistics(x, plan.policy.share(x)) for x in xs]
        pooled = torch.zeros(plan.num_slots, 2 * channels + 2, dtype=torch.float64, device=xs[0].device)
        for slot, row in zip(plan.slots, local, strict=True):
            if slot not in plan.frozen:
                pooled[slot] += row
        _all_reduce(pooled, plan.policy.group)

        outputs, means, variances, shares = [], [], [], []
        for slot, x, own in zip(plan.slots, xs, local, strict=True):
            row = pooled[slot] if plan.policy.synchronise else own
            mean, variance = _running(plan.frozen[slot]) if slot in plan.frozen else _moments(row)
            weight, bias = affine[2 * plan.used.index(slot) : 2 * plan.used.index(slot) + 2]
            outputs.append(nn.functional.batch_norm(x, mean, variance, weight, bias, False, 0.0, plan.eps))
            means.append(mean)
            variances.append(variance)
            # The weight of one element of this lane in the statistics that it was normalised with.
            share = plan.policy.share(x) * channels / x.numel() / row[-2]
            shares.append(torch.zeros_like(share) if slot in plan.frozen else share)
        ctx.save_for_backward(*affine, *xs, *means, *variances, torch.stack(shares))
        ctx.plan = plan
        ctx.mark_non_differentiable(pooled)
        return (*outputs, pooled)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        plan: _Plan = ctx.plan
        *saved, shares = ctx.saved_tensors
        count = len(plan.slots)
        affine, xs = saved[: 2 * len(plan.used)], saved[2 * len(plan.used) : -2 * count]
        means, variances = saved[-2 * count : -count], saved[-count:]
        channels = xs[0].shape[1]

        pooled = torch.zeros(plan.num_slots, 2 * channels, dtype=torch.float64, device=xs[0].device)
        affine_grads = [torch.zeros_like(tensor) for tensor in affine]
        found, own_sums = [], []
        for slot, x, mean, variance, grad in zip(plan.slots, xs, means, variances, grads[:-1], strict=True):
            index = 2 * plan.used.index(slot)
            sums = backward_sums(grad, x, mean, variance, affine[index], plan.eps)
            affine_grads[index] += sums.dot
            affine_grads[index + 1] += sums.dy
            own = torch.cat([sums.dy, sums.dot]).double()
            pooled[slot] += own
            found.append(sums.grad)
            own_sums.append(own)
        if plan.policy.synchronise:
            _all_reduce(pooled, plan.policy.group)

        x_grads = []
        for lane, (slot, x, grad) in enumerate(zip(plan.slots, xs, found, strict=True)):
            weight = affine[2 * plan.used.index(slot)]
            dy, dot = (shares[lane] * (pooled[slot] if plan.policy.synchronise else own_sums[lane])).chunk(2)
            x_grads.append(input_gradient(grad, x, means[lane], variances[lane], weight, plan.eps, dy, dot))
        return (None, *affine_grads, *x_grads)


def _statistics(x: Tensor, share: float) -> Tensor:
    """One device's row."""
    mean, variance = (values.double() for values in moments(x))
    # Filled on the device: numbers from the host would have to be waited for, at every norm.
    weights = [mean.new_full((1,), number) for number in (share, x.numel() / x.shape[1])]
    return torch.cat([share * mean, share * (variance + mean * mean), *weights])


def _moments(row: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance, fp32, (C,) each. float64 sums leave 1e-16 * mean^2 of rounding in the variance."""
    channels = (len(row) - 2) // 2
    mean = row[:channels] / row[-2]
    variance = (row[channels:-2] / row[-2] - mean * mean).clamp_(min=0)
    return mean.float(), variance.float()


def _running(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    assert norm.running_mean is not None
    assert norm.running_var is not None
    return norm.running_mean, norm.running_var


@torch.no_grad()
def _update_running_statistics(norm: nn.BatchNorm2d, row: Tensor) -> None:
    """torch's exponential average, with the unbiased variance; left alone where no finite element came."""
    if norm.running_mean is None or norm.running_var is None or norm.num_batches_tracked is None:
        return
    mean, variance = _moments(row)
    elements = row[-1]
    used = (elements > 1) & torch.isfinite(row).all()
    momentum = _momentum(norm)
    unbiased = variance * (elements / (elements - 1)).float()
    norm.running_mean.copy_(torch.where(used, norm.running_mean.lerp(mean, momentum), norm.running_mean))
    norm.running_var.copy_(torch.where(used, norm.running_var.lerp(unbiased, momentum), norm.running_var))
    norm.num_batches_tracked += used


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
