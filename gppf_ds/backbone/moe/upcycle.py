"""Experts from the weights of a dense transformer ("upcycling"), so that training starts from what that one knows.

As in He et al., "Upcycling Large Language Models into Mixture of Experts" (arXiv 2410.07524): an expert is one of the
parts into which the dense layer falls, scaled by the number of parts; the experts that together are the whole layer
form a group, and every router starts with the same row for all experts of a group. So a token, whatever it prefers,
goes through all parts of the layer with equal gates, and an MoE-MLP starts as the very function that the dense MLP is.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from gppf_ds.backbone.moe.attention import MoeAttention
from gppf_ds.backbone.moe.layer import MoeLayer
from gppf_ds.backbone.moe.mlp import MoeMlp
from gppf_ds.config import MoeConfig

State = dict[str, Tensor]

_MLP = ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias")
_ATTENTION = ("qkv.weight", "qkv.bias", "proj.weight", "proj.bias", "relative_position_bias_table")

NEW = "dense models have none"
"""Why routers' statistics and embeddings of tasks stay as they are initialised."""


@dataclass
class Upcycled:
    """What a dense checkpoint gives to the MoE layers of a backbone, under the backbone's (timm's) names."""

    values: State = field(default_factory=dict)
    how: dict[str, str] = field(default_factory=dict)
    """What each of them is."""
    copies: set[str] = field(default_factory=set)
    """Those among them that another expert of the layer holds too, and that noise should tell apart."""


@dataclass(frozen=True)
class _Scale:
    """How experts have to be scaled for their gates."""

    parts: int
    """Experts that together are the dense layer."""
    gates: float
    """The sum of a token's gates while routing is uniform: 1, or k / E where gates are not renormalised."""

    @property
    def weight(self) -> float:
        """Of what differs from expert to expert: its mean over the chosen ones, times the number of parts."""
        return self.parts / self.gates

    @property
    def bias(self) -> float:
        """Of what all experts add alike."""
        return 1 / self.gates


def dense_names(layers: Collection[Any]) -> list[str]:
    """timm's names of the tensors that the experts of these lego layers stand in the place of."""
    return [
        f"{prefix}{tail}"
        for prefix, module in _experts_of(layers)
        for tail in (_MLP if isinstance(module, MoeMlp) else _ATTENTION)
    ]


def upcycled(dense: Mapping[str, Tensor], layers: Collection[Any], config: MoeConfig) -> Upcycled:
    """The experts' tensors for a backbone whose layout is that of its configuration.

    With :class:`_Scale` s = (parts / sum of gates, 1 / sum of gates), and E experts of which number e is part e mod
    parts:

    MLP, with h hidden units in an expert (those beyond parts h are left out)::

        fc1[e] = W1[part], b1[part]        fc2[e] = s.weight W2[:, part], s.bias b2

    so that k = parts chosen parts with equal gates add up to the dense MLP. Shared experts start with fc2 = 0.

    Attention, with d in a dense head and d_h in an expert. One key and value for all heads cannot hold what H heads
    have, so they span the d_h directions that keep most of all heads' scores and outputs (for tokens without a
    preferred direction; no other shared d_h directions keep more)::

        S[h] = Wq[h]^T Wk[h]    P: the d_h first eigenvectors of sum_h S[h]^T S[h]
        M[h] = Wo[h] Wv[h]      R: the d_h first eigenvectors of sum_h M[h]^T M[h]
        key = P x               query[e] = sqrt(d_h / d) P S[h]^T
        value = R x             output[e] = s.weight M[h] R^T                            h = e mod H

    Where keys and values have a bias, one of the value's entries is the constant 1 instead, and carries all that dense
    attention adds to every token alike: Wo bv + bo. A key's bias changes no softmax; a query's has no place here and is
    lost. So attention of one or two heads starts as the dense one but for that bias, and of more heads near it.

    Routers keep one of their initial rows for each group of parts. Exact with ``gate_norm`` topk, a multiple of parts
    experts and k = parts; near it otherwise.

    Args:
        dense: the checkpoint by timm's names.
        layers: of the backbone.
        config: of the experts.
    """
    made = Upcycled()
    for prefix, layer in _experts_of(layers):
        own = {name.removeprefix(prefix): tensor.float() for name, tensor in dense.items() if name.startswith(prefix)}
        mlp = isinstance(layer, MoeMlp)
        heads = 0 if mlp else 2 * layer.width // _head_width(layer)
        parts = config.mlp_top_k if mlp else heads
        chosen = config.mlp_top_k if mlp else config.attention_top_k or heads
        scale = _Scale(parts, 1.0 if config.gate_norm == "topk" else chosen / len(layer.experts))
        tensors = list(_mlp(layer, own, scale) if isinstance(layer, MoeMlp) else _attention(layer, own, scale))
        if tensors:
            tensors += list(_routers(layer, parts))
        for tail, value, how in tensors:
            made.values[prefix + tail], made.how[prefix + tail] = value.float(), how
        later = tuple(f"experts.{name}." for name in list(layer.experts)[parts:])
        made.copies |= {prefix + tail for tail, *_ in tensors if tail.startswith(later)}
    return made


_Tensors = Iterator[tuple[str, Tensor, str]]
"""Name inside the layer, value, what it is."""


