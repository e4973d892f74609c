"""A dense checkpoint into a backbone with token-level experts: what they become, and which function they start as."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor

from gppf_ds.backbone.controller import Controller
from gppf_ds.backbone.lego import LegoBackbone, Pass
from gppf_ds.backbone.moe.upcycle import NEW
from gppf_ds.backbone.names import from_timm
from gppf_ds.backbone.norm import NormPolicy
from gppf_ds.backbone.pretrained import Report, load_pretrained
from gppf_ds.config import BackboneConfig, MoeConfig

torch.set_num_threads(1)

VIT = ("vit_tiny_patch16_224", {"embed_dim": 48, "depth": 2, "num_heads": 3, "img_size": 64})
SWIN = ("swin_tiny_patch4_window7_224", {"embed_dim": 24, "depths": (1, 2, 1, 1), "num_heads": (1, 2, 4, 8)})
ONE_OR_TWO_HEADS = ("swin_tiny_patch4_window7_224", {"embed_dim": 24, "depths": (1, 2), "num_heads": (1, 2)})


def dense(name: str, options: dict[str, Any], query_bias: bool = True) -> Any:
    """A timm model whose every tensor matters."""
    torch.manual_seed(3)
    model = timm.create_model(name, num_classes=0, **options).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
        for key, parameter in model.named_parameters():
            if key.endswith("qkv.bias") and not query_bias:
                parameter[: len(parameter) // 3] = 0
    return model


def upcycled(
    model: Any, name: str, options: dict[str, Any], folder: Path, noise: float = 0.0, units: int = 1, **moe: Any
) -> tuple[LegoBackbone, Report]:
    torch.save(model.state_dict(), folder / "dense.pth")
    experts = {"mlp_experts": 0, "task_embedding": False, "mlp_blocks": "every", "attention_blocks": "every"} | moe
    config = BackboneConfig(name=name, options=options, units=units, moe=MoeConfig(**experts))
    backbone = LegoBackbone(config, seed=1, tasks=["digits", "scenes"]).eval()
    return backbone, load_pretrained(backbone, str(folder / "dense.pth"), noise, seed=7)


@torch.no_grad()
def last_map(backbone: LegoBackbone, images: Tensor, task: str = "digits") -> Tensor:
    route = Controller(["digits", "scenes"], backbone.units).fixed_route(task)
    return backbone([Pass(images, route)], NormPolicy())[0][-1]


def images(side: int = 64) -> Tensor:
    return torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def wanted_map(model: Any, x: Tensor) -> Tensor:
    features = model.forward_features(x)
    return features.permute(0, 3, 1, 2) if features.dim() == 4 else features[:, 1:].mT.unflatten(2, (4, 4))


@pytest.mark.parametrize(("name", "options"), [VIT, SWIN], ids=["vit", "swin"])
@pytest.mark.parametrize("moe", [{"mlp_top_k": 4}, {"mlp_top_k": 2, "shared_experts": 1}], ids=str)
def test_mlp_experts_start_as_the_dense_mlp(tmp_path: Path, name: str, options: Any, moe: Any) -> None:
    """For every token, whatever it prefers: a group of experts with one router row holds all parts of the MLP."""
    model = dense(name, options)
    backbone, report = upcycled(model, name, options, tmp_path, mlp_experts=8, **moe)
    x = images(64 if name.startswith("vit") else 224)
    for task in ("digits", "scenes"):
        torch.testing.assert_close(last_map(backbone, x, task), wanted_map(model, x), rtol=1e-3, atol=1e-4)
    used = next(iter(backbone.moe_layers().values())).routers["digits"].weight
    assert torch.equal(used[0], used[1])
    assert not torch.equal(used[0], used[moe["mlp_top_k"]])
    assert not report.unused
    assert set(report.missing.values()) == {NEW}


def test_k_equal_gates_on_the_k_distinct_slices_give_the_dense_mlp_in_both_norms_of_gates(tmp_path: Path) -> None:
    name, options = VIT
    model = dense(name, options)
    for norm in ("topk", "full"):
        backbone, _ = upcycled(model, name, options, tmp_path, mlp_experts=8, mlp_top_k=4, gate_norm=norm)
        with torch.no_grad():
            for layer in backbone.moe_layers().values():
                for router in layer.routers.values():
                    router.weight.zero_()  # uniform: gates of 1 / 4, or of 1 / 8 each
                layer.route = distinct(layer)  # type: ignore[method-assign]
        torch.testing.assert_close(last_map(backbone, images()), wanted_map(model, images()), rtol=1e-4, atol=1e-5)


def distinct(layer: Any) -> Any:
    """``layer.route`` that chooses experts 0, 5, 2, 7: four parts out of both groups."""
    honest = layer.route

    def route(tokens: Tensor, call: Any) -> Any:
        dispatch, gates = honest(tokens, call)
        choices = torch.tensor([0, 5, 2, 7]).expand(len(tokens), 4)
        return type(dispatch)(choices, 8, padded=False), gates

    return route


def test_attention_of_one_and_two_heads_starts_as_the_dense_one(tmp_path: Path) -> None:
    """Windows, shifts, tables of relative positions; values' and output's biases go through the constant entry."""
    name, options = ONE_OR_TWO_HEADS
    model = dense(name, options, query_bias=False)
    with torch.no_grad():  # the constant takes the place of one direction out of 2 d_h, which two heads would need
        for block in model.layers[1].blocks:
            block.attn.qkv.weight[2 * 48 + 47] = block.attn.qkv.weight[2 * 48 + 46]
    backbone, report = upcycled(model, name, options, tmp_path, attention_experts=4)
    torch.testing.assert_close(last_map(backbone, images(224)), wanted_map(model, images(224)), rtol=1e-3, atol=1e-4)
    assert "100% of all heads' scores, 100%" in str(report)


def test_attention_of_three_heads_starts_near_the_dense_one_and_nearer_than_from_the_mean_of_heads(
    tmp_path: Path,
) -> None:
    name, options = VIT
    model = dense(name, options, query_bias=False)
    wanted = wanted_map(model, images())
    errors = {}
    for start in ("ours", "mean of heads"):
        backbone, report = upcycled(model, name, options, tmp_path, attention_experts=6)
        if start == "mean of heads":
            mean_of_heads(backbone, model)
        errors[start] = float((last_map(backbone, images()) - wanted).norm() / wanted.norm())
    print(errors, report)
    assert errors["ours"] < 0.5 * errors["mean of heads"]


@torch.no_grad()
def mean_of_heads(backbone: LegoBackbone, model: Any) -> None:
    """The plain alternative: keys and values are the mean of the heads' in the first half of the width."""
    for block, layer in zip(model.blocks, backbone.moe_layers().values(), strict=True):
        queries, keys, values = block.attn.qkv.weight.view(3, 3, 16, 48)
        outputs = block.attn.proj.weight.view(48, 3, 16)
        layer.key_value.weight.zero_()
        layer.key_value.weight[:16], layer.key_value.weight[32:48] = keys.mean(0), values.mean(0)
        layer.key_value.bias.zero_()
        layer.key_value.bias[-1] = 1
        for place, expert in enumerate(layer.experts.values()):
            expert.query.weight.zero_()
            expert.query.weight[:16] = queries[place % 3] * 2**0.5
            constant = expert.output.weight[:, -1].clone()
            expert.output.weight.zero_()
            expert.output.weight[:, :16], expert.output.weight[:, -1] = 3 * outputs[:, place % 3], constant


