"""The segmentation sets of the catalogue: made in their official layouts, read by mmseg's stock configurations."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from task_steps import Stages, batch_of

from gppf_ds.data.sets.segmentation import SOURCES, voc_palette
from gppf_ds.errors import SampleError, UserError
from gppf_ds.tasks.openmm import scope
from gppf_ds.tasks.segmentation import Segmentation
from gppf_ds.tasks.task import FeatureInfo

torch.set_num_threads(1)
INFO = FeatureInfo((8, 8, 8, 8), (4, 8, 16, 32))
CONFIGS = {
    "ade20k": "upernet_r50_4xb4-160k_ade20k-512x512.py",
    "voc2012aug": "upernet_r50_4xb4-40k_voc12aug-512x512.py",
    "cocostuff164k": "deeplabv3_r50-d8_4xb4-80k_coco-stuff164k-512x512.py",
}
LABELS = {
    "ade20k": "annotations/training/ADE_train_00000002.png",
    "voc2012aug": "SegmentationClassAug/2008_000002.png",
    "cocostuff164k": "annotations/train2017/000000000002_labelTrainIds.png",
}
EXPECTED = {
    "ade20k": {"train images": 6, "val images": 3},
    "voc2012aug": {"train images": 4, "aug images": 4, "val images": 3},
    "cocostuff164k": {"train images": 6, "val images": 3},
}
every_set = pytest.mark.parametrize("name", CONFIGS)


@pytest.fixture(scope="module")
def roots(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {name: tmp_path_factory.mktemp(name) for name in SOURCES}
    for name, root in made.items():
        SOURCES[name].smoke(root)
    return made


@pytest.fixture
def copy(roots: dict[str, Path], tmp_path: Path, name: str) -> Path:
    return Path(shutil.copytree(roots[name], tmp_path / "copy"))


def stock_task(name: str, root: Path | None) -> Segmentation:
    """The stock configuration with narrow heads."""
    overrides = {"model.decode_head.channels": 16, "model.auxiliary_head.channels": 16}
    data_root = None if root is None else str(root)
    return Segmentation(CONFIGS[name], 4, data_root=data_root, overrides=overrides, source=name)


@every_set
def test_clean_smoke_set_has_the_layout_and_no_faults(roots: dict[str, Path], name: str) -> None:
    source, root = SOURCES[name], roots[name]
    assert [place for place in source.layout if not (root / place).exists()] == []
    assert source.count(root) == EXPECTED[name]
    assert source.counts.keys() == EXPECTED[name].keys()
    assert source.faults(root, 5) == []
    assert source.count(root / "elsewhere") == dict.fromkeys(EXPECTED[name], 0)


def test_palette_is_that_of_mmseg() -> None:
    with scope("mmseg"):
        from mmseg.datasets import PascalVOCDataset
    assert voc_palette(21) == [value for colour in PascalVOCDataset.METAINFO["palette"] for value in colour]


@every_set
def test_stock_configuration_trains_and_evaluates(roots: dict[str, Path], name: str) -> None:
    """use_data and shrink, mmseg's data set and transforms, one backward, and the metric against mmseg's own."""
    task = stock_task(name, None)
    task.use_data(roots[name])
    task.shrink()
    task.check()
    assert task.source == name
    counts = EXPECTED[name]
    train = len(task.dataset("train"))
    assert train == sum(counts.values()) - counts["val images"]
    assert len(task.dataset("val")) == 3
    assert len(task.class_names) == {"ade20k": 150, "voc2012aug": 21, "cocostuff164k": 171}[name]

    torch.manual_seed(0)
    np.random.seed(0)
    backbone, head = Stages(INFO), task.build_head(INFO)
    batch = batch_of(task, "train", True, (0, train - 1))
    assert batch.images.shape == (2, 3, 128, 128)
    labels = torch.stack([sample.gt_sem_seg.data for sample in batch.targets])
    assert int(labels[labels != 255].max()) < len(task.class_names)
    sum(head.loss(backbone(batch.images), batch.targets).values(), torch.zeros(())).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in backbone.parameters())

    found, expected = evaluate(task, backbone, head.eval())
    assert {key: round(100 * value, 2) for key, value in found.items()} == pytest.approx(
        {key: float(expected[key]) for key in ("mIoU", "mAcc", "aAcc")}, abs=0.011
    )


def evaluate(task: Segmentation, backbone: torch.nn.Module, head: Any) -> tuple[dict[str, float], dict[str, float]]:
    """Our metric and mmseg's on the same predictions, a part of which is set right so that neither is 0."""
    with scope("mmseg"):
        from mmseg.evaluation import IoUMetric as Stock
    metric, stock = task.metric(), Stock()
    stock.dataset_meta = {"classes": task.class_names}
    batch = batch_of(task, "val", False, range(3))
    with torch.no_grad():
        predictions = head.predict(backbone(batch.images), batch.targets)
    for prediction, sample in zip(predictions, batch.targets, strict=True):
        truth = sample.gt_sem_seg.data
        assert prediction.shape == tuple(truth.shape[1:]) == sample.ori_shape
        half = prediction.shape[0] // 2
        prediction[:half] = np.where(truth[0, :half] == 255, 0, truth[0, :half])
        stock.process(
            {}, [{"pred_sem_seg": {"data": torch.from_numpy(prediction)[None]}, "gt_sem_seg": {"data": truth}}]
        )
    metric.update(predictions, batch.targets)
    return metric.compute(), stock.evaluate(3)


