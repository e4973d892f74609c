"""MoE-MLP: every token goes through k of E small MLPs (Mod-Squad, arXiv 2212.08066)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from gppf_ds.backbone.moe.call import Call
from gppf_ds.backbone.moe.dispatch import Dispatch
from gppf_ds.backbone.moe.experts import linear
from gppf_ds.backbone.moe.layer import GateNorm, MiSource, MoeLayer, without_padding


class MlpExpert(nn.Module):
    """Linear, GELU, linear, initialised as torch's linear layers are: uniform in +-1 / sqrt(fan in)."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., C)."""
        return self.fc2(F.gelu(self.fc1(x)))


class MoeMlp(MoeLayer):
    """y = sum over the k chosen experts of gate_e * expert_e(x), plus the shared experts' outputs.

    With ``hidden`` = mlp_ratio * C / k a token costs as many products as in the dense MLP.

    Args:
        width: C.
        hidden: width inside an expert.
        experts, routers, top_k, gate_norm, mi_source, detach_statistics: see :class:`MoeLayer`.
        shared: how many more experts every token goes through, without a gate.
    """

    def __init__(
        self,
        width: int,
        hidden: int,
        experts: Sequence[int],
        routers: Mapping[str, Sequence[int]],
        top_k: Mapping[str, int],
        shared: int = 0,
        gate_norm: GateNorm = "topk",
        mi_source: MiSource = "probs",
        detach_statistics: bool = True,
    ) -> None:
        make = partial(MlpExpert, width, hidden)
        super().__init__(width, make, experts, routers, top_k, gate_norm, mi_source, detach_statistics)
        self.shared = nn.ModuleList(make() for _ in range(shared))

    def forward(self, x: Tensor, call: Call) -> Tensor:
        """(..., C) -> (..., C), zeros where padding; appends to ``call.statistics``."""
        tokens = without_padding(x, call).flatten(0, -2)
        dispatch, gates = self.route(tokens, call)
        rows = dispatch.spread(tokens)
        rows = self._run(rows, dispatch) if self.group is None else self.group.through(rows, dispatch, self._run)
        y = dispatch.collect(rows, gates)
        for expert in self.shared:
            y = y + expert(tokens)
        return without_padding(y.view(x.shape), call) if self.shared else y.view(x.shape)

    def _run(self, rows: Tensor, dispatch: Dispatch) -> Tensor:
        """Rows (., C) through the experts that are here."""
        experts: list[Any] = list(self.experts.values())
        hidden = F.gelu(linear([expert.fc1 for expert in experts], rows, dispatch))
        return linear([expert.fc2 for expert in experts], hidden, dispatch)
