"""Plain checkpoints into a lego backbone: what fits is copied to every unit, what does not is reported."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from gppf_ds.backbone.lego import LegoBackbone
from gppf_ds.backbone.names import from_timm
from gppf_ds.backbone.pretrained import load_pretrained, read_checkpoint
from gppf_ds.config import BackboneConfig
from gppf_ds.errors import UserError

torch.set_num_threads(1)

RESNET = {"layers": [1, 1, 1, 1], "channels": [8, 8, 8, 8]}
SWIN = {"embed_dim": 8, "depths": (1, 1, 1, 1), "num_heads": (1, 1, 2, 2)}
VIT = {"embed_dim": 16, "depth": 2, "num_heads": 2}


def lego(name: str = "resnet18", units: Any = 2, options: dict[str, Any] | None = None, **more: Any) -> LegoBackbone:
    config = BackboneConfig(name=name, units=units, options=RESNET if options is None else options, **more)
    return LegoBackbone(config, seed=1)


def plain(name: str = "resnet18", classes: int = 5, **options: Any) -> dict[str, Tensor]:
    torch.manual_seed(3)
    state = timm.create_model(name, num_classes=classes, **(options or RESNET)).state_dict()
    for value in state.values():
        if value.is_floating_point():
            value.add_(torch.randn_like(value).abs())
    return state


def unit_state(backbone: LegoBackbone, unit: int) -> dict[str, Tensor]:
    return {
        layer.timm_name(own): value
        for layer in backbone.layers
        for own, value in layer.units[str(unit)].state_dict().items()
    }


def parameter_names(backbone: LegoBackbone, unit: int) -> set[str]:
    return {layer.timm_name(own) for layer in backbone.layers for own, _ in layer.units[str(unit)].named_parameters()}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    path = tmp_path / "resnet.pth"
    torch.save(plain(), path)
    return path


# Loading


def test_unit_0_has_the_very_weights_and_the_others_noise_of_the_stated_size(tmp_path):
    state = plain(layers=[1, 1, 1, 1], channels=[64, 64, 64, 64])
    torch.save(state, tmp_path / "a.pth")
    backbone = lego(units=3, options={"layers": [1, 1, 1, 1], "channels": [64, 64, 64, 64]})
    report = load_pretrained(backbone, str(tmp_path / "a.pth"), noise=0.05, seed=7)
    assert not report.missing
    assert report.unused == {"fc.weight": "a classification head", "fc.bias": "a classification head"}
    first, second, third = (unit_state(backbone, unit) for unit in range(3))
    assert set(report.loaded) == set(first) == set(state) - {"fc.weight", "fc.bias"}
    for name, value in first.items():
        assert torch.equal(value, state[name])
    drawn = parameter_names(backbone, 1)
    for name in first:
        if name not in drawn:  # statistics of batch norms
            assert torch.equal(second[name], state[name])
            continue
        assert not torch.equal(second[name], third[name])
        relative = (second[name] - state[name]).std() / state[name].std()
        assert relative == pytest.approx(0.05, rel=6 / state[name].numel() ** 0.5)


def test_one_unit_is_the_checkpoint_and_nothing_else(checkpoint):
    backbone = lego(units=1)
    load_pretrained(backbone, str(checkpoint), noise=0.5, seed=0)
    state = plain()
    assert all(torch.equal(value, state[name]) for name, value in unit_state(backbone, 0).items())


def test_noise_depends_on_the_seed_alone(checkpoint):
    backbones = [lego() for _ in range(4)]
    torch.manual_seed(99)
    for backbone, seed, noise in zip(backbones, (5, 5, 6, 5), (0.1, 0.1, 0.1, 0.0), strict=True):
        load_pretrained(backbone, str(checkpoint), noise, seed)
        torch.rand(3)
    a, b, c, d = (unit_state(backbone, 1) for backbone in backbones)
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not torch.equal(a["layer1.0.conv1.weight"], c["layer1.0.conv1.weight"])
    assert all(torch.equal(d[name], value) for name, value in unit_state(backbones[3], 0).items())
    other_layer = a["layer2.0.conv2.weight"] - d["layer2.0.conv2.weight"]
    assert not torch.allclose(other_layer, a["layer3.0.conv2.weight"] - d["layer3.0.conv2.weight"])


@pytest.mark.parametrize(
    ("name", "options", "convention"),
    [
        ("resnet18", RESNET, "detectron2"),
        ("resnet50d", RESNET, "mmdet"),
        ("swin_tiny_patch4_window7_224", SWIN, "mmdet"),
        ("swin_tiny_patch4_window7_224", SWIN, "torchvision"),
        ("vit_tiny_patch16_224", VIT, "mmseg"),
        ("convnext_tiny", {"depths": (1, 1, 1, 1), "dims": (8, 8, 8, 8)}, "torchvision"),
        ("swinv2_tiny_window8_256", SWIN, "timm"),
        ("deit_tiny_patch16_224", VIT, "torchvision"),
    ],
)
def test_other_conventions_reach_every_unit(tmp_path, name, options, convention):
    state = plain(name, 0, **options)
    named = from_timm(state, convention) | {"optimizer.step": torch.zeros(1)}
    torch.save({"state_dict": named, "epoch": 3}, tmp_path / "a.pth")
    backbone = lego(name, options=options)
    report = load_pretrained(backbone, str(tmp_path / "a.pth"), noise=0.0, seed=0)
    assert not report.missing
    assert report.unused["optimizer.step"] in ("outside the backbone", "the backbone has no such tensor")
    for unit in range(2):
        loaded = unit_state(backbone, unit)
        assert loaded.keys() == state.keys()
        assert all(torch.equal(loaded[key], value) for key, value in state.items())


def test_position_embeddings_and_windows_are_adapted_as_timm_does(tmp_path):
    vit = plain("vit_tiny_patch16_224", 0, **VIT)
    torch.save(vit, tmp_path / "vit.pth")
    backbone = lego("vit_tiny_patch16_224", options=VIT | {"img_size": 64})
    report = load_pretrained(backbone, str(tmp_path / "vit.pth"), noise=0.0, seed=0)
    assert report.resized == {"pos_embed": "(1, 197, 16) -> (1, 17, 16)"}
    assert not report.missing
    assert "pos_embed" in str(report)
    swin = plain("swin_tiny_patch4_window7_224", 0, **SWIN)
    torch.save(from_timm(swin, "mmdet"), tmp_path / "swin.pth")
    backbone = lego("swin_tiny_patch4_window7_224", options=SWIN | {"window_size": 4})
    report = load_pretrained(backbone, str(tmp_path / "swin.pth"), noise=0.0, seed=0)
    assert report.resized["layers.0.blocks.0.attn.relative_position_bias_table"] == "(169, 1) -> (49, 1)"
    assert not report.missing


def test_what_does_not_fit_is_reported_with_both_shapes(tmp_path):
    state = plain()
    state["layer1.0.conv1.weight"] = torch.zeros(3, 3)
    del state["layer2.0.conv1.weight"]
    state["auxiliary.weight"] = torch.zeros(2)
    torch.save(state, tmp_path / "a.pth")
    backbone = lego()
    before = {unit: unit_state(backbone, unit)["layer1.0.conv1.weight"].clone() for unit in range(2)}
    report = load_pretrained(backbone, str(tmp_path / "a.pth"), noise=0.1, seed=0)
    assert report.missing == {
        "layer1.0.conv1.weight": "(3, 3) in the checkpoint, (8, 64, 3, 3) in the backbone",
        "layer2.0.conv1.weight": "not in the checkpoint",
    }
    assert report.unused["auxiliary.weight"] == "the backbone has no such tensor"
    for unit, value in before.items():
        assert torch.equal(unit_state(backbone, unit)["layer1.0.conv1.weight"], value)
    text = str(report)
    assert "(8, 64, 3, 3) in the backbone): layer1.0.conv1.weight" in text
    assert f"{len(report.loaded)} of {len(report.loaded) + 2} tensors loaded" in text


def test_units_of_another_kind_keep_what_the_checkpoint_lacks(checkpoint):
    backbone = lego(unit_blocks=["plain", "deformable"])
    report = load_pretrained(backbone, str(checkpoint), noise=0.1, seed=0)
    assert report.missing
    assert set(report.missing.values()) == {"not in the checkpoint"}
    assert all("conv_offset" in name for name in report.missing)


def test_half_precision_and_missing_counters_are_no_matter(tmp_path):
    """detectron2's frozen batch norms keep no counter of batches."""
    state = {name: value.half() for name, value in plain().items() if "num_batches" not in name}
    torch.save(state, tmp_path / "a.pth")
    backbone = lego()
    report = load_pretrained(backbone, str(tmp_path / "a.pth"), noise=0.0, seed=0)
    assert not report.missing
    assert backbone.layers[0].units["0"].conv1.weight.dtype == torch.float32


