"""The layers written down as their formulas, token by token: the slow truth that the layers are held against."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor


def choices(layer: Any, x: Tensor, task: str) -> Iterator[tuple[Any, Tensor]]:
    """(expert, gate) of the chosen experts of one token (C)."""
    router = layer.routers[task]
    probs = (router.weight @ x).softmax(0)
    best, places = probs.topk(layer.top_k[task])
    gates = best / best.sum() if layer.gate_norm == "topk" else best
    for gate, place in zip(gates, places.tolist(), strict=True):
        yield layer.experts[str(router.experts[place])], gate


def mlp(layer: Any, x: Tensor, task: str) -> Tensor:
    """Tokens (n, C) -> (n, C)."""
    outs = []
    for token in x:
        chosen = [gate * expert(token) for expert, gate in choices(layer, token, task)]
        outs.append(sum([*chosen, *(expert(token) for expert in layer.shared)]))
    return torch.stack(outs)


def attention(layer: Any, x: Tensor, task: str, mask: Tensor | None = None) -> Tensor:
    """(B, N, C) -> (B, N, C), with (windows, N, N) added to the logits."""
    images = []
    for number, tokens in enumerate(x):
        keys, values = layer.key_value(tokens).chunk(2, -1)
        outs = []
        for i, token in enumerate(tokens):
            total = torch.zeros_like(token)
            for expert, gate in choices(layer, token, task):
                logits = keys @ expert.query(token) / keys.shape[-1] ** 0.5
                if layer.position_index is not None:
                    logits = logits + expert.position_bias[layer.position_index[i]]
                if mask is not None:
                    logits = logits + mask[number % len(mask), i]
                total = total + gate * expert.output(logits.softmax(0) @ values)
            outs.append(total)
        images.append(torch.stack(outs))
    return torch.stack(images)


def gradients(layer: Any, x: Tensor, y: Tensor) -> dict[str, Any]:
    """Of a fixed random projection of ``y``, by parameter name; that of ``x`` as "x"."""
    names, parameters = zip(*layer.named_parameters(), strict=True)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(7)).to(y)
    found = torch.autograd.grad((weights * y).sum(), [x, *parameters], allow_unused=True)
    return dict(zip(["x", *names], found, strict=True))


def assert_same(ours: dict[str, Any], theirs: dict[str, Any], **tolerance: float) -> None:
    """Gradients agree; None is as good as 0."""
    for name, one in ours.items():
        other = theirs[name]
        shape = next((g for g in (one, other) if g is not None), torch.zeros(()))
        one, other = (torch.zeros_like(shape) if g is None else g for g in (one, other))
        limits: dict[str, Any] = {**(tolerance or {"rtol": 1e-9, "atol": 1e-12})}
        torch.testing.assert_close(one, other, **limits, msg=partial("{}: {}".format, name))
