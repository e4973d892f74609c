"""Paths that begin alike run their common beginning once, and give the maps that each gives alone."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any

import pytest
import timm
import torch
from torch import Tensor

from gppf_ds.backbone import convnext, lego, swin, vit
from gppf_ds.backbone.blocks import Family
from gppf_ds.backbone.controller import Route
from gppf_ds.backbone.lego import LegoBackbone, Pass
from gppf_ds.backbone.norm import NormPolicy
from gppf_ds.backbone.shared import shared_forward, units_run
from gppf_ds.config import BackboneConfig

torch.set_num_threads(1)

PATHS = {
    "a": (0, 1, 1, 0, 0, 1, 0),
    "b": (0, 1, 1, 0, 1, 1, 0),  # leaves a at layer 4
    "c": (0, 1, 0, 0, 0, 1, 0),  # leaves both at layer 2
    "d": (0, 1, 1, 0, 0, 1, 0),  # as a
    "e": (1, 1, 1, 0, 0, 1, 0),  # as a but for the stem: nothing to share
}


def build(name: str, options: dict[str, Any]) -> LegoBackbone:
    """A network whose units have all parted ways."""
    made = LegoBackbone(BackboneConfig(name=name, options=options), seed=1)
    torch.manual_seed(2)
    for tensor in made.state_dict().values():
        if tensor.is_floating_point():
            tensor += 0.2 * torch.rand_like(tensor)
    return made.eval()


@pytest.fixture(scope="module")
def backbone() -> LegoBackbone:
    """Seven layers: stem, 3 + 1 + 1 + 1 blocks."""
    return build("resnet50", {"layers": [3, 1, 1, 1], "channels": [4, 8, 8, 8]})


def alone(backbone: LegoBackbone, images: Tensor, path: tuple[int, ...]) -> list[Tensor]:
    with torch.no_grad():
        return backbone([Pass(images, Route(torch.ones(len(path), 2), path))], NormPolicy())[0]


def calls(backbone: LegoBackbone, images: Tensor, paths: Mapping[str, tuple[int, ...]]) -> list[int]:
    """The layers in the order in which they ran."""
    run: list[int] = []
    hooks = [
        layer.register_forward_hook(lambda *_, index=index: run.append(index))
        for index, layer in enumerate(backbone.layers)
    ]
    shared_forward(backbone, images, paths)
    for hook in hooks:
        hook.remove()
    return run


def test_every_task_gets_the_maps_of_its_path_alone(backbone: LegoBackbone) -> None:
    images = torch.randn(2, 3, 70, 45, generator=torch.Generator().manual_seed(0))
    shared = shared_forward(backbone, images, PATHS)
    assert list(shared) == list(PATHS)
    for task, path in PATHS.items():
        for ours, theirs in zip(shared[task], alone(backbone, images, path), strict=True):
            assert torch.equal(ours, theirs)
    assert not torch.equal(shared["a"][-1], shared["b"][-1])
    assert not torch.equal(shared["a"][0], shared["e"][0])


@pytest.mark.parametrize(
    ("family", "name", "options"),
    [
        (vit.FAMILY, "vit_tiny_patch16_224", {"embed_dim": 48, "depth": 6, "num_heads": 3}),
        (swin.FAMILY, "swin_tiny_patch4_window7_224", {"embed_dim": 24, "depths": [2, 2, 1, 1], "num_heads": [1] * 4}),
        (convnext.FAMILY, "convnext_tiny", {"dims": [8, 8, 16, 16], "depths": [2, 2, 1, 1]}),
    ],
    ids=["vit", "swin", "convnext"],
)
def test_every_family_shares(
    monkeypatch: pytest.MonkeyPatch, family: Family, name: str, options: dict[str, Any]
) -> None:
    module = timm.model_entrypoint(name).__module__.rsplit(".", 1)[-1]
    monkeypatch.setitem(lego.FAMILIES, module, family)
    made = build(name, options)
    paths = {task: path[: len(made.layers)] for task, path in PATHS.items()}
    images = torch.randn(1, 3, 75, 45, generator=torch.Generator().manual_seed(0))
    shared = shared_forward(made, images, paths)
    for task, path in paths.items():
        for ours, theirs in zip(shared[task], alone(made, images, path), strict=True):
            assert torch.equal(ours, theirs)


def test_a_common_beginning_runs_once(backbone: LegoBackbone) -> None:
    images = torch.randn(1, 3, 32, 32)
    run = calls(backbone, images, PATHS)
    assert sorted(run) == [0, 0, 1, 1, *[2] * 3, *[3] * 3, *[4] * 4, *[5] * 4, *[6] * 4]
    assert len(run) == units_run(PATHS.values())
    assert calls(backbone, images, {"a": PATHS["a"], "d": PATHS["d"]}) == list(range(7))


def test_units_run_counts_different_beginnings() -> None:
    assert units_run([]) == 0
    assert units_run([(0, 1, 0)]) == units_run([(0, 1, 0), (0, 1, 0)]) == 3
    assert units_run([(0, 1, 0), (0, 1, 1)]) == 4
    assert units_run([(0, 1, 0), (1, 1, 0)]) == 6  # equal again behind the fork, but on other maps


def test_a_map_goes_when_no_branch_needs_it(backbone: LegoBackbone) -> None:
    """Res2.0 and Res2.1 (layers 1 and 2) hand no map to the heads."""
    outputs: list[tuple[int, weakref.ref[Tensor]]] = []
    alive: list[tuple[int, list[int]]] = []

    def before(index: int, *_: Any) -> None:
        alive.append((index, [layer for layer, ref in outputs if ref() is not None]))

    def after(index: int, output: tuple[Tensor]) -> None:
        if index in (1, 2):
            outputs.append((index, weakref.ref(output[0])))

    hooks = []
    for index, layer in enumerate(backbone.layers):
        hooks.append(layer.register_forward_pre_hook(lambda *_, i=index: before(i)))
        hooks.append(layer.register_forward_hook(lambda _m, _i, output, i=index: after(i, output)))
    shared_forward(backbone, torch.randn(1, 3, 32, 32), {"a": PATHS["a"], "c": PATHS["c"]})
    for hook in hooks:
        hook.remove()
    branch = [(2, [1]), (3, [1, 2]), (4, [1]), (5, [1]), (6, [1])]  # the output of layer 1 waits for the other branch
    last = [(2, [1]), (3, [2]), (4, []), (5, []), (6, [])]
    assert alive == [(0, []), (1, []), *branch, *last]


def test_training_mode_is_refused(backbone: LegoBackbone) -> None:
    backbone.train()
    try:
        with pytest.raises(ValueError, match="eval"):
            shared_forward(backbone, torch.randn(1, 3, 32, 32), PATHS)
    finally:
        backbone.eval()
