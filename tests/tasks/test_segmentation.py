"""Segmentation on tiny made images, with the features of a small timm ResNet. Importing mmseg takes seconds."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from task_steps import batch_of, features_of
from torch import nn

from gppf_ds.errors import SampleError, UserError
from gppf_ds.tasks.detection import Detection
from gppf_ds.tasks.openmm import scope
from gppf_ds.tasks.segmentation import IoUMetric, Segmentation
from gppf_ds.tasks.task import FeatureInfo
from gppf_ds.tasks.windows import windows_of

torch.set_num_threads(1)
CAMVID = Path(__file__).parents[3] / "shared" / "data" / "segmentation" / "camvid"
NAMES = ["ground", "red", "green"]
FOLDERS = {f"{split}_{kind}": f"{kind}/{split}" for split in ("train", "val") for kind in ("images", "labels")}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four images per split, the odd ones 64 x 96 and the even ones 96 x 64, some pixels to ignore."""
    root = tmp_path_factory.mktemp("seg")
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for kind in ("images", "labels"):
            (root / kind / split).mkdir(parents=True)
        for image in range(1, 5):
            shape = (64, 96) if image % 2 else (96, 64)
            labels = np.kron(rng.integers(0, 3, (4, 4)), np.ones((shape[0] // 4, shape[1] // 4))).astype(np.uint8)
            pixels = rng.integers(0, 60, (*shape, 3), dtype=np.uint8)
            pixels[labels == 1, 0] = pixels[labels == 2, 1] = 220
            labels[:4] = 255
            Image.fromarray(pixels).save(root / "images" / split / f"{image}.jpg")
            Image.fromarray(labels).save(root / "labels" / split / f"{image}_map.png")
    (root / "classes.json").write_text(json.dumps({"classes": NAMES}))
    return root


def segmentation(data: Path, config: str = "upernet_demo.py", **more: Any) -> Segmentation:
    return Segmentation(config, 2, data_root=str(data), **({"classes": "classes.json"} | FOLDERS | more))


def test_loss_reaches_every_head_parameter_and_the_features(data: Path, backbone: nn.Module, info: FeatureInfo) -> None:
    task = segmentation(data)
    task.check()
    assert task.headline == "mIoU"
    head = task.build_head(info)
    assert head.model.decode_head.num_classes == head.model.auxiliary_head.num_classes == 3
    batch = batch_of(task, "train", training=True)
    assert batch.images.shape == (2, 3, 128, 128)
    features = features_of(backbone, batch.images)
    terms = head.loss(features, batch.targets)
    assert set(terms) == {"decode.loss_ce", "aux.loss_ce"}  # mmseg's accuracies are no loss
    sum(terms.values(), torch.zeros(())).backward()
    assert [name for name, p in head.named_parameters() if p.grad is None] == []
    assert features[0].grad is None
    assert all(x.grad is not None and x.grad.abs().sum() > 0 for x in features[1:])


def test_loss_is_a_function_of_the_seed(data: Path, backbone: nn.Module, info: FeatureInfo) -> None:
    task = segmentation(data)
    totals = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        np.random.seed(seed)
        head = task.build_head(info)
        batch = batch_of(task, "train", training=True)
        totals.append(sum(head.loss(features_of(backbone, batch.images), batch.targets).values()).item())
    assert totals[0] == totals[1] != totals[2]


def test_equals_the_stock_segmentor(data: Path) -> None:
    """mmseg's own segmentor with its own backbone, and our head with its weights on that backbone's maps."""
    task = segmentation(data)
    stock, head = stock_with_head(task)
    stock.train(), head.train()
    batch = batch_of(task, "train", training=True)
    maps = list(stock.backbone(batch.images))
    torch.manual_seed(3)
    expected, _ = stock.parse_losses(stock.loss(batch.images, batch.targets))
    torch.manual_seed(3)
    torch.testing.assert_close(sum(head.loss(maps, batch.targets).values()), expected)

    # The running statistics were moved by one and the same batch.
    stock.eval(), head.eval()
    batch = batch_of(task, "val", False, (0, 2))  # of one size, as mmseg wants it
    with torch.no_grad():
        results = head.predict(list(stock.backbone(batch.images)), batch.targets)
        reference = stock.predict(batch.images, batch.targets)
    for result, sample in zip(results, reference, strict=True):
        np.testing.assert_array_equal(result, sample.pred_sem_seg.data[0].numpy())


def test_predictions_are_of_the_original_image(data: Path, backbone: nn.Module, info: FeatureInfo) -> None:
    task = segmentation(data)
    head, metric = task.build_head(info).eval(), task.metric()
    together = batch_of(task, "val", False, (0, 1))
    assert together.images.shape == (2, 3, 128, 128)
    results = head.predict(features_of(backbone, together.images), together.targets)
    assert [(result.shape, result.dtype) for result in results] == [((64, 96), np.uint8), ((96, 64), np.uint8)]
    for index, sample in enumerate(together.targets):
        labels = np.array(Image.open(data / "labels" / "val" / f"{index + 1}_map.png"))
        np.testing.assert_array_equal(sample.gt_sem_seg.data[0].numpy(), labels)
        assert "seg_logits" not in sample
    metric.update(pickle.loads(pickle.dumps(results)), together.targets)
    assert 0 < metric.compute()["aAcc"] < 1
    # Padding must not shift anything: a square-free crop predicted with its own padding only.
    head.model.decode_head.forward = lambda maps: (
        nn.functional.one_hot(  # type: ignore[method-assign]
            torch.arange(128).expand(2, 128, 128) // 16 % 3, 3
        )
        .permute(0, 3, 1, 2)
        .float()
    )
    first, second = head.predict(features_of(backbone, together.images), together.targets)
    columns = torch.arange(128) // 16 % 3
    # Image 1 was enlarged from 96 to 128 columns, image 2 from 64 to 85.
    assert first[0, [5, 17, 30, 42, 90]].tolist() == columns[[6, 23, 40, 56, 120]].tolist()
    assert second[0, [5, 17, 30, 42, 60]].tolist() == columns[[6, 23, 40, 56, 80]].tolist()


SLIDE = {"model.test_cfg": {"mode": "slide", "crop_size": (64, 48), "stride": (40, 31)}}


def stock_with_head(task: Segmentation) -> tuple[Any, Any]:
    """mmseg's own segmentor with its own backbone, and our head with its weights."""
    with scope("mmseg"):
        from mmengine.config import ConfigDict
        from mmseg.registry import MODELS

        torch.manual_seed(0)
        stock = MODELS.build(ConfigDict(task.cfg.model.to_dict())).eval()
        stock.init_weights()
    head = task.build_head(FeatureInfo((64, 128, 256, 512), (4, 8, 16, 32))).eval()
    weights = {name: value for name, value in stock.state_dict().items() if not name.startswith("backbone.")}
    head.model.load_state_dict(weights)
    return stock, head


def test_sliding_windows_equal_those_of_mmseg(data: Path) -> None:
    """A batch of images of two sizes at once, and mmseg's slide_inference on one image after the other."""
    task = segmentation(data, overrides=SLIDE)
    task.check()
    stock, head = stock_with_head(task)
    indices = (0, 1, 2)
    batch = batch_of(task, "val", False, indices)
    assert batch.images.shape == (2 * 4 + 3 * 3 + 2 * 4, 3, 64, 48)  # of images with 85x128 and 128x85 pixels
    with torch.no_grad():
        maps = list(stock.backbone(batch.images))
        ours = [sample.clone() for sample in head._slide(windows_of(task.cfg.model.test_cfg), maps, batch.targets)]
        labels = head.predict(maps, batch.targets)
        for index, mine, found in zip(indices, ours, labels, strict=True):
            single = task.collate([task.dataset("val")[index]])
            [reference] = stock.test_step(single)
            torch.testing.assert_close(mine.seg_logits.data, reference.seg_logits.data, rtol=1e-4, atol=1e-5)
            expected = reference.pred_sem_seg.data[0].numpy()
            assert found.shape == expected.shape == mine.ori_shape
            assert (found != expected).mean() < 1e-3  # where two logits are as good as equal
    assert all("seg_logits" not in sample for sample in batch.targets)


def test_an_image_smaller_than_a_window_is_padded_as_mmseg_pads(data: Path) -> None:
    window = {"model.test_cfg": {"mode": "slide", "crop_size": (160, 160), "stride": (100, 100)}}
    task = segmentation(data, overrides=window)
    stock, head = stock_with_head(task)
    with scope("mmseg"):
        from mmseg.models import SegDataPreProcessor

        settings = {**task.cfg.model.data_preprocessor.to_dict(), "test_cfg": {"size": (160, 160)}}
        settings.pop("type")
        stock.data_preprocessor = SegDataPreProcessor(**settings)
    batch = batch_of(task, "val", False, (0, 1))
    assert batch.images.shape == (2, 3, 160, 160)
    with torch.no_grad():
        labels = head.predict(list(stock.backbone(batch.images)), batch.targets)
        for index, found in enumerate(labels):
            [reference] = stock.test_step(task.collate([task.dataset("val")[index]]))
            np.testing.assert_array_equal(found, reference.pred_sem_seg.data[0].numpy())


def test_impossible_windows_are_refused(data: Path) -> None:
    for wrong in (
        {"stride": 64, "crop_size": 64},
        {"crop_size": (64, 64)},
        {"stride": (65, 64), "crop_size": (64, 64)},
    ):
        with pytest.raises(UserError, match="crop_size"):
            segmentation(data, overrides={"model.test_cfg": {"mode": "slide", **wrong}}).check()


def test_camvid_loads_and_slides_through_the_same_code() -> None:
    if not CAMVID.is_dir():
        pytest.skip(f"{CAMVID} is absent")
    folders = {
        f"{split}_{kind}": f"{folder}/{split}"
        for split in ("train", "val")
        for kind, folder in (("images", "images"), ("labels", "annotations"))
    }
    task = Segmentation(
        "upernet_demo.py",
        2,
        data_root=str(CAMVID),
        classes="classes.json",
        overrides={"model.test_cfg": {"mode": "slide", "crop_size": (64, 64), "stride": (32, 32)}},
        **folders,
    )
    task.check()
    assert (len(task.dataset("train")), len(task.dataset("val")), len(task.class_names)) == (367, 101, 11)
    batch = batch_of(task, "val", False, (0, 100))
    assert batch.images.shape == (2 * 2 * 3, 3, 64, 64)  # 96x128 pixels
    head = task.build_head(FeatureInfo((8, 8, 8, 8), (4, 8, 16, 32))).eval()
    maps = [torch.randn(12, 8, 64 // stride, 64 // stride) for stride in (4, 8, 16, 32)]
    assert [found.shape for found in head.predict(maps, batch.targets)] == [(360, 480)] * 2


def test_metric_is_that_of_mmseg(data: Path) -> None:
    with scope("mmseg"):
        from mmengine.structures import PixelData
        from mmseg.evaluation import IoUMetric as Stock
        from mmseg.structures import SegDataSample

    torch.manual_seed(0)
    stock = Stock()
    stock.dataset_meta = {"classes": ("a", "b", "c", "d", "never")}
    ranks = [IoUMetric(5), IoUMetric(5)]
    for index in range(4):
        truth = torch.randint(0, 3, (1, 20 + index, 30))  # "d" is only predicted
        prediction = torch.where(torch.rand(truth.shape) < 0.7, truth, torch.randint(0, 4, truth.shape))
        truth[:, :5] = 255
        sample = SegDataSample(gt_sem_seg=PixelData(data=truth))
        stock.process({}, [{"pred_sem_seg": {"data": prediction}, "gt_sem_seg": {"data": truth}}])
        ranks[index % 2].update([prediction[0].numpy().astype(np.uint8)], [sample])
    ranks[0].merge([pickle.loads(pickle.dumps(rank.state())) for rank in ranks])
    expected = stock.evaluate(4)
    found = ranks[0].compute()
    assert {key: round(100 * value, 2) for key, value in found.items()} == pytest.approx(
        {key: float(expected[key]) for key in ("mIoU", "mAcc", "aAcc")}, abs=0.011
    )
    assert found["mIoU"] < found["mAcc"]


def test_synchronised_norms_become_local(data: Path, info: FeatureInfo) -> None:
    narrow = {"model.decode_head.channels": 16, "model.auxiliary_head.channels": 16}
    task = segmentation(data, "upernet_r50_4xb2-40k_cityscapes-512x1024.py", overrides=narrow)
    assert task.cfg.model.decode_head.norm_cfg.type == "SyncBN"
    head = task.build_head(info)
    assert not any(isinstance(module, nn.SyncBatchNorm) for module in head.modules())
    assert sum(isinstance(module, nn.BatchNorm2d) for module in head.modules()) > 5


def test_detector_and_segmentor_in_one_process(data: Path, backbone: nn.Module, info: FeatureInfo) -> None:
    """Both libraries have an FPN and a CrossEntropyLoss of their own."""
    torch.manual_seed(0)
    segment = segmentation(data)
    detect = Detection("mask_rcnn_demo.py", 2).build_head(info)
    head = segment.build_head(info)
    assert type(detect.model.roi_head.mask_head.loss_mask).__module__.startswith("mmdet.")
    assert type(head.model.decode_head.loss_decode).__module__.startswith("mmseg.")
    batch = batch_of(segment, "train", training=True)
    features = features_of(backbone, batch.images)
    assert torch.isfinite(sum(head.loss(features, batch.targets).values()))
    with scope("mmdet"):
        from mmdet.structures import DetDataSample
    meta = {"img_id": 1, "img_shape": (128, 128), "ori_shape": (128, 128), "scale_factor": (1.0, 1.0)}
    results = detect.eval().predict(features, [DetDataSample(metainfo=meta) for _ in range(2)])
    assert len(results) == 2


def test_a_class_beyond_the_head_is_named(data: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"_map.png has a pixel of class 2 and the head has 2 classes"):
        segmentation(data, classes=["ground", "red"]).check()
    root = tmp_path / "copy"
    shutil.copytree(data, root)
    labels = np.zeros((64, 96), dtype=np.uint8)
    labels[10, 10] = 7
    Image.fromarray(labels).save(root / "labels" / "train" / "3_map.png")
    with pytest.raises(UserError, match=r"3_map.png has a pixel of class 7"):
        segmentation(root).check()
    samples = segmentation(root).dataset("train")
    assert samples[0] is not None
    with pytest.raises(UserError, match=r"3_map.png has a pixel of class 7"):
        samples[2]


def test_an_unreadable_file_is_named(data: Path, tmp_path: Path) -> None:
    root = tmp_path / "copy"
    shutil.copytree(data, root)
    (root / "images" / "train" / "1.jpg").write_bytes(b"no image")
    (root / "labels" / "train" / "2_map.png").write_bytes(b"")
    samples = segmentation(root).dataset("train")
    with pytest.raises(SampleError, match=r"1\.jpg"):
        samples[0]
    with pytest.raises(SampleError, match=r"2_map\.png"):
        samples[1]
    with pytest.raises(UserError, match=r"2_map\.png"):
        segmentation(root).check()


def test_wrong_configuration_is_refused(data: Path, info: FeatureInfo, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="without train_labels, val_images, val_labels"):
        Segmentation("upernet_demo.py", 2, data_root=str(data), train_images="images/train")
    with pytest.raises(UserError, match="data_root"):
        Segmentation("upernet_demo.py", 2, train_images="images/train")
    with pytest.raises(UserError, match="does not exist"):
        segmentation(data, val_labels="labels/nowhere").check()
    with pytest.raises(UserError, match=r"data/demo/segmentation/images/train does not exist"):
        Segmentation("upernet_demo.py", 2).check()
    with pytest.raises(UserError, match="no label map whose name starts with 1"):
        segmentation(data, val_labels="images").check()
    (tmp_path / "names.json").write_text("[1, 2]")
    with pytest.raises(UserError, match="list of class names"):
        segmentation(data, classes=str(tmp_path / "names.json")).check()
    with pytest.raises(UserError, match="feature maps"):
        segmentation(data).build_head(FeatureInfo((8, 16), (16, 32)))


def test_without_names_the_head_of_the_configuration_stays(data: Path) -> None:
    task = segmentation(data, classes=None)
    task.check()
    assert task.class_names == [str(index) for index in range(3)]
    assert len(task.dataset("val")) == 4
    assert task.metric().state().shape == (3, 3)
