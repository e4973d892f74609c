"""A task's path leaves as a plain timm model with the same numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file

from gppf_ds.backbone.controller import Controller, Route
from gppf_ds.backbone.lego import LegoBackbone, Pass
from gppf_ds.backbone.norm import NormPolicy
from gppf_ds.config import BackboneConfig
from gppf_ds.simt.model import SimtModel
from gppf_ds.train.restore import Trained
from gppf_ds.transfer import extract

TINY = {"layers": [1, 2, 1, 1], "channels": [4, 8, 8, 8]}


def trained(name: str = "resnet50", options: dict[str, Any] = TINY) -> Trained:
    """A network whose units have all parted ways: parameters and running statistics are random."""
    backbone = LegoBackbone(BackboneConfig(name=name, options=options), seed=1)
    torch.manual_seed(2)
    for tensor in backbone.state_dict().values():
        if tensor.is_floating_point():
            tensor += 0.2 * torch.rand_like(tensor)
    controller = Controller(["a", "b"], backbone.units)
    with torch.no_grad():
        for row in controller.logits.values():
            row += torch.randn_like(row)
    return Trained(Path("step-1"), 1, SimtModel(backbone, {}, {}).eval(), controller, None)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "options"), [("resnet50", TINY), ("resnet18", {"layers": [1, 1, 1, 1]}), ("resnet50d", TINY)]
)
def test_an_export_loads_strictly_and_gives_the_features_of_the_path(
    tmp_path: Path, name: str, options: dict[str, Any]
) -> None:
    network = trained(name, options)
    assert network.controller.path("a") != network.controller.path("b")
    for task in ("a", "b"):
        file = extract.export(network, task, tmp_path)
        model = timm.create_model(name, num_classes=0, **options)
        model.load_state_dict(load_file(file), strict=True)
        images = torch.randn(2, 3, 70, 45)
        path = network.controller.path(task)
        route = Route(torch.ones(len(path), 2), path)
        with torch.no_grad():
            ours = network.model.backbone([Pass(images, route)], NormPolicy())[0][-1]
            assert torch.equal(model.eval().forward_features(images), ours)


def test_units_of_other_tasks_do_not_leak_into_an_export(tmp_path: Path) -> None:
    network = trained()
    first = load_file(extract.export(network, "a", tmp_path))
    for layer, unit in zip(network.model.backbone.layers, network.controller.path("a"), strict=True):
        for parameter in layer.units[1 - unit].parameters():
            parameter.data.fill_(float("nan"))
    second = load_file(extract.export(network, "a", tmp_path))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_an_export_that_differs_from_its_path_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network = trained()
    right = extract.path_state

    def wrong(backbone: LegoBackbone, path: Any) -> dict[str, torch.Tensor]:
        return right(backbone, [1 - unit for unit in path])

    monkeypatch.setattr(extract, "path_state", wrong)
    with pytest.raises(RuntimeError, match="differs from its path"):
        extract.export(network, "a", tmp_path)
