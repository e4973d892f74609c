"""Names of other libraries: their own models, with weights that came through timm's names, give the same features."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn
from torchvision.models.convnext import CNBlockConfig, ConvNeXt
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from gppf_ds.backbone.names import CONVENTIONS, PREFIXES, from_timm, recognise, to_timm
from gppf_ds.errors import UserError

torch.set_num_threads(1)

SWIN = {"embed_dim": 8, "depths": (1, 2, 2, 1), "num_heads": (1, 1, 2, 2), "window_size": 4, "img_size": 128}
VIT = {"embed_dim": 16, "depth": 2, "num_heads": 2, "img_size": 64}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "resnet18": ("resnet18", {"channels": [8, 16, 16, 16]}),
    "resnet50": ("resnet50", {"layers": [1, 2, 1, 1], "channels": [4, 4, 8, 8]}),
    "resnet50d": ("resnet50d", {"channels": [4, 8, 16, 32], "stem_width": 4}),
    "swin": ("swin_tiny_patch4_window7_224", SWIN),
    "vit": ("vit_tiny_patch16_224", VIT),
    "convnext": ("convnext_tiny", {"depths": (1, 2, 1, 1), "dims": (8, 8, 16, 16)}),
}


def scrambled(model: nn.Module) -> Any:
    """No two numbers of the model are alike, so that a mistaken name shows."""
    generator = torch.Generator().manual_seed(0)
    for name, value in model.state_dict().items():
        if value.is_floating_point():
            noise = torch.randn(value.shape, generator=generator)
            scale = value.ndim == 1 and "bias" not in name
            value.copy_(1 + noise.abs() / 4 if scale else noise / 5)
    return model.eval()


def ours(kind: str, **more: Any) -> Any:
    name, options = MODELS[kind]
    return scrambled(timm.create_model(name, **{"num_classes": 0, **options, **more}))


def load_into(theirs: nn.Module, state: dict[str, Tensor], convention: str) -> Any:
    prefix = PREFIXES.get(convention, "")
    named = from_timm(state, convention)
    assert all(name.startswith(prefix) for name in named)
    theirs.load_state_dict({name.removeprefix(prefix): value for name, value in named.items()}, strict=True)
    return theirs.eval()


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


@pytest.fixture(autouse=True)
def without_gradients() -> Any:
    with torch.no_grad():
        yield


# torchvision


def tv_vit() -> nn.Module:
    return torchvision.models.VisionTransformer(64, 16, 2, 2, 16, 64, num_classes=5)


def tv_swin() -> nn.Module:
    return torchvision.models.SwinTransformer([4, 4], 8, [1, 2, 2, 1], [1, 1, 2, 2], [4, 4], num_classes=5)


def tv_convnext() -> nn.Module:
    settings = [CNBlockConfig(8, 8, 1), CNBlockConfig(8, 16, 2), CNBlockConfig(16, 16, 1), CNBlockConfig(16, None, 1)]
    return ConvNeXt(settings, num_classes=5)


TORCHVISION: dict[str, tuple[Callable[[], nn.Module], tuple[str, dict[str, Any]], int]] = {
    "resnet18": (lambda: ResNet(BasicBlock, [2, 2, 2, 2], num_classes=5), ("resnet18", {}), 64),
    "resnet50": (
        lambda: ResNet(Bottleneck, [1, 2, 1, 1], num_classes=5),
        ("resnet50", {"layers": [1, 2, 1, 1]}),
        64,
    ),
    "swin": (tv_swin, MODELS["swin"], 128),
    "vit": (tv_vit, MODELS["vit"], 64),
    "convnext": (tv_convnext, MODELS["convnext"], 64),
}


@pytest.mark.parametrize("kind", TORCHVISION)
def test_torchvision_models_give_the_same_numbers_in_and_out(kind):
    """Whole classifiers: logits of torchvision's own forward and of timm's."""
    build, (name, options), size = TORCHVISION[kind]
    theirs = scrambled(build())
    model = timm.create_model(name, num_classes=5, **options).eval()
    images = torch.randn(2, 3, size, size)
    state = to_timm(theirs.state_dict(), model.state_dict())
    model.load_state_dict(state, strict=True)
    close(model(images), theirs(images))
    again = from_timm(model.state_dict(), "torchvision")
    assert again.keys() == theirs.state_dict().keys()
    assert all(torch.equal(again[key], value) for key, value in theirs.state_dict().items())


def test_the_first_names_of_torchvisions_vit_are_read():
    """The published vit_b_16-c867db91.pth has them: mlp.linear_1, mlp.linear_2."""
    state = scrambled(tv_vit()).state_dict()
    old = {k.replace("mlp.0.", "mlp.linear_1.").replace("mlp.3.", "mlp.linear_2."): v for k, v in state.items()}
    wanted = ours("vit").state_dict()
    read = to_timm(old, wanted)
    assert read.keys() == wanted.keys()
    assert all(torch.equal(read[name], value) for name, value in to_timm(state, wanted).items())


# mmdet, mmseg


@pytest.fixture(scope="module")
def mm() -> Any:
    from gppf_ds.tasks.openmm import scope

    with scope("mmdet"), scope("mmseg"):
        import mmdet.models.backbones as detection
        import mmseg.models.backbones as segmentation

        yield {"mmdet": detection, "mmseg": segmentation}


@pytest.mark.parametrize("library", ["mmdet", "mmseg"])
@pytest.mark.parametrize("kind", ["resnet18", "resnet50", "resnet50d"])
def test_mm_resnets_give_the_same_maps(mm, library, kind):
    widths = {"channels": [4, 8, 16, 32]}
    if kind == "resnet50d":
        model, theirs = ours(kind), mm[library].ResNetV1d(depth=50, base_channels=4, stem_channels=8)
    else:
        depth = int(kind.removeprefix("resnet"))
        model = scrambled(timm.create_model(kind, num_classes=0, **widths))
        theirs = mm[library].ResNet(depth=depth, base_channels=4, stem_channels=64)
    images = torch.randn(1, 3, 64, 96)
    load_into(theirs, model.state_dict(), library)
    wanted = model.forward_intermediates(images, indices=[1, 2, 3, 4], intermediates_only=True)
    for a, b in zip(theirs(images), wanted, strict=True):
        close(a, b)


@pytest.mark.parametrize("library", ["mmdet", "mmseg"])
def test_mm_swin_gives_the_same_maps(mm, library):
    """Patch merging in the order of nn.Unfold; norm3 is timm's norm, the others normalise without weights."""
    model = ours("swin")
    theirs = mm[library].SwinTransformer(
        embed_dims=8, depths=(1, 2, 2, 1), num_heads=(1, 1, 2, 2), window_size=4, drop_path_rate=0.0
    )
    load_into(theirs, model.state_dict(), library)
    images = torch.randn(2, 3, 128, 128)
    maps = theirs(images)
    close(maps[3], model.forward_features(images).permute(0, 3, 1, 2))
    raw = model.forward_intermediates(images, indices=[0, 1, 2], intermediates_only=True)
    for a, b in zip(maps, raw, strict=False):
        close(a.permute(0, 2, 3, 1), nn.functional.layer_norm(b.permute(0, 2, 3, 1), b.shape[1:2]))
    read = to_timm({f"module.backbone.{k}": v for k, v in theirs.state_dict().items()}, model.state_dict())
    assert all(torch.equal(read[name], value) for name, value in model.state_dict().items())


