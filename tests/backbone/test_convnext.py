"""timm's ConvNeXts come apart into layers and keep their numbers."""

from __future__ import annotations

import pytest
import timm
import torch
from taken_apart import assert_names_cover, gradients, images, run, telling_model
from torch import nn

from gppf_ds.backbone.convnext import FAMILY, split
from gppf_ds.errors import UserError

torch.set_num_threads(1)

TINY = {"depths": (1, 1, 2, 2), "dims": (8, 12, 16, 24)}
MODELS = [
    ("convnext_tiny", {}),
    ("convnext_atto_ols", {}),  # convolutions in the MLP, a stem of overlapping patches
    ("convnextv2_atto", {}),
    ("convnext_tiny_hnf", {}),  # final norm before pooling
    ("convnext_large_mlp", {}),  # a hidden layer in the classifier
    ("convnext_zepto_rms", {}),
    ("convnext_tiny", {"output_stride": 8}),
    ("convnext_tiny", {"patch_size": 2, "ls_init_value": None, "kernel_sizes": (3, 5, 7, 9)}),
]
every_kind = pytest.mark.parametrize(("name", "options"), MODELS)


def _model(name: str, options: dict[str, object]) -> nn.Module:
    return telling_model(name, {**FAMILY.options, **TINY, **options})


def test_convnext_t_is_nineteen_layers():
    blocks = split(timm.create_model("convnext_tiny", num_classes=0, **FAMILY.options))
    assert [block.name for block in blocks] == ["Stem"] + [
        f"ConvNeXt{stage}.{index}" for stage, depth in enumerate((3, 3, 9, 3), start=1) for index in range(depth)
    ]
    assert [(b.name, b.tap.channels, b.tap.stride) for b in blocks if b.tap] == [
        ("ConvNeXt1.2", 96, 4),
        ("ConvNeXt2.2", 192, 8),
        ("ConvNeXt3.8", 384, 16),
        ("ConvNeXt4.2", 768, 32),
    ]
    owned = sum(p.numel() for block in blocks for p in block.module.parameters())
    assert owned == 28_589_128 - 769_000  # timm's results table, without the classifier's linear layer


@every_kind
def test_names_cover_the_model(name, options):
    model = _model(name, options)
    assert_names_cover(model, split(model))


@every_kind
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("size", [(224, 224), (97, 65)])
def test_numbers_are_timms(name, options, training, size):
    model = _model(name, options).train(training)
    x = images(*size, batch=2)
    with torch.no_grad():
        wanted = model.forward_intermediates(x, norm=True, intermediates_only=True)
        features = model.forward_features(x)
        blocks = split(model)
        _, maps = run(blocks, x)
    for ours, theirs in zip(maps, [*wanted[:-1], features], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
    torch.testing.assert_close(wanted[-1], features, rtol=0, atol=1e-6)
    assert tuple(b.tap.stride for b in blocks if b.tap) == tuple(info["reduction"] for info in model.feature_info)


@pytest.mark.parametrize("name", ["convnext_tiny", "convnextv2_atto"])
def test_maps_are_those_of_features_only(name):
    model = _model(name, {}).eval()
    plain = timm.create_model(name, features_only=True, **TINY).eval()
    state = {key.replace("stages.", "stages_").replace("stem.", "stem_"): v for key, v in model.state_dict().items()}
    plain.load_state_dict({key: state[key] for key in plain.state_dict()}, strict=True)
    x = images(97, 65, batch=2)
    with torch.no_grad():
        for ours, theirs in zip(run(split(model), x)[1], plain(x), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


@every_kind
def test_gradients_reach_all_but_the_classifiers_norm(name, options):
    model = _model(name, {**options, "drop_path_rate": 0.2}).train()
    found = gradients(model, split(model), [images(64, 97, batch=2)])
    assert {key for key, grad in found.items() if grad is None} == {key for key in found if key.startswith("head.")}
    assert all(grad.any() for grad in found.values() if grad is not None)


def test_a_stage_without_blocks_is_refused():
    model = timm.create_model("convnext_tiny", num_classes=0, dims=TINY["dims"], depths=(1, 1, 0, 1))
    with pytest.raises(UserError, match=r"backbone\.name 'convnext_tiny'.*let depths be at least 1"):
        split(model)
