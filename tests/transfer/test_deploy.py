"""ONNX and torch.export give the numbers of the path, at sizes and batches that were not traced."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from gppf_ds.backbone.lego import LegoBackbone
from gppf_ds.config import BackboneConfig
from gppf_ds.errors import UserError
from gppf_ds.transfer import deploy
from gppf_ds.transfer.extract import ChosenPath

RESNET = ("resnet18", {"layers": [1, 1, 1, 1], "channels": [4, 8, 8, 8]})
SWIN = ("swin_tiny_patch4_window7_224", {"depths": (1, 1, 1, 1), "embed_dim": 8, "num_heads": (1, 1, 2, 2)})
VIT = ("vit_tiny_patch16_224", {"depth": 1, "embed_dim": 16, "num_heads": 2})


def chosen(name: str, options: dict[str, Any]) -> ChosenPath:
    backbone = LegoBackbone(BackboneConfig(name=name, options=options), seed=1)
    return ChosenPath(backbone, [index % 2 for index in range(len(backbone.layers))])


def close(path: ChosenPath, images: torch.Tensor, found: Any) -> None:
    for ours, theirs in zip(path(images), found, strict=True):
        assert (ours - torch.as_tensor(theirs)).abs().max() <= 1e-5 * ours.abs().max()


def test_both_graphs_of_a_resnet_take_any_batch_and_size(tmp_path: Path) -> None:
    import onnxruntime

    path = chosen(*RESNET)
    graph = deploy.write(path, (96, 64), tmp_path, onnx=True, program=True)
    assert set(graph.files) == {"model.onnx", "model.pt2"} == {file.name for file in tmp_path.iterdir()}
    assert graph.outputs == ("map_2", "map_4", "map_8", "map_16", "map_32")
    assert graph.difference <= 1e-5
    assert "multiples of 32 from 64 on" in graph.inputs
    program = torch.export.load(tmp_path / "model.pt2").module()
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    assert [output.name for output in session.get_outputs()] == list(graph.outputs)
    for shape in ((1, 3, 64, 160), (5, 3, 128, 64)):
        images = torch.randn(shape)
        close(path, images, program(images))
        close(path, images, session.run(None, {"images": images.numpy()}))


def test_windowed_attention_has_a_fixed_size(tmp_path: Path) -> None:
    path = chosen(*SWIN)
    graph = deploy.write(path, (64, 96), tmp_path, onnx=False, program=True)
    assert graph.files == ("model.pt2",)
    assert graph.inputs == "(B, 3, 64, 96), any B"
    program = torch.export.load(tmp_path / "model.pt2").module()
    images = torch.randn(3, 3, 64, 96)
    close(path, images, program(images))


def test_a_vit_takes_any_number_of_whole_patches(tmp_path: Path) -> None:
    path = chosen(*VIT)
    graph = deploy.write(path, (64, 48), tmp_path, onnx=False, program=True)
    assert "multiples of 16 from 32 on" in graph.inputs
    images = torch.randn(3, 3, 32, 80)
    close(path, images, torch.export.load(tmp_path / "model.pt2").module()(images))


def test_a_size_between_strides_is_fixed(tmp_path: Path) -> None:
    graph = deploy.write(chosen(*RESNET), (70, 64), tmp_path, onnx=False, program=True)
    assert graph.inputs == "(B, 3, 70, 64), any B"


def test_a_graph_with_other_numbers_is_refused() -> None:
    path = chosen(*RESNET)
    with pytest.raises(UserError, match=r"model\.onnx differs from the path by 1\.0e-03"):
        deploy._difference(path, lambda images: [x * 1.001 for x in path(images)], [(64, 64)], "model.onnx")


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deploy, "find_spec", lambda name: None if name == "onnxscript" else object())
    with pytest.raises(UserError, match=r"needs onnxscript: pip install 'gppf-ds\[onnx\]'"):
        deploy.require_onnx()