def test_zero_of_ade20k_is_ignored_and_one_is_the_first_class(roots: dict[str, Path]) -> None:
    task = stock_task("ade20k", roots["ade20k"])
    sample = task.dataset("val")[0]["data_samples"]
    stored = np.array(Image.open(sample.seg_map_path)).astype(int)
    expected = np.where(stored == 0, 255, stored - 1)
    np.testing.assert_array_equal(sample.gt_sem_seg.data[0].numpy(), expected)
    assert stored.min() == 0
    assert stored.max() == 150
    assert task.class_names[0] == "wall"


def test_folders_of_ones_own_with_the_configuration_of_ade20k(roots: dict[str, Path]) -> None:
    """With reduce_zero_label in its pipeline a configuration needs a data set that says the same."""
    folders = {
        "train_images": "images/training",
        "train_labels": "annotations/training",
        "val_images": "images/validation",
        "val_labels": "annotations/validation",
    }
    task = Segmentation(CONFIGS["ade20k"], 2, data_root=str(roots["ade20k"]), **folders)
    task.check()
    own, published = task.dataset("val")[1], stock_task("ade20k", roots["ade20k"]).dataset("val")[1]
    assert torch.equal(own["inputs"], published["inputs"])
    assert torch.equal(own["data_samples"].gt_sem_seg.data, published["data_samples"].gt_sem_seg.data)
    few = Segmentation(CONFIGS["ade20k"], 2, data_root=str(roots["ade20k"]), classes=["a", "b"], **folders)
    with pytest.raises(UserError, match=r"class 150 and the head has 2 classes \(1 to 2, 0 and 255 = ignore\)"):
        few.check()


# ---- faults


def refused_by_the_task(name: str, root: Path, error: type[Exception], match: str) -> None:
    """Some train sample of the task is refused."""
    samples = stock_task(name, root).dataset("train")
    with pytest.raises(error, match=match):
        list(map(samples.__getitem__, range(len(samples))))


def the_only_fault(name: str, root: Path) -> str:
    [fault] = SOURCES[name].faults(root, 5)
    return fault


@every_set
def test_class_out_of_range(name: str, copy: Path) -> None:
    path = copy / LABELS[name]
    labels = np.array(Image.open(path))
    labels[9, 9] = 200
    Image.fromarray(labels).save(path)
    fault = the_only_fault(name, copy)
    assert str(path) in fault
    assert "class 200" in fault
    refused_by_the_task(name, copy, UserError, f"{path.name} has a pixel of class 200")


