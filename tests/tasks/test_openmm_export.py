"""What mmdet and mmseg make of an exported detector and segmentor, by their own tools, against our own numbers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from pycocotools import mask as rle
from torch import Tensor

from gppf_ds.backbone import names
from gppf_ds.backbone.vit import FAMILY as VIT_FAMILY
from gppf_ds.errors import UserError
from gppf_ds.tasks import pyramid
from gppf_ds.tasks.detection import Detection
from gppf_ds.tasks.openmm import scope
from gppf_ds.tasks.openmm_export import find_backbone
from gppf_ds.tasks.openmm_task import OpenMMTask
from gppf_ds.tasks.segmentation import Segmentation
from gppf_ds.tasks.task import FeatureInfo, Head, OwnBackbone, PlainPath
from gppf_ds.transfer.openmm_backbone import PathBackbone

torch.set_num_threads(1)
CPU = torch.device("cpu")
CLASSES = ["red", "green", "blue"]
NARROW = {"channels": [8, 16, 32, 64], "zero_init_last": False}
SHALLOW = NARROW | {"layers": [1, 1, 1, 1]}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four 90 x 64 images per split (the pipelines' 128 x 91 is no multiple of 32) with two boxes of 3 classes."""
    root = tmp_path_factory.mktemp("coco")
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        (root / split).mkdir()
        (root / f"{split}_labels").mkdir()
        images: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        for image in range(1, 5):
            pixels = rng.integers(0, 255, (64, 90, 3), dtype=np.uint8)
            labels = np.full((64, 90), 255, dtype=np.uint8)
            for _ in range(2):
                x, y, w, h = (int(v) for v in (*rng.integers(0, 30, 2), *rng.integers(24, 34, 2)))
                kind = int(rng.integers(0, 3))
                pixels[y : y + h, x : x + w, kind] = 220
                labels[y : y + h, x : x + w] = kind
                annotations.append(coco_object(len(annotations) + 1, image, kind, [x, y, w, h]))
            Image.fromarray(pixels).save(root / split / f"{image}.png")
            Image.fromarray(labels).save(root / f"{split}_labels" / f"{image}.png")
            images.append({"id": image, "file_name": f"{image}.png", "width": 90, "height": 64})
        categories = [{"id": k + 1, "name": name} for k, name in enumerate(CLASSES)]
        content = {"images": images, "annotations": annotations, "categories": categories}
        (root / f"{split}.json").write_text(json.dumps(content))
    return root


def coco_object(number: int, image: int, kind: int, box: list[float], mask: Any = None) -> dict[str, Any]:
    x, y, w, h = box
    outline = [[x, y, x + w, y, x + w, y + h, x, y + h]]
    common = {"id": number, "image_id": image, "category_id": kind + 1, "iscrowd": 0}
    return {**common, "bbox": box, "area": w * h, "segmentation": mask or outline}


def detection(data: Path, **more: Any) -> Detection:
    places = {"train": "train.json", "val": "val.json", "train_images": "train", "val_images": "val"}
    threshold = {"model.test_cfg.rcnn.score_thr": 0.0}
    return Detection("mask_rcnn_demo.py", 2, data_root=str(data), overrides=threshold, **{**places, **more})


def segmentation(data: Path, **more: Any) -> Segmentation:
    places: dict[str, Any] = {"train_images": "train", "train_labels": "train_labels"}
    places |= {"val_images": "val", "val_labels": "val_labels"}
    return Segmentation("upernet_demo.py", 2, data_root=str(data), classes=CLASSES, **places, **more)


def plain_path(name: str, options: Mapping[str, Any]) -> tuple[PlainPath, FeatureInfo]:
    """A timm model of random weights and running statistics."""
    torch.manual_seed(0)
    model = timm.create_model(name, features_only=True, feature_cls="getter", **options).eval()
    for value in model.state_dict().values():
        if value.is_floating_point():
            value += 0.1 * torch.randn_like(value) * value.abs().mean().clamp(min=0.1)
    state = {name.removeprefix("model."): value for name, value in model.state_dict().items()}

    @torch.no_grad()
    def maps(images: Tensor) -> list[Tensor]:
        return model(images)

    def renamed(convention: str) -> dict[str, Tensor]:
        prefix = names.PREFIXES[convention]
        return {name.removeprefix(prefix): value for name, value in names.from_timm(state, convention).items()}

    info = FeatureInfo(tuple(model.feature_info.channels()), tuple(model.feature_info.reduction()))
    return PlainPath(name, {**options, "num_classes": 0}, state, renamed, maps), info


def build_head(task: OpenMMTask, info: FeatureInfo) -> Head:
    """With its predictors far from zero, so that predictions differ."""
    torch.manual_seed(1)
    head = task.build_head(info).eval()
    with torch.no_grad():
        for name, parameter in head.named_parameters():
            if any(part in name for part in ("fc_cls", "rpn_cls", "conv_seg", "conv_logits")):
                parameter.normal_(0, 0.05)
    return head


