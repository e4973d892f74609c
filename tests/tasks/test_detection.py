"""Detection on tiny made images, with the features of a small timm ResNet. The first import of mmdet takes seconds."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as rle
from task_steps import batch_of, features_of
from torch import nn

from gppf_ds.errors import SampleError, UserError
from gppf_ds.tasks.detection import Detection
from gppf_ds.tasks.openmm import scope
from gppf_ds.tasks.task import FeatureInfo

torch.set_num_threads(1)
NARROW_RETINA = {
    "model.neck.out_channels": 16,
    "model.bbox_head.in_channels": 16,
    "model.bbox_head.feat_channels": 16,
    "model.bbox_head.stacked_convs": 1,
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four 96 x 64 images per split with two coloured boxes of 3 classes; the last val image has none."""
    root = tmp_path_factory.mktemp("coco")
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        (root / split).mkdir()
        images: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        for image in range(1, 5):
            pixels = rng.integers(0, 60, (64, 96, 3), dtype=np.uint8)
            for _ in range(0 if (split, image) == ("val", 4) else 2):
                x, y, w, h = (int(v) for v in (*rng.integers(0, 30, 2), *rng.integers(24, 34, 2)))
                kind = int(rng.integers(0, 3))
                pixels[y : y + h, x : x + w, kind] = 220
                annotations.append(
                    {
                        "id": len(annotations) + 1,
                        "image_id": image,
                        "category_id": kind + 1,
                        "bbox": [x, y, w, h],
                        "area": w * h,
                        "iscrowd": 0,
                        "segmentation": [[x, y, x + w, y, x + w, y + h, x, y + h]],
                    }
                )
            Image.fromarray(pixels).save(root / split / f"{image}.png")
            images.append({"id": image, "file_name": f"{image}.png", "width": 96, "height": 64})
        categories = [{"id": k + 1, "name": name} for k, name in enumerate(("red", "green", "blue"))]
        content = {"images": images, "annotations": annotations, "categories": categories}
        (root / f"{split}.json").write_text(json.dumps(content))
    return root


def detection(data: Path, config: str = "mask_rcnn_demo.py", **more: Any) -> Detection:
    places = {"train": "train.json", "val": "val.json", "train_images": "train", "val_images": "val"}
    return Detection(config, 2, data_root=str(data), **places, **more)


def test_loss_reaches_every_head_parameter_and_the_features(data: Path, backbone: nn.Module, info: FeatureInfo) -> None:
    task = detection(data)
    task.check()
    assert task.headline == "segm_AP"
    torch.manual_seed(0)
    head = task.build_head(info)
    batch = batch_of(task, "train", training=True)
    assert batch.images.shape == (2, 3, 96, 128)  # 64 x 96 enlarged to a long side of 128, padded to a factor of 32
    assert batch.images.dtype == torch.float32
    features = features_of(backbone, batch.images)
    terms = head.loss(features, batch.targets)
    assert {"loss_rpn_cls", "loss_rpn_bbox", "loss_cls", "loss_bbox", "loss_mask"} == set(terms)
    assert all(term.shape == () and torch.isfinite(term) for term in terms.values())
    sum(terms.values(), torch.zeros(())).backward()
    assert [name for name, p in head.named_parameters() if p.grad is None] == []
    assert features[0].grad is None  # stride 2: finer than min_stride
    assert all(x.grad is not None and x.grad.abs().sum() > 0 for x in features[1:])


def test_every_head_has_the_classes_of_the_json(data: Path, info: FeatureInfo) -> None:
    head = detection(data).build_head(info)
    assert head.model.roi_head.bbox_head.num_classes == head.model.roi_head.mask_head.num_classes == 3
    cascade = detection(data, "cascade-mask-rcnn_r50_fpn_1x_coco.py").cfg.model
    assert [stage.num_classes for stage in cascade.roi_head.bbox_head] == [3, 3, 3]
    assert cascade.roi_head.mask_head.num_classes == 3
    mask2former = detection(data, "mask2former_r50_8xb2-lsj-50e_coco.py").cfg.model.panoptic_head
    assert mask2former.num_things_classes == 3
    assert mask2former.loss_cls.class_weight == [1.0, 1.0, 1.0, 0.1]


def test_loss_is_a_function_of_the_seed(data: Path, backbone: nn.Module, info: FeatureInfo) -> None:
    task = detection(data)
    totals = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        head = task.build_head(info)
        batch = batch_of(task, "train", training=True)
        totals.append(sum(head.loss(features_of(backbone, batch.images), batch.targets).values()).item())
    assert totals[0] == totals[1] != totals[2]