def _experts_of(layers: Collection[Any]) -> Iterator[tuple[str, Any]]:
    """The beginning of timm's names, and the MoE layer."""
    for layer in layers:
        block = next(iter(layer.units.values())).block if layer.moe_parts else None
        for part in layer.moe_parts:
            yield layer.timm_name(f"block.{part}."), getattr(block, part)


def _mlp(layer: MoeMlp, dense: State, scale: _Scale) -> _Tensors:
    expert: Any = next(iter(layer.experts.values()))
    hidden, width = expert.fc1.weight.shape
    if not set(_MLP) <= set(dense):
        return
    if dense["fc1.weight"].shape[1] != width or len(dense["fc1.weight"]) < scale.parts * hidden:
        return
    experts = [f"experts.{name}" for name in layer.experts]
    for place, start in enumerate([*experts, *(f"shared.{number}" for number in range(len(layer.shared)))]):
        part = place % scale.parts
        units = slice(part * hidden, (part + 1) * hidden)
        how = f"of 1/{scale.parts} of the dense MLP's hidden units"
        yield f"{start}.fc1.weight", dense["fc1.weight"][units], how
        yield f"{start}.fc1.bias", dense["fc1.bias"][units], how
        weight, bias, how = scale.weight, scale.bias, f"{how}, times {scale.weight:g}"
        if start not in experts:
            weight, bias, how = 0.0, 0.0, "zero, so that shared experts start without effect"
        yield f"{start}.fc2.weight", dense["fc2.weight"][:, units] * weight, how
        yield f"{start}.fc2.bias", dense["fc2.bias"] * bias, how


def _attention(layer: MoeAttention, dense: State, scale: _Scale) -> _Tensors:
    width, wide, heads = layer.width, _head_width(layer), scale.parts
    shape = dense["qkv.weight"].shape if "qkv.weight" in dense and "proj.weight" in dense else None
    if shape != (3 * width, width) or "q_norm.weight" in dense:
        return
    queries, keys, values = dense["qkv.weight"].double().view(3, heads, -1, width)
    outputs = dense["proj.weight"].double().view(width, heads, -1).transpose(0, 1)
    has_bias = layer.key_value.bias is not None
    scored, kept_scores = _basis(keys, queries @ queries.mT, wide)
    mixed, kept_outputs = _basis(values, outputs.mT @ outputs, wide - has_bias)
    how = f"the directions that keep {kept_scores:.0%} of all heads' scores, {kept_outputs:.0%} of what they add"
    # Directions left over keep their initial values, and meet zeros in the experts.
    weight = layer.key_value.weight.detach().double().clone()
    weight[: len(scored)], weight[wide : wide + len(mixed)] = scored, mixed
    query = torch.zeros(heads, wide, width, dtype=torch.double)
    query[:, : len(scored)] = math.sqrt(wide / queries.shape[1]) * (scored @ keys.mT) @ queries
    output = torch.zeros(heads, width, wide, dtype=torch.double)
    output[..., : len(mixed)] = scale.weight * outputs @ (values @ mixed.T)
    if has_bias:
        weight[-1] = 0
        bias = torch.zeros(2 * wide, dtype=torch.double)
        bias[-1] = 1
        output[..., -1] = scale.bias * _constant(dense, outputs)
        yield "key_value.bias", bias, how
    yield "key_value.weight", weight, how
    for place, name in enumerate(layer.experts):
        head = place % heads
        yield f"experts.{name}.query.weight", query[head], "a head's queries for these directions, without their bias"
        what = f"a head's output from these directions, times {scale.weight:g}"
        yield f"experts.{name}.output.weight", output[head], what
        if layer.position_index is not None and "relative_position_bias_table" in dense:
            table = dense["relative_position_bias_table"][:, head]
            yield f"experts.{name}.position_bias", table, "a head's table of relative positions"


def _basis(projections: Tensor, weights: Tensor, count: int) -> tuple[Tensor, float]:
    """The shared directions (at most ``count``, C) that keep most of sum_h |A_h projections_h|^2, and the share kept.

    Args:
        projections: (H, d, C).
        weights: (H, d, d), A_h^T A_h.
        count: how many.
    """
    energy, directions = torch.linalg.eigh((projections.mT @ weights @ projections).sum(0))
    energy, directions = energy.flip(0).clamp_min(0), directions.mT.flip(0)[:count]
    # An eigenvector's sign is chance.
    largest = directions.gather(1, directions.abs().argmax(1, keepdim=True))
    return directions * largest.sign(), float(energy[:count].sum() / energy.sum())


def _constant(dense: State, outputs: Tensor) -> Tensor:
    """(C): what dense attention adds to every token, whatever it sees."""
    constant = dense["proj.bias"].double() if "proj.bias" in dense else outputs.new_zeros(outputs.shape[1])
    if "qkv.bias" in dense:
        values = dense["qkv.bias"].double().view(3, len(outputs), -1)[2]
        constant = constant + (outputs @ values.unsqueeze(-1)).sum(0).squeeze(-1)
    return constant


def _routers(layer: MoeLayer, parts: int) -> _Tensors:
    for task, router in layer.routers.items():
        weight: Any = router.weight
        rows = torch.arange(len(weight)) // parts * parts
        yield f"routers.{task}.weight", weight.detach()[rows], "random, alike for the experts of a group"


def _head_width(layer: MoeAttention) -> int:
    return layer.key_value.out_features // 2
