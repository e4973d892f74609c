"""A task's path is a plain timm model with the same numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from gppf_ds.backbone.controller import Route
from gppf_ds.backbone.lego import LegoBackbone, Pass
from gppf_ds.backbone.norm import NormPolicy
from gppf_ds.config import BackboneConfig
from gppf_ds.errors import UserError
from gppf_ds.transfer.extract import ChosenPath, largest_difference, plain_model, plain_options

TINY = {"layers": [1, 2, 1, 1], "channels": [4, 8, 8, 8]}
SWIN = {"depths": (1, 2, 1, 2), "embed_dim": 8, "num_heads": (1, 1, 2, 2)}
VIT = {"depth": 3, "embed_dim": 16, "num_heads": 2}
FAMILIES: dict[str, tuple[dict[str, Any], tuple[int, int]]] = {
    "resnet50": (TINY, (70, 45)),
    "resnet18": ({"layers": [1, 1, 1, 1]}, (70, 45)),
    "resnet50d": (TINY, (70, 45)),
    "convnext_atto": ({"depths": (1, 2, 1, 1), "dims": (8, 8, 16, 16)}, (70, 45)),
    "convnextv2_atto": ({"depths": (1, 2, 1, 1), "dims": (8, 8, 16, 16)}, (64, 45)),
    "vit_tiny_patch16_224": (VIT, (70, 45)),
    "vit_small_patch14_reg4_dinov2": ({**VIT, "img_size": 70}, (60, 42)),
    "swin_tiny_patch4_window7_224": (SWIN, (72, 44)),
    "swinv2_tiny_window8_256": (SWIN, (72, 44)),
}


def network(name: str, options: dict[str, Any], kind: str = "plain") -> LegoBackbone:
    """A backbone whose two units have all parted ways, running statistics included."""
    config = BackboneConfig(name=name, options=options, unit_blocks=[kind, kind])  # type: ignore[list-item]
    backbone = LegoBackbone(config, seed=1).eval()
    torch.manual_seed(2)
    for tensor in backbone.state_dict().values():
        if tensor.is_floating_point():
            tensor += 0.2 * torch.rand_like(tensor) * tensor.abs().mean().clamp(min=0.1)
    return backbone


def some_path(backbone: LegoBackbone) -> tuple[int, ...]:
    return tuple(index % 3 % 2 for index in range(len(backbone.layers)))


@torch.no_grad()
def lego_maps(backbone: LegoBackbone, path: tuple[int, ...], images: torch.Tensor) -> list[torch.Tensor]:
    route = Route(torch.ones(len(path), 2), path)
    return backbone([Pass(images, route)], NormPolicy())[0]


@pytest.mark.parametrize("name", FAMILIES)
def test_a_path_is_a_plain_model_with_the_same_maps(name: str) -> None:
    options, size = FAMILIES[name]
    backbone = network(name, options)
    path = some_path(backbone)
    chosen = ChosenPath(backbone, path)
    model = plain_model(name, plain_options(chosen, size), ChosenPath(backbone, path).state())
    images = torch.randn(2, 3, *size)
    ours = lego_maps(backbone, path, images)
    with torch.no_grad():
        copies = chosen(images)
        theirs = model.forward_intermediates(images, indices=len(ours), norm=True, intermediates_only=True)
    if chosen.windowed:  # the heads are given normed maps
        theirs[:-1] = [F.layer_norm(x.permute(0, 2, 3, 1), x.shape[1:2]).permute(0, 3, 1, 2) for x in theirs[:-1]]
    for one, copy, other in zip(ours, copies, theirs, strict=True):
        assert torch.equal(one, copy)
        assert (one - other).abs().max() <= 1e-6 * one.abs().max()
    assert largest_difference(chosen, model, size) <= 1e-6
    other_path = ChosenPath(backbone, [1 - unit for unit in path])
    assert largest_difference(other_path, model, size) > 1e-3


def test_swin_on_images_larger_than_its_own() -> None:
    size = (288, 128)
    name = "swin_tiny_patch4_window7_224"
    backbone = network(name, SWIN)
    chosen = ChosenPath(backbone, some_path(backbone))
    options = plain_options(chosen, size)
    assert options["always_partition"]
    assert largest_difference(chosen, plain_model(name, options, chosen.state()), size) <= 1e-6
    assert largest_difference(chosen, plain_model(name, chosen.timm_options, chosen.state()), size) > 1e-5


def test_a_path_is_a_copy() -> None:
    backbone = network("resnet50", TINY)
    path = some_path(backbone)
    chosen = ChosenPath(backbone, path)
    before = {name: tensor.clone() for name, tensor in chosen.state().items()}
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.fill_(float("nan"))
    assert all(torch.equal(before[name], tensor) for name, tensor in chosen.state().items())
    assert not chosen.training


def test_units_of_other_tasks_do_not_matter() -> None:
    backbone = network("resnet50", TINY)
    path = some_path(backbone)
    first = {name: tensor.clone() for name, tensor in ChosenPath(backbone, path).state().items()}
    for layer, unit in zip(backbone.layers, path, strict=True):
        for parameter in layer.units[str(1 - unit)].parameters():
            parameter.data.fill_(float("nan"))
    second = ChosenPath(backbone, path).state()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_path_that_timm_cannot_have_is_refused() -> None:
    backbone = network("resnet50", TINY, "deformable")
    chosen = ChosenPath(backbone, some_path(backbone))
    assert chosen.kinds == {"deformable"}
    with pytest.raises(UserError, match=r"conv_offset.*backbone\.unit_blocks"):
        plain_model("resnet50", chosen.timm_options, chosen.state())