def test_equals_the_stock_detector(data: Path) -> None:
    """mmdet's own detector with its own backbone, and our head with its weights on that backbone's maps."""
    task = detection(data, overrides={"model.test_cfg.rcnn.score_thr": 0.0})
    with scope("mmdet"):
        from mmdet.registry import MODELS
        from mmengine.config import ConfigDict

        config = ConfigDict(task.cfg.model.to_dict())
        config.backbone.norm_eval = False
        torch.manual_seed(0)
        stock = MODELS.build(config)
        stock.init_weights()
    head = task.build_head(FeatureInfo((64, 128, 256, 512), (4, 8, 16, 32)))
    weights = {name: value for name, value in stock.state_dict().items() if not name.startswith("backbone.")}
    head.model.load_state_dict(weights)

    batch = batch_of(task, "train", training=True)
    stock.train()
    maps = list(stock.backbone(batch.images))
    torch.manual_seed(3)
    expected, _ = stock.parse_losses(stock.loss(batch.images, batch.targets))
    torch.manual_seed(3)
    found = sum(head.loss(maps, batch.targets).values())
    torch.testing.assert_close(found, expected)

    stock.eval(), head.eval()
    batch = batch_of(task, "val", training=False)
    with torch.no_grad():
        results = head.predict(list(stock.backbone(batch.images)), batch.targets)
        reference = stock.predict(batch.images, batch.targets, rescale=True)
    for result, sample in zip(results, reference, strict=True):
        np.testing.assert_allclose(result["boxes"], sample.pred_instances.bboxes.numpy(), rtol=1e-5, atol=1e-4)
        np.testing.assert_array_equal(rle.decode(result["masks"]).transpose(2, 0, 1), sample.pred_instances.masks)
        assert len(result["boxes"]) == 50


def test_predictions_are_of_the_original_image_and_fit_the_metric(
    data: Path, backbone: nn.Module, info: FeatureInfo
) -> None:
    task = detection(data, overrides={"model.test_cfg.rcnn.score_thr": 0.0})
    head = task.build_head(info).eval()
    metric = task.metric()
    samples = task.dataset("val")
    assert len(samples) == 4  # with the image without objects
    seen = []
    for indices in ((0, 1), (2, 3)):
        batch = batch_of(task, "val", False, indices)
        for result in (results := head.predict(features_of(backbone, batch.images), batch.targets)):
            seen.append(result["image_id"])
            assert result["boxes"].dtype == np.float32
            assert (result["boxes"] >= 0).all()
            assert (result["boxes"] <= [96, 64, 96, 64]).all()
            assert result["boxes"][:, 2].max() > 64
            assert {tuple(mask["size"]) for mask in result["masks"]} == {(64, 96)}
            assert set(result["labels"]) <= {0, 1, 2}
        metric.update(pickle.loads(pickle.dumps(results)), batch.targets)
        assert "pred_instances" not in batch.targets[0]
    assert sorted(seen) == [1, 2, 3, 4]
    assert 0 <= metric.compute()[task.headline] <= 1


def test_retinanet_by_shipped_name(data: Path, backbone: nn.Module, info: FeatureInfo) -> None:
    pipeline = [{"type": "LoadImageFromFile"}, {"type": "LoadAnnotations", "with_bbox": True}]
    resize = {"type": "Resize", "scale": (128, 128), "keep_ratio": True}
    small = {"train_dataloader.dataset.pipeline": [*pipeline, resize, {"type": "PackDetInputs"}]}
    task = detection(
        data, "retinanet_r50_fpn_1x_coco.py", overrides=NARROW_RETINA | small, classes=["red", "green", "blue"]
    )
    small_filter = {"train_dataloader.dataset.filter_cfg.min_size": 1}
    task.overrides |= small_filter
    task.check()
    assert task.headline == "bbox_AP"
    head = task.build_head(info)
    batch = batch_of(task, "train", training=True)
    features = features_of(backbone, batch.images)
    terms = head.loss(features, batch.targets)
    assert set(terms) == {"loss_cls", "loss_bbox"}
    sum(terms.values(), torch.zeros(())).backward()
    assert features[1].grad is None  # its FPN starts at stride 8
    assert all(x.grad is not None for x in features[2:])
    assert [name for name, p in head.named_parameters() if p.grad is None] == []


