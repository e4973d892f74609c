"""timm's Vision Transformers come apart into embedding and blocks, which together compute what timm computes."""

from __future__ import annotations

import re
from typing import Any

import pytest
import timm
import torch
from taken_apart import assert_names_cover, run

from gppf_ds.backbone import lego
from gppf_ds.backbone.controller import Route
from gppf_ds.backbone.lego import LegoBackbone, Pass
from gppf_ds.backbone.norm import NormPolicy
from gppf_ds.backbone.vit import FAMILY, split
from gppf_ds.config import BackboneConfig
from gppf_ds.errors import UserError

torch.set_num_threads(1)

TINY = {"embed_dim": 48, "depth": 3, "num_heads": 3, "img_size": 112}

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("vit_tiny_patch16_224", {}),
    "patch 8": ("vit_base_patch8_224", {"img_size": 64}),
    "patch 14, layer scale": ("vit_small_patch14_dinov2", {}),
    "patch 14, registers": ("vit_small_patch14_reg4_dinov2", {}),
    "patch 32, norm before": ("vit_base_patch32_clip_224", {"img_size": 224}),
    "no class token, map pooling": ("vit_base_patch16_siglip_224", {}),
    "no class token, average pooling": ("vit_medium_patch16_gap_240", {}),
    "registers, average pooling": ("vit_medium_patch16_reg4_gap_256", {}),
    "class token without position": ("deit3_small_patch16_224", {}),
    "no position embedding": ("vit_tiny_patch16_224", {"pos_embed": "none"}),
    "no final norm": ("vit_tiny_patch16_224", {"final_norm": False}),
    "norm after each part": ("vit_base_patch16_rpn_224", {}),
    "parallel blocks": ("vit_small_patch16_18x2_224", {}),
    "parallel scaling blocks": ("vit_base_patch16_xp_224", {}),
    "differential attention": ("vit_dpwee_patch16_reg1_gap_256", {}),
    "random parts": (
        "vit_tiny_patch16_224",
        {"drop_path_rate": 0.5, "pos_drop_rate": 0.1, "proj_drop_rate": 0.1, "attn_drop_rate": 0.1, "drop_rate": 0.1},
    ),
}


def build(key: str) -> Any:
    name, options = MODELS[key]
    torch.manual_seed(0)
    model = timm.create_model(name, **{**FAMILY.options, **TINY, **options}, num_classes=0)
    with torch.no_grad():
        for parameter in model.parameters():  # class tokens and layer scales start at nearly nothing
            parameter.add_(0.02 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize(
    ("name", "layers", "parameters"),
    [
        ("vit_tiny_patch16_224", 13, 5_524_416),
        ("vit_small_patch16_224", 13, 21_665_664),
        ("vit_base_patch16_224", 13, 85_798_656),
        ("vit_large_patch14_clip_224", 25, 303_179_776),
        ("vit_giant_patch14_dinov2", 41, 1_136_479_232),
        ("vit_giant_patch14_reg4_dinov2", 41, 1_136_483_840),
        ("vit_giant_patch14_224", 41, 1_011_202_432),
    ],
)
def test_real_sizes(name: str, layers: int, parameters: int) -> None:
    with torch.device("meta"):
        model = timm.create_model(name, **FAMILY.options, num_classes=0, weight_init="skip")
    blocks = split(model)
    assert [block.name for block in blocks] == ["Embed", *(f"Block{i}" for i in range(layers - 1))]
    assert sum(p.numel() for block in blocks for p in block.module.parameters()) == parameters
    assert parameters == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("key", MODELS)
def test_names_cover_the_model(key: str) -> None:
    model = build(key)
    assert_names_cover(model, split(model))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("key", MODELS)
def test_equals_timm_at_any_size(key: str, training: bool) -> None:
    model = build(key).train(training)
    blocks = split(model)
    for block in blocks:
        block.module.train(training)
    side = model.patch_embed.img_size[0]
    for size in ((side, side), (97, 65), (33, 130)):
        images = torch.randn(2, 3, *size)
        torch.manual_seed(1)
        expected = model.forward_features(images)
        torch.manual_seed(1)
        found, _ = run(blocks, images)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)

        [tap] = [block.tap for block in blocks if block.tap is not None]
        assert blocks[-1].tap is tap
        patch = model.patch_embed.patch_size[0]
        assert (tap.channels, tap.stride) == (48, patch)
        maps = tap.as_map(found, size)
        grid = (-(-size[0] // patch), -(-size[1] // patch))
        assert maps.shape == (2, 48, *grid)
        # Row 1, column 2 is patch number width + 2 behind the prefix tokens.
        torch.testing.assert_close(maps[:, :, 1, 2], found[:, model.num_prefix_tokens + grid[1] + 2], rtol=0, atol=0)


@pytest.mark.parametrize("key", [key for key in MODELS if key != "random parts"])
def test_maps_are_those_of_timm_and_train_every_parameter(key: str) -> None:
    model = build(key)
    blocks = split(model)
    images = torch.randn(1, 3, 70, 50)
    [maps] = run(blocks, images)[1]
    torch.testing.assert_close(maps, model.forward_intermediates(images, [2], norm=True)[1][0], rtol=0, atol=1e-6)
    maps.square().sum().backward()
    assert [name for b in blocks for name, p in b.module.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("vit_small_resnet26d_224", {}, "HybridEmbed"),
        ("deit_tiny_distilled_patch16_224", {"global_pool": "token"}, "VisionTransformerDistilled"),
        ("vit_tiny_patch16_224", {"global_pool": "avg", "fc_norm": True}, "fc_norm"),
        ("vit_tiny_patch16_224", {"global_pool": "map"}, "attn_pool"),
        ("vit_tiny_patch16_224", {"patch_drop_rate": 0.5}, "patch_drop_rate"),
        ("vit_tiny_patch16_224", {"patch_size": (16, 8)}, "patch_size"),
    ],
)
def test_what_does_not_come_apart_is_refused(name: str, options: dict[str, Any], says: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name, **{**FAMILY.options, **TINY, **options}, num_classes=0, weight_init="skip")
    with pytest.raises(UserError, match=re.escape(name)) as caught:
        split(model)
    assert says in str(caught.value)


def test_a_lego_backbone_of_vits(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hard path is timm's model with its units' weights; soft routing mixes tokens."""
    monkeypatch.setitem(lego.FAMILIES, "vision_transformer", FAMILY)
    backbone = LegoBackbone(BackboneConfig(name="vit_tiny_patch16_224", options=dict(TINY), units=2)).eval()
    assert (backbone.channels, backbone.strides, backbone.units) == ((48,), (16,), [2] * 4)
    path = (1, 0, 1, 0)
    layers: list[Any] = list(backbone.layers)
    state = {
        layer.timm_name(name): value
        for layer, unit in zip(layers, path, strict=True)
        for name, value in layer.units[str(unit)].state_dict().items()
    }
    model = timm.create_model("vit_tiny_patch16_224", **backbone.timm_options).eval()
    model.load_state_dict(state, strict=True)
    images = torch.randn(1, 3, 97, 65)
    with torch.no_grad():
        [[found]] = backbone([Pass(images, Route(torch.ones(4, 2), path))], NormPolicy())
        [expected] = model.forward_intermediates(images, [2], norm=True, intermediates_only=True)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    [[mixed]] = backbone([Pass(images, Route(torch.full((4, 2), 0.5), None))], NormPolicy())
    assert mixed.shape == expected.shape == (1, 48, 7, 5)
    mixed.sum().backward()
    assert all(p.grad is not None for p in backbone.parameters())
