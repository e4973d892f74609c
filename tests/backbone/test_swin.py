"""timm's Swin transformers come apart into the paper's layers and keep their numbers at every size."""

from __future__ import annotations

import pytest
import timm
import torch
import torch.nn.functional as F
from taken_apart import assert_names_cover, gradients, images, run, telling_model
from torch import Tensor, nn

from gppf_ds.backbone.blocks import Block
from gppf_ds.backbone.swin import FAMILY, pad_first, split
from gppf_ds.errors import UserError

torch.set_num_threads(1)

V1, V2 = "swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256"
PUBLISHED_SIZE = {V1: 224, V2: 256}
TINY = {"embed_dim": 8, "depths": (1, 1, 2, 2), "num_heads": (1, 1, 2, 2), "drop_path_rate": 0.0}
both = pytest.mark.parametrize("name", [V1, V2])


def _model(name: str, **options: object) -> nn.Module:
    return telling_model(name, {**FAMILY.options, **TINY, **options})


def _stock(name: str, model: nn.Module, **options: object) -> nn.Module:
    """A model of timm's own that no unit has touched, with the same weights."""
    stock = timm.create_model(name, num_classes=0, **{**TINY, **options})
    stock.load_state_dict(model.state_dict(), strict=True)
    return stock


def _assert_same_numbers(blocks: list[Block], stock: nn.Module, x: Tensor) -> None:
    padded = F.pad(x, (0, -x.shape[3] % 4, 0, -x.shape[2] % 4))
    with torch.no_grad():
        last, maps = run(blocks, x)
        features, raw = stock.forward_intermediates(padded)
        torch.testing.assert_close(last, stock.forward_features(padded), rtol=0, atol=1e-6)
    wanted = [F.layer_norm(y.permute(0, 2, 3, 1), y.shape[1:2]).permute(0, 3, 1, 2) for y in raw[:-1]]
    for ours, theirs in zip(maps, [*wanted, features.permute(0, 3, 1, 2)], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


def test_swin_t_is_thirteen_layers():
    model = timm.create_model(V1, num_classes=0, **FAMILY.options)
    blocks = split(model)
    assert [block.name for block in blocks] == ["Embed"] + [
        f"Swin{stage}.{index}" for stage, depth in enumerate((2, 2, 6, 2), start=1) for index in range(depth)
    ]
    assert [(b.name, b.tap.channels, b.tap.stride) for b in blocks if b.tap] == [
        ("Swin1.1", 96, 4),
        ("Swin2.1", 192, 8),
        ("Swin3.5", 384, 16),
        ("Swin4.1", 768, 32),
    ]
    owned = sum(p.numel() for block in blocks for p in block.module.parameters())
    assert owned == 28_288_354 - 769_000  # timm's results table, without the classifier


@both
def test_names_cover_the_model(name):
    model = _model(name)
    blocks = split(model)
    assert_names_cover(model, blocks)
    merging = [b.name for b in blocks if any("downsample" in b.timm_name(key) for key in b.module.state_dict())]
    assert merging == ["Swin2.0", "Swin3.0", "Swin4.0"]


@both
@pytest.mark.parametrize("training", [False, True])
def test_at_the_published_size_the_numbers_are_stock_timms(name, training):
    model = _model(name).train(training)
    stock = _stock(name, model).train(training)
    _assert_same_numbers(split(model), stock, images(PUBLISHED_SIZE[name], PUBLISHED_SIZE[name]))


@both
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("size", [(97, 65), (128, 192), (31, 200)])
def test_smaller_and_odd_sizes(name, training, size):
    model = _model(name).train(training)
    stock = _stock(name, model, strict_img_size=False).train(training)
    _assert_same_numbers(split(model), stock, images(*size))


@both
@pytest.mark.parametrize("size", [(288, 320), (97, 290)])
def test_larger_images_shift_the_windows_of_every_stage(name, size):
    model = _model(name).eval()
    blocks = split(model)
    x = images(*size)
    always = _stock(name, model, strict_img_size=False, always_partition=True).eval()
    _assert_same_numbers(blocks, always, x)
    never = _stock(name, model, strict_img_size=False).eval()
    with pytest.raises(AssertionError):
        _assert_same_numbers(blocks, never, x)
    # A large image leaves nothing behind for the next one.
    _assert_same_numbers(blocks, never, images(96, 128))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        (V1, {"window_size": 4}),
        (V1, {"window_size": (3, 5)}),
        (V1, {"window_size": [7, 7, 14, 7]}),
        (V1, {"img_size": 64}),  # windows of 7 find no room in the last stages
        (V1, {"always_partition": True}),
        (V1, {"embed_dim": 12, "depths": (1, 2, 1), "num_heads": (1, 2, 2), "patch_size": 2}),
        (V2, {"window_size": 16}),
        (V2, {"img_size": 64, "window_size": 4, "pretrained_window_sizes": (8, 8, 8, 4)}),
    ],
)
def test_unusual_windows(name, options):
    model = _model(name, **options).eval()
    blocks = split(model)
    _assert_same_numbers(blocks, _stock(name, model, strict_img_size=False, **options).eval(), images(60, 52))
    size = (300, 280)
    for tap, tapped in zip([b.tap for b in blocks if b.tap], run(blocks, images(*size))[1], strict=True):
        assert tapped.shape == (1, tap.channels, *(-(-side // tap.stride) for side in size))


@both
def test_gradients_reach_every_parameter_with_and_without_checkpoints(name):
    model = _model(name, drop_path_rate=0.2).train()
    # The second one's windows are not shifted in the last stage.
    batches = [images(*size).repeat(4, 1, 1, 1) for size in ((225, 97), (64, 64))]
    found = gradients(model, split(model), batches)
    assert all(grad is not None and grad.any() for grad in found.values())


@pytest.mark.parametrize("size", [(224, 256), (96, 160), (97, 65), (231, 300)])
def test_padding_first_gives_mmdets_numbers(size):
    pytest.importorskip("mmdet")
    from gppf_ds.backbone.names import from_timm
    from gppf_ds.tasks import mmcv_ops

    mmcv_ops.install()
    from mmdet.models.backbones.swin import SwinTransformer

    model = _model(V1).eval()
    theirs = SwinTransformer(embed_dims=8, depths=TINY["depths"], num_heads=TINY["num_heads"])
    theirs.eval()
    state = {key.removeprefix("backbone."): value for key, value in from_timm(model.state_dict(), "mmdet").items()}
    theirs.load_state_dict(state, strict=True)
    blocks = [pad_first(block) for block in split(model)]
    x = images(*size)
    with torch.no_grad():
        for ours, wanted in zip(run(blocks, x)[1], theirs(x), strict=True):
            torch.testing.assert_close(ours, wanted, rtol=0, atol=1e-5)


@both
def test_padding_first_keeps_stock_timms_numbers_at_the_published_size(name):
    model = _model(name).eval()
    stock = _stock(name, model).eval()
    blocks = [pad_first(block) for block in split(model)]
    _assert_same_numbers(blocks, stock, images(PUBLISHED_SIZE[name], PUBLISHED_SIZE[name]))
    with pytest.raises(AssertionError):  # timm's mask lets the borders of a padded map see each other
        _assert_same_numbers(blocks, _stock(name, model, strict_img_size=False).eval(), images(96, 160))


@both
@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"strict_img_size": True}, "remove strict_img_size"),
        ({"patch_size": (4, 2)}, "set patch_size to one number"),
        ({"depths": (1, 1, 0, 1)}, "let depths be at least 1"),
    ],
)
def test_what_does_not_come_apart_is_refused(name, options, sentence):
    model = timm.create_model(name, num_classes=0, **{**FAMILY.options, **TINY, **options})
    with pytest.raises(UserError, match=rf"backbone\.name '{name}'.*{sentence}"):
        split(model)