def our_predictions(task: OpenMMTask, head: Head, path: PlainPath) -> tuple[list[Any], dict[str, float]]:
    """The predictions of all val images, and the metric."""
    samples, metric, predictions = task.dataset("val"), task.metric(), []
    for index in range(len(samples)):
        batch = task.preprocess(task.collate([samples[index]]), CPU, training=False)
        found = head.predict(path.maps(batch.images), batch.targets)
        metric.update(found, batch.targets)
        predictions += found
    return predictions, metric.compute()


HIDE_GPPF_DS = """
for name in [name for name in sys.modules if name.split(".")[0] == "gppf_ds"]:
    del sys.modules[name]
sys.modules["gppf_ds"] = None
"""


def stock_test(library: str, folder: Path, hide: str = HIDE_GPPF_DS) -> dict[str, float]:
    """What the library's ``tools/test.py`` prints, in a process that cannot import gppf_ds.

    Only mmcv's compiled operators, where mmcv lacks them, are ours.
    """
    code = f"""
import runpy, sys, {library}
from pathlib import Path
from gppf_ds.tasks import mmcv_ops
mmcv_ops.install()
{hide}
tool = Path({library}.__file__).parent / ".mim" / "tools" / "test.py"
sys.argv = [str(tool), "config.py", "checkpoint.pth", "--work-dir", "work"]
runpy.run_path(str(tool), run_name="__main__")
"""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, timeout=400)
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    (result,) = (folder / "work").glob("*/*.json")
    return json.loads(result.read_text())


BACKBONES = {"native": ("resnet18", NARROW), "timm": ("resnet50", SHALLOW)}