def test_only_experts_that_repeat_others_get_noise_and_it_is_the_seeds(tmp_path: Path) -> None:
    name, options = VIT
    model = dense(name, options)
    moe = {"mlp_experts": 6, "mlp_top_k": 4, "attention_experts": 4}
    exact, other, again = (
        dict(upcycled(model, name, options, tmp_path, noise, **moe)[0].named_parameters()) for noise in (0, 0.1, 0.1)
    )
    assert all(torch.equal(other[key], again[key]) for key in other)
    for key, value in exact.items():
        parts = key.split(".")
        repeated = "experts" in parts and int(parts[parts.index("experts") + 1]) >= (4 if "mlp" in parts else 3)
        assert torch.equal(value, other[key]) != repeated, key


def test_the_report_names_every_tensor_and_other_libraries_names_are_known(tmp_path: Path) -> None:
    name, options = SWIN
    model = dense(name, options)
    torch.save(from_timm(model.state_dict(), "mmdet"), tmp_path / "mm.pth")
    config = BackboneConfig(
        name=name, options=options, units=1, moe=MoeConfig(mlp_experts=4, attention_experts=8, mlp_blocks="every")
    )
    backbone = LegoBackbone(config, seed=1, tasks=["digits"])
    report = load_pretrained(backbone, str(tmp_path / "mm.pth"), noise=0.01, seed=0)
    assert report.convention == "mmdet"
    held = {layer.timm_name(own) for layer in backbone.layers for own in next(iter(layer.units.values())).state_dict()}
    assert {*report.loaded, *report.missing} == held
    assert set(report.upcycled) < set(report.loaded)
    assert set(report.missing.values()) == {NEW}
    assert "upcycled" in str(report)
    assert "experts that repeat others" in str(report)


def test_a_dense_mlp_of_another_width_leaves_the_experts_as_they_are(tmp_path: Path) -> None:
    name, options = VIT
    model = dense(name, options | {"mlp_ratio": 2})
    backbone, report = upcycled(model, name, options, tmp_path, mlp_experts=4)
    assert not report.upcycled
    assert "not in the checkpoint" in report.missing.values()
    assert "norm.weight" in report.loaded
    assert backbone.layers[1].index == 1


def test_a_checkpoint_without_part_of_a_layer_leaves_its_experts_as_they_are(tmp_path: Path) -> None:
    name, options = VIT
    model = dense(name, options)
    del model.blocks[1].attn.proj, model.blocks[1].mlp.fc2
    _, report = upcycled(model, name, options, tmp_path, mlp_experts=4, attention_experts=3)
    assert {key.split(".")[1] for key in report.upcycled} == {"0"}
    assert report.missing["blocks.1.mlp.experts.0.fc1.weight"] == "not in the checkpoint"