def test_mmseg_vit_gives_the_same_map(mm):
    model = ours("vit")
    norm = {"type": "LN", "eps": 1e-6}
    theirs = mm["mmseg"].VisionTransformer(
        64, embed_dims=16, num_layers=2, num_heads=2, patch_bias=True, final_norm=True, norm_cfg=norm
    )
    load_into(theirs, model.state_dict(), "mmseg")
    images = torch.randn(2, 3, 64, 64)
    tokens = model.forward_features(images)[:, 1:]
    close(theirs(images)[-1], tokens.transpose(1, 2).unflatten(2, (4, 4)))


# Every convention


def writable() -> list[tuple[str, str]]:
    refused = {("vit", "mmdet"), ("vit", "detectron2"), ("convnext", "detectron2")}
    refused |= {("resnet50d", "torchvision"), ("resnet50d", "detectron2")}
    return [(kind, c) for kind in MODELS for c in CONVENTIONS if (kind, c) not in refused]


@pytest.mark.parametrize(("kind", "convention"), writable())
def test_round_trips_are_exact(kind, convention):
    state = ours(kind).state_dict()
    written = from_timm(state, convention)
    reading = recognise(written, state)
    assert reading is not None
    assert reading.prefix == PREFIXES.get(convention, "")
    back = to_timm(written, state)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], value) for name, value in state.items())


@pytest.mark.parametrize(
    ("kind", "convention", "named"),
    [
        ("resnet50d", "torchvision", "torchvision"),
        ("resnet50d", "detectron2", "detectron2"),
        ("vit", "mmdet", "mmdet"),
        ("vit", "detectron2", "detectron2"),
        ("convnext", "detectron2", "detectron2"),
        ("resnet18", "keras", "keras"),
    ],
)
def test_what_a_convention_cannot_name_is_refused(kind, convention, named):
    with pytest.raises(UserError, match=f"{named}.*choose"):
        from_timm(ours(kind).state_dict(), convention)


def test_tensors_without_a_place_are_refused_by_name():
    state = ours("vit").state_dict() | {"reg_token": torch.zeros(1, 4, 16)}
    with pytest.raises(UserError, match=r"torchvision has no place for 1 tensors.*reg_token"):
        from_timm(state, "torchvision")


def test_windows_that_are_not_square_are_refused():
    state = ours("swin").state_dict()
    state["layers.0.blocks.0.attn.relative_position_bias_table"] = torch.zeros(7 * 9, 1)
    with pytest.raises(UserError, match=r"layers\.0.*not square"):
        from_timm(state, "torchvision")


