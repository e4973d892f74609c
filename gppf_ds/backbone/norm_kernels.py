"""The passes that batch norm takes over a map: the CUDA kernels of torch's SyncBatchNorm on a GPU, others on a CPU.

SyncBatchNorm's have no CPU version. Torch's ordinary backward kernel does not serve on a GPU: it wants statistics saved
by its own forward pass where maps are channels-last, and gives a gradient in the other order.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from gppf_ds.backbone.memory_format import memory_format


class BackwardSums(NamedTuple):
    """What one device adds to the sums of backward."""

    grad: Tensor
    """Of the output, laid out as the input; on a CPU that of the input already where statistics are given."""
    dot: Tensor
    """Sum of the output's gradient times the normalised input, (C,): the gradient of the weight."""
    dy: Tensor
    """Sum of the output's gradient, (C,): the gradient of the bias."""
    inverse: Tensor
    """1 / sigma of the statistics that the input was normalised with, (C,)."""


def fused(x: Tensor) -> bool:
    """Whether SyncBatchNorm's kernels can take a map."""
    return x.is_cuda


def dense(x: Tensor) -> Tensor:
    """A map (B, C, *spatial) in one of the orders that kernels exist for: as it is, or copied."""
    return x.contiguous(memory_format=memory_format(x))


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of a map, fp32, (C,) each, in two passes: nothing cancels where |mean| >> deviation."""
    # On a CPU 16 bits in would be 16 bits out.
    return torch.batch_norm_update_stats(x if fused(x) else x.float(), None, None, 0.0)


def backward_sums(grad: Tensor, x: Tensor, mean: Tensor, variance: Tensor, weight: Tensor, eps: float) -> BackwardSums:
    """The first pass of backward.

    Args:
        grad: of the output, like ``x``.
        x: the input (B, C, *spatial), of :func:`dense`.
        mean, variance: that it was normalised with, fp32, (C,).
        weight: (C,).
        eps: of the norm.
    """
    grad = grad.to(x.dtype)
    if fused(x):
        grad = grad.contiguous(memory_format=memory_format(x))
        inverse = torch.rsqrt(variance + eps)
        dy, centred, _, _ = torch.batch_norm_backward_reduce(grad, x, mean, inverse, weight, True, True, True)
        return BackwardSums(grad, centred * inverse, dy, inverse)
    # With given statistics ("evaluation mode") the kernel returns dy * w / sigma, sum(dy * xhat), sum(dy).
    direct, dot, dy = torch.ops.aten.native_batch_norm_backward(
        grad, x, weight, mean, variance, None, None, False, eps, [True, True, True]
    )
    return BackwardSums(direct, dot, dy, torch.rsqrt(variance.double() + eps))


def input_gradient(own: BackwardSums, x: Tensor, mean: Tensor, weight: Tensor, sums: Tensor) -> Tensor:
    """The second pass: w / sigma * (grad - dy - xhat * dot).

    Args:
        own: of the first.
        x, mean, weight: as in the first.
        sums: dot and dy of all devices, times the weight of one element in the statistics, float64, (2 C,).
    """
    if fused(x):
        dot, dy = sums.float().chunk(2)
        one = torch.ones(1, dtype=torch.int32, device=x.device)  # the kernel divides sums by counts; ours are divided
        return torch.batch_norm_backward_elemt(
            own.grad, x, mean, own.inverse, weight.to(mean.dtype), dy, dot / own.inverse, one
        )
    dot, dy = sums.chunk(2)
    # Written as direct - (offset + slope * x), an affine map per channel: a batch norm with mean 0 and variance 1.
    scale = weight * own.inverse
    slope = scale * own.inverse * dot
    offset = scale * dy - slope * mean
    zero, unit = torch.zeros_like(mean), torch.ones_like(mean)
    return own.grad.sub_(torch.batch_norm(x, slope.float(), offset.float(), zero, unit, False, 0.0, 0.0, False))