@pytest.fixture(scope="module", params=list(BACKBONES))
def detector(request: pytest.FixtureRequest, data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """An exported detector whose val objects are some of its own predictions, half of them changed: AP is not 0."""
    path, info = plain_path(*BACKBONES[request.param])
    head = build_head(detection(data), info)
    objects: list[dict[str, Any]] = []
    for image, found in enumerate(our_predictions(detection(data), head, path)[0], start=1):
        for index in range(0, len(found["boxes"]), 5):
            x1, y1, x2, y2 = (float(v) for v in found["boxes"][index])
            box, mask = [x1, y1, (x2 - x1) * 0.8, y2 - y1], None
            if index % 2:
                mask = {"size": [64, 90], "counts": found["masks"][index]["counts"].decode()}
                box = [x1, y1, x2 - x1, y2 - y1]
            objects.append(coco_object(len(objects) + 1, image, int(found["labels"][index]), box, mask))
    content = json.loads((data / "val.json").read_text()) | {"annotations": objects}
    folder = tmp_path_factory.mktemp("export")
    (folder / "val.json").write_text(json.dumps(content))
    task = detection(data, val=str(folder / "val.json"))
    return {"kind": request.param, "task": task, "head": head, "path": path, "files": task.export(head, path, folder)}


def test_an_exported_detector_needs_no_gppf_ds_and_loads_strictly(detector: dict[str, Any]) -> None:
    from mmengine.config import Config

    config, checkpoint = detector["files"]
    assert "gppf" not in config.read_text()
    loaded = torch.load(checkpoint, weights_only=True)
    assert loaded["meta"]["dataset_meta"]["classes"] == CLASSES
    with scope("mmdet"):
        from mmengine.registry import MODELS

        cfg = Config.fromfile(str(config))
        model = MODELS.build(cfg.model)
    model.load_state_dict(loaded["state_dict"], strict=True)
    assert cfg.model.backbone.type == {"native": "ResNet", "timm": "mmseg.TIMMBackbone"}[detector["kind"]]
    assert cfg.model.data_preprocessor == detector["task"].cfg.model.data_preprocessor


def test_mmdets_inference_gives_our_predictions(detector: dict[str, Any], data: Path) -> None:
    predictions, metrics = our_predictions(detector["task"], detector["head"], detector["path"])
    assert 0.2 < metrics["bbox_AP"] < 0.99
    with scope("mmdet"):
        from mmdet.apis import inference_detector, init_detector

        model = init_detector(*map(str, detector["files"]), device="cpu")
        assert list(model.dataset_meta["classes"]) == CLASSES
        for image, ours in enumerate(predictions, start=1):
            theirs = inference_detector(model, str(data / "val" / f"{image}.png")).pred_instances
            assert len(theirs) == len(ours["boxes"]) > 10
            np.testing.assert_array_equal(theirs.labels.numpy(), ours["labels"])
            np.testing.assert_allclose(theirs.scores.numpy(), ours["scores"], rtol=1e-4)
            np.testing.assert_allclose(theirs.bboxes.numpy(), ours["boxes"], atol=1e-3)
            masks = rle.decode(ours["masks"]).transpose(2, 0, 1)
            assert (theirs.masks.numpy() != masks).mean() < 1e-4


@pytest.mark.parametrize("detector", ["timm"], indirect=True)
def test_mmdets_test_tool_gives_our_metric(detector: dict[str, Any]) -> None:
    _, ours = our_predictions(detector["task"], detector["head"], detector["path"])
    theirs = stock_test("mmdet", detector["files"][0].parent)
    for kind in ("bbox", "segm"):
        assert theirs[f"coco/{kind}_mAP"] == pytest.approx(ours[f"{kind}_AP"], abs=1e-3)


@pytest.fixture(scope="module", params=list(BACKBONES))
def segmentor(request: pytest.FixtureRequest, data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """An exported segmentor."""
    path, info = plain_path(*BACKBONES[request.param])
    task = segmentation(data)
    head = build_head(task, info)
    files = task.export(head, path, tmp_path_factory.mktemp("export"))
    return {"task": task, "head": head, "path": path, "files": files}


def test_mmsegs_inference_gives_our_label_maps(segmentor: dict[str, Any], data: Path) -> None:
    config, checkpoint = segmentor["files"]
    assert "gppf" not in config.read_text()
    predictions, metrics = our_predictions(segmentor["task"], segmentor["head"], segmentor["path"])
    assert 0.02 < metrics["mIoU"] < 0.9
    with scope("mmseg"):
        from mmseg.apis import inference_model, init_model

        model = init_model(str(config), str(checkpoint), device="cpu")
        model.load_state_dict(torch.load(checkpoint, weights_only=True)["state_dict"], strict=True)
        assert list(model.dataset_meta["classes"]) == CLASSES
        for image, ours in enumerate(predictions, start=1):
            theirs = inference_model(model, str(data / "val" / f"{image}.png")).pred_sem_seg.data[0].numpy()
            assert theirs.shape == ours.shape == (64, 90)
            assert len(np.unique(ours)) > 1
            assert (theirs != ours).mean() < 1e-3


@pytest.mark.parametrize("segmentor", ["native"], indirect=True)
def test_mmsegs_test_tool_gives_our_metric(segmentor: dict[str, Any]) -> None:
    _, ours = our_predictions(segmentor["task"], segmentor["head"], segmentor["path"])
    theirs = stock_test("mmseg", segmentor["files"][0].parent)
    for name in ("mIoU", "mAcc", "aAcc"):
        assert theirs[name] == pytest.approx(100 * ours[name], abs=0.06)


def test_mmsegs_test_tool_runs_a_backbone_of_ours(data: Path, tmp_path: Path) -> None:
    """A ViT and its pyramid, where gppf_ds is installed."""
    name, options = "vit_tiny_patch16_224", {"depth": 2, "embed_dim": 24, "num_heads": 2, "img_size": 64}
    config: dict[str, Any] = {"timm_model": name, "timm_options": {**VIT_FAMILY.options, **options, "num_classes": 0}}
    config |= {"unit_blocks": ["plain"] * 3}
    torch.manual_seed(0)
    backbone = PathBackbone(**config, out_indices=[0]).eval()
    own = OwnBackbone({"type": f"{PathBackbone.__module__}.PathBackbone", **config}, backbone.state_dict())

    @torch.no_grad()
    def maps(images: Tensor) -> list[Tensor]:
        return list(backbone(images))

    path = PlainPath(name, options, {}, lambda convention: {}, maps, own)
    task = segmentation(data)
    head = pyramid.build_head(task, FeatureInfo((24,), (16,))).eval()
    assert isinstance(head, pyramid.PyramidHead)
    with torch.no_grad():
        head.get_parameter("head.model.decode_head.conv_seg.weight").normal_(0, 0.05)
    with pytest.raises(UserError, match="no backbone for mmseg gives its maps"):
        task.export(head, replace(path, fallback=None), tmp_path)
    assert not list(tmp_path.iterdir())
    task.export(head, path, tmp_path)
    _, ours = our_predictions(task, head, path)
    theirs = stock_test("mmseg", tmp_path, hide="")
    assert 0.02 < ours["mIoU"] < 0.9
    for name in ("mIoU", "mAcc", "aAcc"):
        assert theirs[name] == pytest.approx(100 * ours[name], abs=0.06)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("seresnet50", NARROW),
        ("resnext50_32x4d", {}),
        ("resnet50t", NARROW),
        ("resnet50", NARROW | {"act_layer": "silu"}),
    ],
)
def test_resnets_of_another_kind_come_from_timm(name: str, options: dict[str, Any]) -> None:
    """Their depth is that of mmseg's ResNet-50; other parts, other shapes and other numbers are all noticed."""
    path, _ = plain_path(name, options)
    assert find_backbone("mmseg", path, [1, 2, 3, 4]).config["type"] == "mmseg.TIMMBackbone"