def test_the_report_says_what_to_know_about_detectron2(tmp_path):
    torch.save(from_timm(plain(classes=0), "detectron2"), tmp_path / "a.pth")
    text = str(load_pretrained(lego(), str(tmp_path / "a.pth"), noise=0.01, seed=0))
    assert "names of detectron2 behind 'backbone.bottom_up.'" in text
    assert "BGR" in text


def test_a_checkpoint_of_another_model_is_refused_with_names(tmp_path):
    torch.save({"tokens.weight": torch.zeros(1), "decoder.weight": torch.zeros(1)}, tmp_path / "a.pth")
    with pytest.raises(UserError, match=r"a\.pth.*tokens\.weight.*conv1\.weight"):
        load_pretrained(lego(), str(tmp_path / "a.pth"), noise=0.0, seed=0)
    torch.save({"conv1.weight": torch.zeros(1)}, tmp_path / "b.pth")
    with pytest.raises(UserError, match=r"b\.pth.*shape.*\(1,\) in the checkpoint"):
        load_pretrained(lego(), str(tmp_path / "b.pth"), noise=0.0, seed=0)


def test_a_vit_of_another_width_is_refused_with_shapes(tmp_path):
    torch.save(plain("vit_tiny_patch16_224", 0, **VIT | {"embed_dim": 32}), tmp_path / "a.pth")
    with pytest.raises(UserError, match=r"shape.*in the backbone"):
        load_pretrained(lego("vit_tiny_patch16_224", options=VIT), str(tmp_path / "a.pth"), noise=0.0, seed=0)


