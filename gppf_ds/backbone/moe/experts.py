"""Rows through their experts' linear layers: in one grouped kernel where there is one, else expert after expert."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.torch_version import TorchVersion

from gppf_ds.backbone.moe.dispatch import Dispatch

ALIGNMENT = 16
"""Bytes, of every row that the grouped kernel reads."""


def linear(layers: Sequence[nn.Linear], rows: Tensor, dispatch: Dispatch) -> Tensor:
    """Every row through its expert's layer, in autocast's dtype if that is on.

    Args:
        layers: (C -> C') of every expert, all with a bias or all without.
        rows: (n k, C).
        dispatch: of the rows.

    Returns:
        (n k, C'), zeros for padding.
    """
    return grouped_linear(layers, rows, dispatch) if one_kernel(layers, rows) else looped_linear(layers, rows, dispatch)


def one_kernel(layers: Sequence[nn.Linear], rows: Tensor) -> bool:
    """Whether the device multiplies the rows of all these layers in one kernel, in the dtype at hand."""
    dtype = _compute_dtype(rows)
    if not rows.is_cuda or dtype != torch.bfloat16 or not has_kernel(torch.cuda.get_device_capability(rows.device)):
        return False
    return not any(width * dtype.itemsize % ALIGNMENT for width in layers[0].weight.shape)


@cache
def has_kernel(capability: tuple[int, int], version: str = torch.__version__) -> bool:
    """Whether torch has the grouped kernel for a GPU of this compute capability.

    Releases before 2.8 have none, 2.8 refuses all GPUs but Hopper's, 2.9 and later take Ampere's and newer ones.
    """
    release = TorchVersion(version)
    if release < "2.9":
        return release >= "2.8" and capability[0] == 9
    return capability >= (8, 0)


def _compute_dtype(x: Tensor) -> torch.dtype:
    """In which matrix products of x run."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def grouped_linear(layers: Sequence[nn.Linear], rows: Tensor, dispatch: Dispatch) -> Tensor:
    """:func:`linear` in one kernel, which waits for nothing; an expert without rows gets gradients of zero.

    The kernel leaves rows behind those of the last expert as they were in memory, in its backward too: so rows of
    padding are cleared before it, which clears their gradients, and behind it.
    """
    dtype = _compute_dtype(rows)
    if dispatch.padded:
        rows = rows.masked_fill(dispatch.is_padding, 0)
    weight = torch.stack([layer.weight for layer in layers]).to(dtype)
    out = torch._grouped_mm(rows.to(dtype), weight.transpose(-1, -2), offs=dispatch.ends)
    if layers[0].bias is not None:
        # A product rather than a look-up: its backward is a product too, not a sum in an order of chance.
        bias = torch.stack([layer.bias for layer in layers]).to(dtype)
        out = torch.addmm(out, dispatch.membership.to(dtype), bias)
    return out.masked_fill(dispatch.is_padding, 0) if dispatch.padded else out


def looped_linear(layers: Sequence[nn.Linear], rows: Tensor, dispatch: Dispatch) -> Tensor:
    """:func:`linear` by one product for each expert; an expert without rows gets no gradients. Waits for the counts."""
    dtype = _compute_dtype(rows)
    weights = [layer.weight.to(dtype) for layer in layers]
    biases = [] if layers[0].bias is None else [layer.bias.to(dtype) for layer in layers]
    return _Looped.apply(dispatch.sizes, rows.to(dtype), *weights, *biases)


class _Looped(torch.autograd.Function):
    """Products that write where their rows lie: with split and cat a fifth of the time would go into copies."""

    @staticmethod
    def forward(ctx: Any, sizes: Sequence[int], rows: Tensor, *parameters: Tensor) -> Tensor:
        weights, biases = parameters[: len(sizes)], parameters[len(sizes) :]
        ctx.sizes = sizes
        ctx.save_for_backward(rows, *weights)
        out = rows.new_empty(len(rows), len(weights[0]))
        for slot, (start, end) in _used(sizes):
            if biases:
                torch.addmm(biases[slot], rows[start:end], weights[slot].t(), out=out[start:end])
            else:
                torch.mm(rows[start:end], weights[slot].t(), out=out[start:end])
        out[sum(sizes) :] = 0
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        rows, *weights = ctx.saved_tensors
        grad, needed = grads[0], ctx.needs_input_grad[1:]
        experts = len(weights)
        parameters: list[Tensor | None] = [None] * (len(needed) - 1)
        inputs = torch.empty_like(rows) if needed[0] else None
        for slot, (start, end) in _used(ctx.sizes):
            own = grad[start:end]
            if inputs is not None:
                torch.mm(own, weights[slot], out=inputs[start:end])
            if needed[1 + slot]:
                parameters[slot] = own.t() @ rows[start:end]
            if len(parameters) > experts and needed[1 + experts + slot]:
                parameters[experts + slot] = own.sum(0)
        if inputs is not None:
            inputs[sum(ctx.sizes) :] = 0
        return None, inputs, *parameters


def _used(sizes: Sequence[int]) -> list[tuple[int, tuple[int, int]]]:
    """(slot, (start, end)) of the experts that have rows."""
    ends = accumulate(sizes)
    return [(slot, (end - size, end)) for slot, (size, end) in enumerate(zip(sizes, ends, strict=True)) if size]
