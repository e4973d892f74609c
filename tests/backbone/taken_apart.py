"""What the tests of the families share: a timm model with telling weights, run block by block."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gppf_ds.backbone.blocks import Block


def telling_model(name: str, options: dict[str, Any]) -> nn.Module:
    """Without a classifier, with weights that leave no part without effect (norms of 0 and tiny scales would)."""
    model = timm.create_model(name, num_classes=0, **options)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator) + (parameter.dim() == 1))
    return model


def images(height: int, width: int, batch: int = 1) -> Tensor:
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(1))


def run(blocks: list[Block], x: Tensor) -> tuple[Tensor, list[Tensor]]:
    """What the last block returns, and the taps."""
    size, maps = (x.shape[2], x.shape[3]), []
    for block in blocks:
        x = block.module(block.before(x))
        if block.tap:
            maps.append(block.tap.as_map(x, size))
    return x, maps


def assert_names_cover(model: nn.Module, blocks: list[Block]) -> None:
    """The blocks hold the model's own tensors, each once, and know their names."""
    wanted = model.state_dict()
    pairs = [(b.timm_name(own), value) for b in blocks for own, value in b.module.state_dict().items()]
    assert len(pairs) == len(wanted)
    named = dict(pairs)
    assert named.keys() == wanted.keys()
    assert all(value.data_ptr() == wanted[name].data_ptr() for name, value in named.items())


def gradients(model: nn.Module, blocks: list[Block], batches: Sequence[Tensor]) -> dict[str, Tensor | None]:
    """By timm's names, with activation checkpoints, after making sure that these change nothing."""

    def found(call: Callable[[nn.Module, Tensor], Tensor]) -> dict[str, Tensor | None]:
        torch.manual_seed(3)
        model.zero_grad()
        loss = torch.zeros(())
        for x in batches:
            for block in blocks:
                x = call(block.module, x)
            loss = loss + x.square().mean()
        loss.backward()
        return {b.timm_name(key): p.grad for b in blocks for key, p in b.module.named_parameters()}

    plain = found(lambda module, x: module(x))
    recomputed = found(lambda module, x: checkpoint(module, x, use_reentrant=False))
    torch.testing.assert_close(recomputed, plain, rtol=1e-4, atol=1e-6)
    return recomputed
