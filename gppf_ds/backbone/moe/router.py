"""The router of one task in one mixture-of-experts layer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

STD = 0.02
"""Of the weights at the start. Not zero: at exactly uniform routing every token takes the same experts, and the
gradient of the mutual information is 0."""


class Router(nn.Module):
    """A linear map without bias and a softmax over the experts that the task sees (Mod-Squad, arXiv 2212.08066).

    It computes in fp32, whatever autocast says: the order of nearly equal logits decides which experts run.

    Args:
        width: C of the tokens.
        experts: ids of those that it can choose.
        slots: their positions among all of the layer's experts; by default the layer has no others.

    Attributes:
        weight: (E_visible, C).
        probability, usage, updates: running rows (E_visible), (E_visible) and their number of updates; kept by those
            who compute the mutual-information loss.
    """

    slots: Tensor
    probability: Tensor
    usage: Tensor
    updates: Tensor

    def __init__(self, width: int, experts: Sequence[int], slots: Sequence[int] | None = None) -> None:
        super().__init__()
        self.experts = tuple(experts)
        count = len(self.experts)
        self.weight = nn.Parameter(nn.init.trunc_normal_(torch.empty(count, width), std=STD))
        places = torch.tensor(list(range(count) if slots is None else slots))
        self.register_buffer("slots", places, persistent=False)
        self.register_buffer("probability", torch.zeros(count))
        self.register_buffer("usage", torch.zeros(count))
        self.register_buffer("updates", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        """(n, C) -> log-probabilities (n, E_visible) in fp32 (fp64 of fp64)."""
        with torch.autocast(x.device.type, enabled=False):
            dtype = torch.promote_types(x.dtype, torch.float32)
            return F.log_softmax(F.linear(x.to(dtype), self.weight.to(dtype)), -1)
