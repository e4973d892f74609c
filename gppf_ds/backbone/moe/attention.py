"""MoE-attention: every token chooses k of E attention heads (Mod-Squad, arXiv 2212.08066)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.models.swin_transformer import get_relative_position_index
from torch import Tensor, nn

from gppf_ds.backbone.moe.call import Call
from gppf_ds.backbone.moe.dispatch import Dispatch
from gppf_ds.backbone.moe.experts import linear, one_kernel
from gppf_ds.backbone.moe.layer import GateNorm, MiSource, MoeLayer, without_padding


class HeadExpert(nn.Module):
    """One head's query and output projections, initialised as torch's linear layers are: uniform in +-1 / sqrt(fan in).

    Args:
        width: C.
        head_width: d_h.
        positions: entries of its table of relative position biases; 0 for none.
    """

    def __init__(self, width: int, head_width: int, positions: int) -> None:
        super().__init__()
        self.query = nn.Linear(width, head_width, bias=False)
        self.output = nn.Linear(head_width, width, bias=False)
        if positions:
            # As Swin's: Liu et al. 2021, section 3.2, and its code.
            self.position_bias = nn.Parameter(nn.init.trunc_normal_(torch.empty(positions), std=0.02))


class MoeAttention(MoeLayer):
    """Mixture of attention heads: a query and an output projection for each, one key and value for all.

    ::

        q[b,i,h] = x[b,i] Wq[e(i,h)]            k, v = x Wk, x Wv               h = 1..k, e(i,h) the h-th choice of i
        a[b,i,h,j] = softmax_j(q[b,i,h] . k[b,j] / sqrt(d_h) + bias[e(i,h)][i - j] + mask[i,j])
        y[b,i] = sum_h gate[b,i,h] (sum_j a[b,i,h,j] v[b,j]) Wo[e(i,h)]

    With ``head_width`` = 2 C / heads and k = heads the projections cost about what those of dense attention cost.
    Tokens of padding are not routed, but they are keys, as in dense attention, unless ``mask`` hides them.

    Args:
        width: C.
        head_width: d_h.
        experts, routers, top_k, gate_norm, mi_source, detach_statistics: see :class:`MoeLayer`.
        window: (height, width) of the windows in a Swin, whose tokens are all of N; every expert then has a table
            of relative position biases.
        key_value_bias: whether the projection to keys and values has a bias.
    """

    position_index: Tensor | None

    def __init__(
        self,
        width: int,
        head_width: int,
        experts: Sequence[int],
        routers: Mapping[str, Sequence[int]],
        top_k: Mapping[str, int],
        window: tuple[int, int] | None = None,
        gate_norm: GateNorm = "topk",
        mi_source: MiSource = "probs",
        detach_statistics: bool = True,
        key_value_bias: bool = True,
    ) -> None:
        positions = (2 * window[0] - 1) * (2 * window[1] - 1) if window else 0
        make = partial(HeadExpert, width, head_width, positions)
        super().__init__(width, make, experts, routers, top_k, gate_norm, mi_source, detach_statistics)
        self.key_value = nn.Linear(width, 2 * head_width, bias=key_value_bias)
        index = get_relative_position_index(*window) if window else None
        self.register_buffer("position_index", index, persistent=False)

    def forward(self, x: Tensor, call: Call, mask: Tensor | None = None) -> Tensor:
        """Appends to ``call.statistics``.

        Args:
            x: (B, N, C).
            call: of the pass.
            mask: (windows, N, N), added to the logits; windows divides B, whose order is image, window.

        Returns:
            (B, N, C), zeros where padding.
        """
        batch, count, _ = x.shape
        tokens = without_padding(x, call).flatten(0, 1)
        dispatch, gates = self.route(tokens, call)
        experts: list[Any] = list(self.experts.values())
        rows = linear([expert.query for expert in experts], dispatch.spread(tokens), dispatch)
        # The queries of all heads as one long sequence: heads share keys and values, which so need no copies.
        queries = dispatch.unsort(rows).view(batch, 1, count * dispatch.k, -1)
        keys, values = self.key_value(x).unsqueeze(1).chunk(2, -1)
        bias = self._bias(dispatch, batch, count, mask)
        bias = None if bias is None else bias.to(queries.dtype)
        seen = F.scaled_dot_product_attention(queries, keys, values, attn_mask=bias)
        # Gates before the projection, which is linear: there rows are narrower.
        gated = seen.reshape(batch * count, dispatch.k, -1) * gates.to(seen.dtype).unsqueeze(-1)
        rows = linear([expert.output for expert in experts], dispatch.sort(gated), dispatch)
        return dispatch.total(rows).view(x.shape)

    def _bias(self, dispatch: Dispatch, batch: int, count: int, mask: Tensor | None) -> Tensor | None:
        """What is added to the logits, (B, 1, N k, N): the chosen experts' relative position biases and the mask."""
        bias = None
        if self.position_index is not None:
            tables = self._tables(dispatch)[:, self.position_index].flatten(0, 1)
            chosen = dispatch.choices.clamp(max=dispatch.experts - 1).view(batch, count, dispatch.k)
            places = torch.arange(count, device=tables.device)[:, None]
            bias = F.embedding(chosen * count + places, tables)
        if mask is not None:
            mask = mask[:, :, None].expand(-1, -1, dispatch.k, -1)
            if bias is None:
                bias = mask.repeat(batch // len(mask), 1, 1, 1)
            else:
                bias = (bias.unflatten(0, (-1, len(mask))) + mask).flatten(0, 1)
        return None if bias is None else bias.flatten(1, 2).unsqueeze(1)

    def _tables(self, dispatch: Dispatch) -> Tensor:
        """(E, positions), of which those of experts that nobody chose are constants where the host knows the counts."""
        experts: list[Any] = list(self.experts.values())
        tables = [expert.position_bias for expert in experts]
        if not one_kernel([experts[0].query], self.key_value.weight):
            tables = [t if size else t.detach() for t, size in zip(tables, dispatch.sizes, strict=True)]
        return torch.stack(tables)
