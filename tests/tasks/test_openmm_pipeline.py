"""Our versions of the libraries' transforms give the very samples that theirs give."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gppf_ds.seeding import SAMPLE, seed_global_generators
from gppf_ds.tasks.detection import Detection
from gppf_ds.tasks.openmm import scope
from gppf_ds.tasks.openmm_pipeline import PackPlanes, adapted
from gppf_ds.tasks.openmm_task import OpenMMTask
from gppf_ds.tasks.segmentation import Segmentation


@pytest.fixture(params=["mask-rcnn_r50_fpn_1x_coco.py", "upernet_r50_4xb4-80k_ade20k-512x512.py", "upernet_demo.py"])
def task(request: pytest.FixtureRequest, demo_data: Path) -> OpenMMTask:
    images = {
        "data_root": str(demo_data / "scenes"),
        "train_images": "images/train",
        "val_images": "images/val",
    }
    if request.param.startswith("mask"):
        images |= {split: f"annotations/instances_{split}.json" for split in ("train", "val")}
        return Detection(request.param, 1, **images)
    return Segmentation(request.param, 1, **images, train_labels="labels/train", val_labels="labels/val")


def sample(dataset: Any, index: int) -> Any:
    seed_global_generators(0, SAMPLE, index)
    return dataset[index]


def test_samples_are_those_of_the_library(task: OpenMMTask) -> None:
    with scope(task.library):
        from mmengine.registry import DATASETS

        theirs = DATASETS.build(task._data_config("train"))
    ours = task.dataset("train")
    used = [type(step) for step in ours.inner.pipeline.transforms]  # type: ignore[attr-defined]
    assert PackPlanes in used
    assert ("CountingCrop" in [kind.__name__ for kind in used]) == isinstance(task, Segmentation)
    for index in range(len(ours)):
        wanted, found = sample(theirs, index), sample(ours, index)
        assert torch.equal(found["inputs"], wanted["inputs"])
        assert found["inputs"].is_contiguous()
        assert found["inputs"].dtype == wanted["inputs"].dtype
        assert found["data_samples"].metainfo == wanted["data_samples"].metainfo
        if isinstance(task, Segmentation):
            assert torch.equal(found["data_samples"].gt_sem_seg.data, wanted["data_samples"].gt_sem_seg.data)
        else:
            same, other = found["data_samples"].gt_instances, wanted["data_samples"].gt_instances
            assert torch.equal(same.labels, other.labels)
            assert torch.equal(same.bboxes.tensor, other.bboxes.tensor)
            assert np.array_equal(same.masks.masks, other.masks.masks)


@pytest.mark.parametrize("ratio", [0.4, 0.75, 1.0])
@pytest.mark.parametrize("ignore", [255, 2])
def test_crops_are_those_of_mmseg(ratio: float, ignore: int) -> None:
    with scope("mmseg"):
        from mmseg.datasets.transforms import RandomCrop

        from gppf_ds.tasks.mmseg_crop import CountingCrop
    random = np.random.default_rng(0)
    tried = 0
    for number in range(200):
        height, width = random.integers(20, 90, 2)
        labels = np.kron(random.integers(0, 4, (9, 9)), np.ones((10, 10), int)).astype(np.uint8)[:height, :width]
        labels[random.random(labels.shape) < random.choice([0.0, 0.2, 1.0])] = 255
        boxes, states = [], []
        for kind in (RandomCrop, CountingCrop):
            np.random.seed(number)
            crop = kind((32, 40), cat_max_ratio=ratio, ignore_index=ignore)
            boxes.append(crop.crop_bbox({"img": np.zeros((height, width, 3), np.uint8), "gt_seg_map": labels}))
            states.append(np.random.get_state()[1:3])  # type: ignore[index]
        assert boxes[0] == boxes[1]
        assert np.array_equal(states[0][0], states[1][0])
        assert states[0][1] == states[1][1]
        tried += states[0][1] > 4
    assert (tried > 50) == (ratio < 1)


class RandomCrop:
    """A user's own, of the same name as mmseg's."""


def test_only_mmsegs_own_crop_is_replaced() -> None:
    with scope("mmseg"):
        from gppf_ds.tasks.mmseg_crop import CountingCrop

        named: Any = {"type": "RandomCrop", "crop_size": (8, 8)}
        assert adapted(named, {}) == {"type": CountingCrop, "crop_size": (8, 8)}
        assert adapted([{"type": "mmseg.RandomCrop"}], {}) == [{"type": CountingCrop}]
        assert adapted({"type": RandomCrop}, {}) == {"type": RandomCrop}
    with scope("mmdet"):
        assert adapted({"type": "RandomCrop"}, {}) == {"type": "RandomCrop"}