def test_losses_do_not_communicate(data: Path, backbone: nn.Module, info: FeatureInfo, tmp_path: Path) -> None:
    """FCOS averages its number of positives over all ranks: inside a process group that call would be the first."""
    narrow = {**NARROW_RETINA, "model.bbox_head.norm_on_bbox": True}
    narrow |= {"model.bbox_head.norm_cfg": {"type": "SyncBN"}, "model.neck.norm_cfg": {"type": "SyncBN"}}
    config = "fcos_r50-caffe_fpn_gn-head-center-normbbox-centeronreg-giou_1x_coco.py"
    task = detection(data, config, overrides=narrow)
    head = task.build_head(info)
    kinds = {type(module).__name__ for module in head.modules()}
    assert "SyncBatchNorm" not in kinds
    assert "BatchNorm2d" in kinds
    batch = batch_of(detection(data), "train", training=True)

    def forbidden(*_args: Any, **_kwargs: Any) -> None:
        raise AssertionError("a collective was called")

    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.FileStore(str(tmp_path / "s"), 1), rank=0, world_size=1
    )
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.distributed, "all_reduce", forbidden)
            terms = head.loss(features_of(backbone, batch.images), batch.targets)
    finally:
        torch.distributed.destroy_process_group()
    assert all(torch.isfinite(term) for term in terms.values())


def test_data_set_goes_to_a_fresh_process(data: Path, tmp_path: Path) -> None:
    """As to a spawned worker: the pickle comes first, before anything has imported mmdet there."""
    task = detection(data)
    samples = task.dataset("train")
    (tmp_path / "pickle").write_bytes(pickle.dumps((samples, task.collate)))
    code = f"""
import pickle, torch
samples, collate = pickle.loads(open({str(tmp_path / "pickle")!r}, "rb").read())
batch = collate([samples[0]])
print(batch["inputs"][0].float().sum().item())
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, timeout=180, capture_output=True, text=True)
    assert float(done.stdout.split()[-1]) == samples[0]["inputs"].float().sum().item()


def test_an_unreadable_image_is_named(data: Path, tmp_path: Path) -> None:
    task = detection(data)
    places = {"train": str(data / "train.json"), "val": str(data / "val.json")}
    for name in ("1", "2", "3", "4"):
        (tmp_path / f"{name}.png").write_bytes((data / "train" / f"{name}.png").read_bytes()[:60])
    (tmp_path / "2.png").unlink()
    (tmp_path / "3.png").write_bytes(b"")
    task = Detection(
        "mask_rcnn_demo.py", 2, data_root="/", train_images=str(tmp_path), val_images=str(tmp_path), **places
    )
    for index, name in enumerate(("1.png", "2.png", "3.png")):
        with pytest.raises(SampleError, match=name):
            task.dataset("train")[index]


def test_wrong_configuration_is_refused(data: Path, info: FeatureInfo) -> None:
    with pytest.raises(UserError, match="without val, train_images, val_images"):
        Detection("mask_rcnn_demo.py", 2, data_root=str(data), train="train.json")
    with pytest.raises(UserError, match="data_root"):
        Detection("mask_rcnn_demo.py", 2, train="train.json")
    with pytest.raises(UserError, match=r"no configuration nowhere\.py"):
        detection(data, "nowhere.py").check()
    with pytest.raises(UserError, match="Leave classes out"):
        detection(data, classes=["red", "green"]).check()
    with pytest.raises(UserError, match=r"num_classes .* \[5\]"):
        detection(data, overrides={"model.roi_head.bbox_head.num_classes": 5}).check()
    detection(data, overrides={"model": {"roi_head": {"bbox_head": {"num_classes": 3}}}}).check()
    with pytest.raises(UserError, match="overrides"):
        detection(data, overrides={"model.type.nothing": 5}).check()
    with pytest.raises(UserError, match="does not exist"):
        Detection("mask_rcnn_demo.py", 2).check()
    with pytest.raises(UserError, match="feature maps"):
        detection(data).build_head(FeatureInfo((8, 16), (16, 32)))
    with pytest.raises(UserError, match="feature pyramid"):
        detection(data, "faster-rcnn_r50-caffe_c4-1x_coco.py").build_head(info)


def test_the_configurations_own_data_are_used(data: Path) -> None:
    own = {
        f"{split}_dataloader.dataset.{key}": value
        for split in ("train", "val")
        for key, value in (("data_root", str(data)), ("ann_file", f"{split}.json"), ("data_prefix.img", split))
    }
    with pytest.raises(UserError, match="person"):  # CocoDataset's own classes
        Detection("retinanet_r50_fpn_1x_coco.py", 2, overrides=own).check()
    classes = {f"{split}_dataloader.dataset.metainfo": {"classes": ["red", "blue"]} for split in ("train", "val")}
    with pytest.raises(UserError, match=r"\[10\]"):
        Detection("mask_rcnn_demo.py", 2, overrides=own | classes).check()
    counts = {f"model.roi_head.{head}.num_classes": 2 for head in ("bbox_head", "mask_head")}
    task = Detection("mask_rcnn_demo.py", 2, overrides=own | classes | counts)
    task.check()
    assert task.class_names == ["red", "blue"]
    assert len(task.dataset("val")) == 4