def test_detectron2_names_are_those_of_its_model_zoo():
    """From the published Mask R-CNN R50-FPN and ViTDet Swin-B models."""
    resnet = from_timm(ours("resnet50").state_dict(), "detectron2")
    for name in (
        "stem.conv1.weight",
        "stem.conv1.norm.running_var",
        "res2.0.shortcut.weight",
        "res2.0.shortcut.norm.bias",
        "res2.0.conv3.norm.weight",
        "res3.1.conv2.weight",
        "res5.0.conv1.norm.running_mean",
    ):
        assert f"backbone.bottom_up.{name}" in resnet
    swin = from_timm(ours("swin").state_dict(), "detectron2")
    for name in (
        "layers.0.downsample.reduction.weight",
        "layers.2.blocks.1.attn.relative_position_index",
        "norm0.bias",
    ):
        assert f"backbone.bottom_up.{name}" in swin
    assert "backbone.bottom_up.layers.3.downsample.reduction.weight" not in swin


def test_a_deformable_convolution_keeps_its_offsets():
    state = ours("resnet50").state_dict() | {"layer2.0.conv2.conv_offset.weight": torch.ones(27, 4, 3, 3)}
    assert "backbone.layer2.0.conv2.conv_offset.weight" in from_timm(state, "mmdet")
    written = from_timm(state, "detectron2")
    assert "backbone.bottom_up.res3.0.conv2_offset.weight" in written
    assert to_timm(written, state).keys() == state.keys()
    with pytest.raises(UserError, match="conv_offset"):
        from_timm(state, "torchvision")


# Reading


@pytest.mark.parametrize(
    "prefix", ["", "module.", "model.", "backbone.", "module.backbone.", "backbone.body.", "_orig_mod."]
)
@pytest.mark.parametrize(("kind", "convention"), [("resnet50", "detectron2"), ("swin", "mmdet"), ("vit", "timm")])
def test_any_prefix_is_found(kind, convention, prefix):
    state = ours(kind).state_dict()
    own = PREFIXES.get(convention, "")
    named = {prefix + name.removeprefix(own): value for name, value in from_timm(state, convention).items()}
    named |= {"roi_head.bbox_head.fc_cls.weight": torch.zeros(3), "neck.norm.weight": torch.zeros(3)}
    reading = recognise(named, state)
    assert reading is not None
    assert (reading.prefix, reading.convention) == (prefix, convention)
    read = reading.read(named)
    assert all(torch.equal(read[name], value) for name, value in state.items())
    assert "neck" not in "".join(reading.names.values())


@pytest.mark.parametrize("kind", ["swin", "convnext"])
def test_the_authors_own_files_are_read(kind):
    """Their names, by timm's own conversion of the same file."""
    model = ours(kind, num_classes=5)
    state = model.state_dict()
    if kind == "swin":
        theirs = {
            k.removeprefix("backbone.bottom_up."): v for k, v in from_timm(backbone_of(state), "detectron2").items()
        }
        theirs = {k: v for k, v in theirs.items() if not k.startswith(("norm0", "norm1", "norm2"))}
        theirs = {k.replace("norm3.", "norm."): v for k, v in theirs.items()}
        from timm.models.swin_transformer import checkpoint_filter_fn
    else:
        pairs = {"stages.": "stages.", "blocks.": "", "conv_dw": "dwconv", "mlp.fc": "pwconv", "head.norm": "norm"}
        theirs = {}
        for name, value in backbone_of(state).items():
            for old, new in pairs.items():
                name = name.replace(old, new)
            if name.startswith("stem."):
                name = "downsample_layers.0." + name.removeprefix("stem.")
            elif ".downsample." in name:
                stage, _, rest = name.removeprefix("stages.").partition(".downsample.")
                name = f"downsample_layers.{stage}.{rest}"
            theirs[name] = value
        from timm.models.convnext import checkpoint_filter_fn
    wanted = backbone_of(state)
    by_timm = checkpoint_filter_fn(dict(theirs), model)
    read = to_timm(theirs, wanted)
    assert read.keys() == wanted.keys()
    for name, value in wanted.items():
        assert torch.equal(read[name], by_timm[name])
        assert torch.equal(read[name], value)


def backbone_of(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in state.items() if not name.startswith("head.fc")}


def test_what_is_not_used_is_explained():
    state = ours("swin").state_dict()
    reading = recognise(from_timm(state, "mmdet"), state)
    assert reading is not None
    assert "norm of an output map" in reading.why_unused("backbone.norm0.weight")
    assert "timm computes" in reading.why_unused("backbone.stages.0.blocks.0.attn.w_msa.relative_position_index")
    assert reading.why_unused("rpn_head.rpn_conv.weight") == "outside the backbone"
    assert reading.why_unused("backbone.stages.9.blocks.0.norm1.weight") == "the backbone has no such tensor"
    plain = recognise({"conv1.weight", "fc.weight"}, {"conv1.weight"})
    assert plain is not None
    assert plain.why_unused("fc.weight") == "a classification head"


def test_a_foreign_checkpoint_is_not_recognised():
    assert recognise({"token_embedding.weight", "decoder.0.q.weight"}, ours("resnet18").state_dict()) is None
    assert to_timm({"token_embedding.weight": torch.zeros(1)}, ours("resnet18").state_dict()) == {}
