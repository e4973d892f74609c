"""timm's ResNets come apart into the paper's layers."""

from __future__ import annotations

import pytest
import timm
import torch

from gppf_ds.backbone.lego import LegoBackbone
from gppf_ds.backbone.resnet import split
from gppf_ds.config import BackboneConfig
from gppf_ds.errors import UserError

torch.set_num_threads(1)

# GPPF figure 11.
LAYERS = ["Stem"] + [f"Res{s}.{b}" for s, count in ((2, 3), (3, 4), (4, 6), (5, 3)) for b in range(count)]


def test_resnet50_is_the_seventeen_layers_of_the_paper():
    backbone = LegoBackbone(BackboneConfig(name="resnet50", units=2))
    assert [layer.name for layer in backbone.layers] == LAYERS
    assert backbone.units == [2] * 17
    assert backbone.channels == (64, 256, 512, 1024, 2048)
    assert backbone.strides == (2, 4, 8, 16, 32)
    per_path = sum(p.numel() for layer in backbone.layers for p in layer.units["0"].parameters())
    assert per_path == 23_508_032  # ResNet-50 without its classifier
    assert sum(p.numel() for p in backbone.parameters()) == 2 * per_path


@pytest.mark.parametrize(
    ("name", "options", "strides"),
    [
        ("resnet18", {}, (2, 4, 8, 16, 32)),
        ("resnet50", {"layers": [1, 2, 1, 1], "channels": [4, 8, 8, 8]}, (2, 4, 8, 16, 32)),
        ("resnet50d", {"layers": [1, 1, 1, 1], "channels": [4, 4, 4, 4]}, (2, 4, 8, 16, 32)),
        ("resnet50", {"layers": [1, 1, 1, 1], "channels": [4, 4, 4, 4], "output_stride": 16}, (2, 4, 8, 16, 16)),
    ],
)
def test_names_taps_and_prefixes_cover_the_model(name, options, strides):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=0, **options)
    blocks = split(model)
    named = {b.timm_name(key): value for b in blocks for key, value in b.module.state_dict().items()}
    wanted = model.state_dict()
    assert named.keys() == wanted.keys()
    assert all(value.data_ptr() == wanted[key].data_ptr() for key, value in named.items())
    taps = [block.tap for block in blocks if block.tap]
    assert tuple(tap.stride for tap in taps) == strides
    x = torch.randn(1, 3, 64, 96)
    for block in blocks:
        x = block.module.eval()(block.before(x))
        if block.tap:
            assert x.shape == (1, block.tap.channels, 64 // block.tap.stride, 96 // block.tap.stride)


@pytest.mark.parametrize("name", ["efficientnet_b0", "tf_mixnet_s", "no_such_model"])
def test_other_families_are_refused_by_name(name):
    with pytest.raises(UserError, match=rf"backbone\.name.*{name}"):
        LegoBackbone(BackboneConfig(name=name))


def test_unknown_options_are_refused():
    with pytest.raises(UserError, match=r"backbone\.options.*bogus"):
        LegoBackbone(BackboneConfig(name="resnet18", options={"bogus": 1}))


def test_a_stem_pool_with_parameters_is_refused():
    """Its convolution and batch norm would belong to no unit, and its statistics to one rank."""
    with pytest.raises(UserError, match="resnetrs50"):
        LegoBackbone(BackboneConfig(name="resnetrs50", options={"layers": [1, 1, 1, 1]}))