# Files


@pytest.mark.parametrize("wrapper", [None, "state_dict", "model", "module", "state_dict_ema"])
@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
def test_files_of_every_kind_are_read(tmp_path, kind, wrapper):
    state = {name: value.contiguous() for name, value in plain().items()}
    if kind == "safetensors":
        save_file(state, tmp_path / "a.safetensors")
        read = read_checkpoint(str(tmp_path / "a.safetensors"))
    else:
        content: Any = {"epoch": 1, "args": {"lr": 0.1}, wrapper: state} if wrapper else state
        if wrapper == "state_dict_ema":
            content["state_dict"] = {"conv1.weight": torch.zeros(1)}
        torch.save(content, tmp_path / "a.pth", _use_new_zipfile_serialization=kind == "zip")
        read = read_checkpoint(str(tmp_path / "a.pth"))
    assert read.keys() == state.keys()
    assert all(torch.equal(read[name], value) for name, value in state.items())


def test_mmengines_records_of_a_training_are_passed_over(tmp_path):
    import numpy
    from mmengine.logging import MessageHub

    hub = MessageHub("test_pretrained")
    hub.update_scalar("train/loss", 1.5)
    meta = {"epoch": 1, "seed": numpy.int64(3), "dataset_meta": {"classes": ("a", "b")}}
    content = {"meta": meta, "message_hub": hub.state_dict(), "state_dict": plain()}
    torch.save(content, tmp_path / "epoch_1.pth")
    assert read_checkpoint(str(tmp_path / "epoch_1.pth")).keys() == plain().keys()


class Harmful:
    def __reduce__(self) -> Any:
        return os.mkdir, ("harm",)


@pytest.mark.parametrize("kind", ["zip", "legacy", "pickle"])
def test_pickled_code_is_refused_and_does_not_run(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    content = {"state_dict": {"conv1.weight": torch.zeros(1)}, "extra": Harmful()}
    if kind == "pickle":
        Path("a.pth").write_bytes(pickle.dumps(content))
    else:
        torch.save(content, "a.pth", _use_new_zipfile_serialization=kind == "zip")
    with pytest.raises(UserError, match=r"a\.pth.*not unpickled.*torch\.save"):
        read_checkpoint("a.pth")
    assert not Path("harm").exists()


def test_a_whole_model_is_refused(tmp_path):
    torch.save(nn.Linear(2, 2), tmp_path / "a.pth")
    with pytest.raises(UserError, match="not unpickled"):
        read_checkpoint(str(tmp_path / "a.pth"))


@pytest.mark.parametrize("name", ["a.pth", "a.safetensors"])
@pytest.mark.parametrize("keep", [0, 100, 0.5])
def test_damaged_files_are_refused(tmp_path, name, keep):
    path = tmp_path / name
    save_file(plain(), path) if path.suffix == ".safetensors" else torch.save(plain(), path)
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content)) if keep < 1 else keep])
    with pytest.raises(UserError, match=f"{name}.*(damaged|not a readable)"):
        read_checkpoint(str(path))


def test_files_without_tensors_and_files_that_are_not_there_are_refused(tmp_path):
    torch.save({"epoch": 3}, tmp_path / "a.pth")
    with pytest.raises(UserError, match=r"a\.pth holds no tensors"):
        read_checkpoint(str(tmp_path / "a.pth"))
    with pytest.raises(UserError, match=r"nowhere\.pth: there is no such file.*timm"):
        read_checkpoint("nowhere.pth")


# timm's own loader, with its cache and without a network


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def put(cache: Path, repository: str, state: dict[str, Tensor]) -> None:
    """As the hub's client lays its cache out."""
    folder = cache / f"models--{repository.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("0" * 40)
    (folder / "snapshots" / ("0" * 40)).mkdir(parents=True)
    save_file(state, folder / "snapshots" / ("0" * 40) / "model.safetensors")


@pytest.mark.parametrize(("source", "tag"), [("timm", "a1_in1k"), ("timm:fb_ssl_yfcc100m_ft_in1k", None)])
def test_timms_own_weights_come_from_its_cache(cache, source, tag):
    state = timm.create_model("resnet18", num_classes=1000).state_dict()
    put(cache, f"timm/resnet18.{tag or source.removeprefix('timm:')}", state)
    backbone = lego(options={})
    report = load_pretrained(backbone, source, noise=0.01, seed=0)
    assert not report.missing
    assert set(report.unused) == {"fc.weight", "fc.bias"}
    assert all(torch.equal(value, state[name]) for name, value in unit_state(backbone, 0).items())


@pytest.mark.parametrize("source", ["timm", "timm:no_such_tag"])
def test_timms_own_weights_without_network_or_tag(cache, source):
    with pytest.raises(UserError, match=r"timm could not load.*resnet18.*cache"):
        load_pretrained(lego(), source, noise=0.0, seed=0)
