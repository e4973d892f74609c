"""Tokens sorted by the experts that they chose, and their way back: dropless, without a capacity."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class Dispatch:
    """Who goes where. A row is one choice of one token, and rows are sorted by expert; those of padding come last.

    Nothing here waits for the device but :attr:`sizes`, and every sum has a fixed order.

    Args:
        choices: (n, k), the experts that every token chose, as positions among the layer's experts; ``experts`` for
            padding.
        experts: E, of the layer.
        padded: whether there may be padding.

    Attributes:
        slots: (n k), the expert of every row.
        order: (n k), for every row its place in ``choices.flatten()``.
        tokens: (n k), the token of every row.
        rows: (n, k), the row of every choice.
        ends: (E), int32, where the rows of every expert end.
    """

    def __init__(self, choices: Tensor, experts: int, padded: bool) -> None:
        self.choices = choices
        self.experts = experts
        self.padded = padded
        self.k = choices.shape[1]
        self.slots, self.order = choices.flatten().sort(stable=True)
        self.tokens = self.order // self.k
        places = torch.arange(len(self.order), device=choices.device)
        self.rows = torch.empty_like(self.order).scatter_(0, self.order, places).view_as(choices)
        numbers = torch.arange(experts, device=choices.device)
        self.ends = torch.searchsorted(self.slots, numbers, right=True, out_int32=True)

    @cached_property
    def counts(self) -> Tensor:
        """(E), int32: rows of every expert."""
        return torch.diff(self.ends, prepend=self.ends.new_zeros(1))

    @cached_property
    def sizes(self) -> list[int]:
        """:attr:`counts` on the host, for which a GPU is waited for."""
        return [int(count) for count in self.counts.tolist()]

    @cached_property
    def membership(self) -> Tensor:
        """(n k, E), bool: whether the row is the expert's."""
        return self.slots[:, None] == torch.arange(self.experts, device=self.slots.device)

    @cached_property
    def is_padding(self) -> Tensor:
        """(n k, 1), bool: whether the row is nobody's."""
        return (self.slots == self.experts)[:, None]

    def spread(self, x: Tensor) -> Tensor:
        """Tokens (n, C) -> rows (n k, C)."""
        return _Spread.apply(x, self)

    def sort(self, x: Tensor) -> Tensor:
        """Choices (n, k, C) -> rows (n k, C)."""
        return _Permute.apply(x.flatten(0, 1), self.order, self.rows.flatten())

    def unsort(self, x: Tensor) -> Tensor:
        """Rows (n k, C) -> choices (n, k, C)."""
        return _Permute.apply(x, self.rows.flatten(), self.order).unflatten(0, (-1, self.k))

    def collect(self, x: Tensor, gates: Tensor) -> Tensor:
        """Rows (n k, C) -> tokens (n, C), the sum over the k choices of gate (n, k) times row."""
        return _Collect.apply(x, gates.to(x.dtype), self)

    def total(self, x: Tensor) -> Tensor:
        """Rows (n k, C) -> tokens (n, C), the sum over the k choices."""
        return _Total.apply(x, self)


class _Spread(torch.autograd.Function):
    """``x[tokens]``, and back the sum over a token's k rows in one kernel, the look-up of a bag of embeddings."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dispatch: Dispatch) -> Tensor:
        ctx.dispatch = dispatch
        return x.index_select(0, dispatch.tokens)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return F.embedding_bag(ctx.dispatch.rows, grads[0].contiguous(), mode="sum"), None


class _Total(torch.autograd.Function):
    """The transpose of :class:`_Spread`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dispatch: Dispatch) -> Tensor:
        ctx.dispatch = dispatch
        return F.embedding_bag(dispatch.rows, x, mode="sum")

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0].index_select(0, ctx.dispatch.tokens), None


class _Collect(torch.autograd.Function):
    """The look-up of a bag of embeddings with weights; autograd's own backward of it is for few rows of a big table."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gates: Tensor, dispatch: Dispatch) -> Tensor:
        ctx.dispatch = dispatch
        ctx.save_for_backward(x, gates)
        return F.embedding_bag(dispatch.rows, x, mode="sum", per_sample_weights=gates)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        x, gates = ctx.saved_tensors
        grad = grads[0].index_select(0, ctx.dispatch.tokens)
        dots = torch.linalg.vecdot(x, grad)
        weights = gates.flatten().index_select(0, ctx.dispatch.order)
        return grad.mul_(weights[:, None]), dots[ctx.dispatch.rows], None


class _Permute(torch.autograd.Function):
    """``x[order]``, where ``back`` leads back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, back: Tensor) -> Tensor:
        ctx.back = back
        return x.index_select(0, order)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return grads[0].index_select(0, ctx.back), None, None
