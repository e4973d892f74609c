"""Counted parameters are those of the modules, and of the models that Mod-Squad names."""

from __future__ import annotations

from typing import Any

import pytest
import timm
from torch import nn

from gppf_ds.backbone.moe.attention import MoeAttention
from gppf_ds.backbone.moe.mlp import MoeMlp
from gppf_ds.backbone.moe.parameters import VitSize, attention_parameters, mlp_parameters


def size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize("shared", [0, 2])
def test_a_layer_of_mlps(shared: int) -> None:
    layer = MoeMlp(24, 8, range(6), {"a": range(6), "b": range(2, 5)}, {"a": 2, "b": 1}, shared=shared)
    assert mlp_parameters(24, 8, 6, [6, 3], shared) == size(layer)


@pytest.mark.parametrize("window", [None, (3, 4)])
@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_of_heads(window: tuple[int, int] | None, bias: bool) -> None:
    layer = MoeAttention(24, 8, range(6), {"a": range(6), "b": [1]}, {"a": 2, "b": 1}, window, key_value_bias=bias)
    assert attention_parameters(24, 8, 6, [6, 1], window, bias) == size(layer)


@pytest.mark.parametrize("depth", [1, 2])
def test_a_dense_vit_is_timms_with_a_task_embedding(depth: int) -> None:
    model = timm.create_model("vit_tiny_patch16_224", num_classes=0, depth=depth)
    assert VitSize(192, 3, depth).parameters() == size(model) + 192


def test_a_vit_of_experts() -> None:
    model: Any = timm.create_model("vit_tiny_patch16_224", num_classes=0, depth=3)
    for block in (model.blocks[0], model.blocks[2]):
        block.attn = MoeAttention(192, 128, range(6), dict.fromkeys("ab", range(6)), {"a": 3, "b": 3})
    model.blocks[1].mlp = MoeMlp(192, 384, range(4), dict.fromkeys("ab", range(4)), {"a": 2, "b": 2}, shared=1)
    options: dict[str, Any] = {"attention_experts": 6, "mlp_experts": 4, "top_k": 2, "shared": 1}
    counted = VitSize(192, 3, 3, 2, attention_blocks="even", mlp_blocks="odd", **options)
    assert counted.parameters() == size(model) + 2 * 192


SMALL, BASE = (384, 6), (768, 12)

PUBLISHED: dict[str, tuple[tuple[int, int], dict[str, Any], float]] = {
    "att_mlp_small_MI": (SMALL, {"attention_experts": 12, "expert_ratio": 1.0}, 33.25),
    "att_mlp_small_MI_twice": (
        SMALL,
        {"attention_experts": 15, "expert_ratio": 1.0, "attention_blocks": "even"},
        34.17,
    ),
    "the same at ratio 4": (SMALL, {"attention_experts": 15, "attention_blocks": "even"}, 55.44),
    "att_mlp_base_MI_twice": (BASE, {"attention_experts": 24, "attention_blocks": "even"}, 206.96),
    "the same, 15 heads": (BASE, {"attention_experts": 15, "attention_blocks": "even"}, 195.80),
}
"""(width, heads), options, millions of parameters; with the heads of 13 tasks of Taskonomy."""


def heads(width: int) -> int:
    """Eleven linear heads for 16 channels of 16 x 16 pixels together, two for 1000 and 365 classes, and three norms.

    These sizes are not published; they were found as the ones that give all five numbers.
    """
    return (16 * 16**2 + 1000 + 365) * (width + 1) + 3 * 2 * width


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models(name: str) -> None:
    (width, count), options, millions = PUBLISHED[name]
    trunk = VitSize(width, count, tasks=13, mlp_experts=16, mlp_blocks="odd", dense_head_factor=2, **options)
    assert round((trunk.parameters() + heads(width)) / 1e6, 2) == millions