@every_set
def test_label_map_of_another_size(name: str, copy: Path) -> None:
    path = copy / LABELS[name]
    Image.fromarray(np.ones((50, 60), dtype=np.uint8)).save(path)
    assert "60x50 and its image 96x72" in the_only_fault(name, copy)
    refused_by_the_task(name, copy, SampleError, rf"{path.name} is an array of \(50, 60\)")


@every_set
def test_missing_label_map(name: str, copy: Path) -> None:
    path = copy / LABELS[name]
    path.unlink()
    assert f"has no label map {path}" in the_only_fault(name, copy)
    assert sum(SOURCES[name].count(copy).values()) == sum(EXPECTED[name].values()) - 1
    refused_by_the_task(name, copy, SampleError, path.name)


@every_set
def test_truncated_png(name: str, copy: Path) -> None:
    path = copy / LABELS[name]
    path.write_bytes(path.read_bytes()[:-30])
    assert str(path) in the_only_fault(name, copy)
    refused_by_the_task(name, copy, SampleError, path.name)


@every_set
def test_colours_in_place_of_classes(name: str, copy: Path) -> None:
    path = copy / LABELS[name]
    Image.open(path).convert("RGB").save(path)
    assert "mode RGB" in the_only_fault(name, copy)
    refused_by_the_task(name, copy, SampleError, path.name)


@pytest.mark.parametrize("name", ["voc2012aug"])
def test_wrong_palette_and_name_without_image(copy: Path) -> None:
    path = copy / "SegmentationClass" / "2007_000003.png"
    image = Image.open(path)
    swapped = voc_palette(256)
    swapped[3:6], swapped[6:9] = swapped[6:9], swapped[3:6]
    image.putpalette(swapped)
    image.save(path)
    listing = copy / "ImageSets" / "Segmentation" / "val.txt"
    listing.write_text(listing.read_text() + "2009_999999\n")
    palette, name = SOURCES["voc2012aug"].faults(copy, 5)
    assert str(path) in palette
    assert "palette" in palette
    assert name.startswith(f"{listing}:4: ")
    assert SOURCES["voc2012aug"].faults(copy, 1) == [palette]


@pytest.mark.parametrize("name", ["cocostuff164k"])
def test_unconverted_maps_are_explained(copy: Path) -> None:
    for path in (copy / "annotations" / "train2017").iterdir():
        path.rename(path.with_name(path.name.replace("_labelTrainIds", "")))
    assert "coco_stuff164k.py" in SOURCES["cocostuff164k"].faults(copy, 1)[0]


@every_set
def test_missing_folder_is_named_before_training(name: str, copy: Path) -> None:
    shutil.rmtree(copy / Path(LABELS[name]).parent)
    with pytest.raises(UserError, match=Path(LABELS[name]).parent.name):
        stock_task(name, copy).check()


@every_set
def test_shipped_configuration_is_upernet_with_the_stock_pipelines_of_its_set(name: str) -> None:
    shipped = Segmentation(f"upernet_{name}.py", 8, source=name).cfg
    stock = stock_task(name, None).cfg
    for split in ("train", "val"):
        key = f"{split}_dataloader"
        assert shipped[key].dataset.to_dict() == stock[key].dataset.to_dict()
    model = shipped.model
    assert (model.decode_head.type, model.decode_head.pool_scales) == ("UPerHead", (1, 2, 3, 6))
    assert (model.auxiliary_head.type, model.auxiliary_head.in_index) == ("FCNHead", 2)
    assert model.auxiliary_head.loss_decode.loss_weight == 0.4
    assert model.decode_head.num_classes == model.auxiliary_head.num_classes == stock.model.decode_head.num_classes
    assert model.data_preprocessor.size == (512, 512)
    assert model.test_cfg.mode == "whole"
