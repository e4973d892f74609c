"""Deformable blocks beside plain ones in the same lego layer."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from gppf_ds.backbone.controller import Controller, Route
from gppf_ds.backbone.deformable import DeformableConv2d
from gppf_ds.backbone.lego import LegoBackbone, Pass
from gppf_ds.backbone.norm import NormPolicy
from gppf_ds.config import BackboneConfig
from gppf_ds.errors import UserError

TINY = {"layers": [1, 2, 1, 1], "channels": [4, 8, 8, 8]}


def test_without_offsets_it_is_half_a_convolution():
    torch.manual_seed(0)
    plain = nn.Conv2d(4, 6, 3, stride=2, padding=1, bias=False)
    x = torch.randn(2, 4, 9, 7)
    torch.testing.assert_close(DeformableConv2d(plain)(x), 0.5 * plain(x))


def test_a_whole_offset_samples_the_neighbour():
    torch.manual_seed(0)
    plain = nn.Conv2d(3, 5, 3, padding=1, bias=False)
    conv = DeformableConv2d(plain)
    with torch.no_grad():
        conv.conv_offset.bias[1:18:2] = 1.0  # (vertical, horizontal) for each of the nine points
    x = torch.randn(1, 3, 8, 8)
    shifted = nn.functional.pad(x, (0, 1))[..., 1:]
    torch.testing.assert_close(conv(x)[..., 1:-2], 0.5 * plain(shifted)[..., 1:-2])


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "resnet50d"])
@pytest.mark.parametrize("routing", ["soft", "hard"])
def test_mixed_units_train_together(name, routing):
    config = BackboneConfig(name=name, options=TINY, unit_blocks=["plain", "deformable"], routing=routing)
    backbone = LegoBackbone(config, seed=3)
    kinds = [
        [any(isinstance(m, DeformableConv2d) for m in u.modules()) for u in x.units.values()] for x in backbone.layers
    ]
    assert kinds == [[False, False]] * 2 + [[False, True]] * 4
    controller = Controller(["a", "b"], backbone.units)
    route = controller.hard_route if routing == "hard" else controller.soft_route
    passes = [
        Pass(torch.randn(2, 3, *size), route(task, controller.noise(0, 0, device), 1.0), (0, 0, device))
        for device, (task, size) in enumerate([("a", (64, 64)), ("b", (40, 72))])
    ]
    maps = backbone(passes, NormPolicy())
    sum(x.square().mean() for own in maps for x in own).backward()
    used = {k for one in passes if one.route.path for k in [one.route.path[3]]} or {0, 1}
    for unit, module in backbone.layers[3].units.items():
        assert all((p.grad is not None) == (int(unit) in used) for p in module.parameters())


def test_a_deformable_path_equals_its_blocks_alone():
    config = BackboneConfig(name="resnet18", options=TINY, unit_blocks=["plain", "deformable"])
    backbone = LegoBackbone(config, seed=3).eval()
    path = (0, 0, 1, 0, 1, 1)
    x = images = torch.randn(2, 3, 64, 48)
    for layer, unit in zip(backbone.layers, path, strict=True):
        x = layer.units[str(unit)](layer.before(x))
    with torch.no_grad():
        got = backbone([Pass(images, Route(torch.ones(6, 2), path))], NormPolicy())[0][-1]
    assert torch.equal(got, x)


def test_units_may_differ_from_layer_to_layer():
    backbone = LegoBackbone(BackboneConfig(name="resnet18", options=TINY, units=[1, 1, 2, 3, 2, 1]))
    assert [len(layer.units) for layer in backbone.layers] == backbone.units == [1, 1, 2, 3, 2, 1]
    paths = {Controller(["a"], backbone.units).hard_path("a", torch.randn(6, 3)) for _ in range(50)}
    assert {max(units) + 1 for units in zip(*paths, strict=True)} <= {1, 2, 3}
    assert all(unit < count for path in paths for unit, count in zip(path, backbone.units, strict=True))


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (BackboneConfig(name="resnet18", options=TINY, units=[1, 2]), "lists 2 layers, but resnet18 has 6"),
        (BackboneConfig(name="resnet51"), "timm has no such model: did you mean 'resnet"),
        (BackboneConfig(name="efficientnet_b0"), "family 'efficientnet'; supported"),
    ],
)
def test_what_does_not_fit_is_refused(config, words):
    with pytest.raises(UserError, match=words):
        LegoBackbone(config)


def test_dropped_units_are_gone_and_the_rest_keeps_its_names_and_values():
    config = BackboneConfig(name="resnet18", options=TINY)
    whole = LegoBackbone(config, seed=5).eval()
    kept = [[0], [1], [0, 1], [1], [0], [1]]
    sparse = LegoBackbone(config, seed=5, kept=kept).eval()
    state = whole.state_dict()
    assert all(torch.equal(state[name], value) for name, value in sparse.state_dict().items())
    assert sum(p.numel() for p in sparse.parameters()) < 0.7 * sum(p.numel() for p in whole.parameters())
    path = (0, 1, 1, 1, 0, 1)
    images = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        a, b = (list(net([Pass(images, Route(torch.ones(6, 2), path))], NormPolicy())[0]) for net in (whole, sparse))
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
