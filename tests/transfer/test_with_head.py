"""A task's path and head leave together: mmdet, mmseg and timm give the predictions that ours gives."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file

from gppf_ds.backbone.controller import Controller
from gppf_ds.backbone.lego import LegoBackbone, Pass
from gppf_ds.config import BackboneConfig
from gppf_ds.errors import UserError
from gppf_ds.simt.model import SimtModel
from gppf_ds.tasks import pyramid
from gppf_ds.tasks.classification import Classification
from gppf_ds.tasks.depth import Depth
from gppf_ds.tasks.detection import Detection
from gppf_ds.tasks.openmm import scope
from gppf_ds.tasks.openmm_task import OpenMMTask
from gppf_ds.tasks.segmentation import Segmentation
from gppf_ds.tasks.task import FeatureInfo, Task
from gppf_ds.train.restore import Trained
from gppf_ds.transfer import with_head
from gppf_ds.transfer.extract import ChosenPath
from gppf_ds.transfer.openmm_backbone import PathBackbone

torch.set_num_threads(1)
CPU = torch.device("cpu")
NARROW = {"channels": [8, 16, 32, 64], "zero_init_last": False}
SWIN = {"depths": (2, 2, 2, 2), "embed_dim": 12, "num_heads": (1, 2, 3, 6)}
CONVNEXT = {"depths": (1, 1, 1, 1), "dims": (8, 16, 24, 32)}
VIT = {"depth": 2, "embed_dim": 24, "num_heads": 2, "img_size": 64}


def export_with_head(network: Trained, task: str, folder: Path) -> list[Path]:
    path = ChosenPath(network.model.backbone, network.controller.path(task))
    return with_head.export_with_head(network, task, path, folder)


def trained(task: Task, name: str, options: dict[str, Any], kinds: str = "plain") -> Trained:
    """A network whose units have all parted ways: parameters and running statistics are random."""
    config = BackboneConfig(name=name, options=options, unit_blocks=kinds.split())  # type: ignore[arg-type]
    backbone = LegoBackbone(config, seed=1)
    torch.manual_seed(2)
    head = pyramid.build_head(task, FeatureInfo(backbone.channels, backbone.strides))
    controller = Controller(["other", "task"], backbone.units)
    model = SimtModel(backbone, {"task": head}, {"task": 1.0}).eval()
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor += 0.1 * torch.randn_like(tensor) * tensor.abs().mean().clamp(min=0.1)
        for row in controller.logits.values():
            row += torch.randn_like(row)
    recipe = SimpleNamespace(tasks={"task": task})
    return Trained(Path("step-1"), 1, model, controller, recipe)  # type: ignore[arg-type]


def our_predictions(network: Trained, task: OpenMMTask, index: int) -> tuple[str, Any]:
    """A val image, and what the network finds in it."""
    sample = task.dataset("val")[index]
    batch = task.preprocess(task.collate([sample]), CPU, training=False)
    passing = Pass(batch.images, network.controller.fixed_route("task"))
    return batch.targets[0].img_path, network.model.predict("task", batch, passing)[0]


def detection(scenes: Path) -> Detection:
    return Detection(
        "mask_rcnn_demo.py",
        2,
        data_root=str(scenes),
        train="annotations/instances_train.json",
        train_images="images/train",
        val="annotations/instances_val.json",
        val_images="images/val",
        overrides={"model.test_cfg.rcnn.score_thr": 0.0},
    )


def segmentation(scenes: Path) -> Segmentation:
    kinds = [(split, kind) for split in ("train", "val") for kind in ("images", "labels")]
    places: dict[str, Any] = {f"{split}_{kind}": f"{kind}/{split}" for split, kind in kinds}
    return Segmentation("upernet_demo.py", 2, data_root=str(scenes), classes="classes.json", **places)


def classification(data: Path) -> Classification:
    return Classification(str(data / "classification"), 4, image_size=64)


def assert_says_what_it_needs(config: Path, backbone: torch.nn.Module) -> None:
    """gppf_ds is in the configuration just where the backbone is ours; that one can be trained further."""
    text = config.read_text()
    assert text.startswith("# Needs gppf_ds installed") == ("gppf" in text) == isinstance(backbone, PathBackbone)
    assert all(parameter.requires_grad for parameter in backbone.parameters())


@pytest.mark.parametrize(
    ("name", "options", "kinds", "expected"),
    [
        ("resnet18d", NARROW, "plain", "ResNetV1d"),
        ("swin_tiny_patch4_window7_224", SWIN, "pad_first", "SwinTransformer"),
        ("convnext_atto", CONVNEXT, "plain", "TIMMBackbone"),
        ("vit_tiny_patch16_224", VIT, "plain", "PathBackbone"),
        ("swinv2_tiny_window8_256", SWIN, "plain", "PathBackbone"),
    ],
)
def test_mmdet_finds_what_the_path_finds(
    tmp_path: Path, demo_data: Path, name: str, options: dict[str, Any], kinds: str, expected: str
) -> None:
    task = detection(demo_data / "scenes")
    network = trained(task, name, options, kinds)
    files = export_with_head(network, "task", tmp_path)
    assert [file.relative_to(tmp_path).as_posix() for file in files] == ["config.py", "checkpoint.pth"]
    with scope("mmdet"):
        from mmdet.apis import inference_detector, init_detector

        model = init_detector(*map(str, files), device="cpu")
        model.load_state_dict(torch.load(files[1], weights_only=True)["state_dict"], strict=True)
        assert type(model.backbone).__name__ == expected
        assert_says_what_it_needs(files[0], model.backbone)
        image, ours = our_predictions(network, task, 0)
        theirs = inference_detector(model, image).pred_instances
    assert len(theirs) == len(ours["boxes"]) > 10
    np.testing.assert_array_equal(theirs.labels.numpy(), ours["labels"])
    np.testing.assert_allclose(theirs.scores.numpy(), ours["scores"], rtol=1e-3)
    np.testing.assert_allclose(theirs.bboxes.numpy(), ours["boxes"], atol=1e-2)


@pytest.mark.parametrize(
    ("name", "options", "kinds", "expected"),
    [
        ("resnet50d", NARROW, "plain", "ResNetV1d"),
        ("resnet26", NARROW, "plain deformable", "PathBackbone"),
        ("swin_tiny_patch4_window7_224", SWIN, "pad_first", "SwinTransformer"),
        ("swin_tiny_patch4_window7_224", SWIN, "plain pad_first", "PathBackbone"),
        ("vit_tiny_patch16_224", VIT | {"patch_size": 14, "reg_tokens": 2, "img_size": 56}, "plain", "PathBackbone"),
    ],
)
def test_mmseg_labels_as_the_path_labels(
    tmp_path: Path, demo_data: Path, name: str, options: dict[str, Any], kinds: str, expected: str
) -> None:
    task = segmentation(demo_data / "scenes")
    network = trained(task, name, options, kinds)
    files = export_with_head(network, "task", tmp_path)
    with scope("mmseg"):
        from mmseg.apis import inference_model, init_model

        model = init_model(*map(str, files), device="cpu")
        model.load_state_dict(torch.load(files[1], weights_only=True)["state_dict"], strict=True)
        assert type(model.backbone).__name__ == expected
        assert_says_what_it_needs(files[0], model.backbone)
        image, ours = our_predictions(network, task, 0)
        theirs = inference_model(model, image).pred_sem_seg.data[0].numpy()
    assert model.dataset_meta["classes"] == task.class_names
    assert len(np.unique(ours)) > 1
    assert (theirs != ours).mean() < 1e-3


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("resnet50", NARROW | {"layers": [1, 2, 1, 1]}),
        ("resnet50d", NARROW | {"layers": [1, 1, 1, 1]}),
        ("swin_tiny_patch4_window7_224", SWIN),
        ("convnext_atto", CONVNEXT | {"head_norm_first": True}),
        ("vit_tiny_patch16_224", VIT),
    ],
)
def test_a_classifier_is_timms(tmp_path: Path, demo_data: Path, name: str, options: dict[str, Any]) -> None:
    task = classification(demo_data)
    network = trained(task, name, options)
    weights, description = export_with_head(network, "task", tmp_path)
    said = json.loads(description.read_text())
    assert said["classes"] == task.class_names
    assert said["timm_options"]["num_classes"] == task.classes == 10
    model = timm.create_model(said["timm_model"], **said["timm_options"]).eval()
    model.load_state_dict(load_file(weights), strict=True)
    images = torch.randn(2, *said["input_size"])
    route = network.controller.fixed_route("task")
    with torch.no_grad():
        features = network.model.backbone([Pass(images, route)], network.model.batch_norm)[0]
        ours = network.model.heads.bank["task"](features)
        torch.testing.assert_close(model(images), ours, rtol=1e-5, atol=1e-5)
    assert ours.std() > 0.01


def test_what_no_library_has_is_refused_with_the_reason(tmp_path: Path, demo_data: Path) -> None:
    scenes = demo_data / "scenes"
    cases: list[tuple[Task, str, dict[str, Any], str]] = [
        (classification(demo_data), "convnext_atto", CONVNEXT, "head_norm_first: true"),
        (Depth(str(scenes), 2, head_channels=32, input_size=(64, 64)), "resnet18", NARROW, "Depth leaves as backbone"),
    ]
    for task, name, options, message in cases:
        with pytest.raises(UserError, match=message):
            export_with_head(trained(task, name, options), "task", tmp_path)
    assert not list(tmp_path.rglob("*.*"))
