"""The vectors that tasks hand to a probe come from where their labels are."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision.ops import box_iou

from gppf_ds.errors import UserError
from gppf_ds.tasks import probe
from gppf_ds.tasks.classification import Classification
from gppf_ds.tasks.depth import Depth
from gppf_ds.tasks.depth_metric import DepthTargets
from gppf_ds.tasks.detection import Detection
from gppf_ds.tasks.segmentation import Segmentation
from gppf_ds.tasks.task import ProbeSamples, Task
from gppf_ds.tasks.windows import Windows

torch.set_num_threads(1)
CPU = torch.device("cpu")


def coordinates(height: int, width: int, stride: int, images: int = 1) -> Tensor:
    """Maps (images, 3, h, w) that hold y, x and the number of the image, in pixels at the middle of each cell."""
    y = (torch.arange(height // stride) + 0.5) * stride - 0.5
    x = (torch.arange(width // stride) + 0.5) * stride - 0.5
    grid = torch.stack([y[:, None].expand(-1, len(x)), x.expand(len(y), -1)])
    number = torch.arange(images)[:, None, None, None].expand(-1, 1, *grid.shape[1:])
    return torch.cat([grid.expand(images, -1, -1, -1), number], 1).float()


def label_map(labels: Tensor, shown: tuple[int, int], padded: tuple[int, int]) -> Any:
    """A data sample of mmseg, as far as it is read."""
    data = SimpleNamespace(data=labels[None])
    return SimpleNamespace(gt_sem_seg=data, metainfo={"img_shape": shown, "pad_shape": padded})


def test_pixels_are_read_between_cells_of_every_map() -> None:
    maps = [coordinates(64, 96, stride, images=2) for stride in (4, 16)]
    inner = torch.tensor([[0, 20.25, 40.5], [0, 33.0, 70.0], [1, 9.0, 87.0]])
    found = probe.of_pixels(
        maps, [inner[:2], inner[2:]], [torch.tensor([1, 2]), torch.tensor([3])], torch.tensor([64, 96])
    )
    expected = inner[:, [1, 2, 0]]
    assert all(torch.allclose(one, expected, atol=1e-4) for one in found.vectors)
    assert found.labels.tolist() == [1, 2, 3]
    assert found.images.tolist() == [0, 0, 1]


def test_labels_are_drawn_evenly() -> None:
    labels = torch.tensor([0] * 90 + [1] * 8 + [2] * 2)
    chosen = probe.evenly(labels, 16)
    assert len(set(chosen.tolist())) == 16
    assert torch.bincount(labels[chosen]).tolist() == [7, 7, 2]
    assert len(probe.evenly(labels[:3], 16)) == 3


def test_depth_is_read_where_it_is_measured() -> None:
    torch.manual_seed(0)
    depth = torch.zeros(2, 64, 64)
    depth[0, ::3, ::5] = 2.0 + torch.arange(64)[None, ::5] / 10  # x tells the depth
    depth[0, 0] = 90.0
    depth[1, :32, :40] = 5.0
    targets = DepthTargets(depth, [(64, 64), (20, 40)], mirrored=True)
    maps = coordinates(64, 64, 2, images=4)
    found = probe.of_depth([maps], targets, min_depth=0.001, max_depth=80.0)
    assert torch.bincount(found.images).tolist() == [probe.POINTS] * 2
    [vectors] = found.vectors
    assert torch.equal(vectors[:, 2], found.images.float())  # none of the mirrored images
    first = found.images == 0
    inner = vectors[first, 1].clamp(1, 62)
    assert torch.allclose(found.labels[first], (2 + inner / 10).log(), atol=0.06)
    assert (vectors[~first, 0] < 20).all()
    assert torch.allclose(found.labels[~first], torch.tensor(5.0).log())


def test_label_maps_are_read_at_their_own_size() -> None:
    """The image was shrunk to half and padded: pixel (y, x) of the label map is shown at about half of it."""
    torch.manual_seed(0)
    labels = torch.full((80, 120), 255)
    labels[:, :40] = 1
    labels[70:, 100:] = 4
    found = probe.of_label_maps([coordinates(64, 64, 4)], [label_map(labels, (40, 60), (64, 64))], None)
    assert torch.bincount(found.labels).tolist() == [0, 8, 0, 0, 8]
    y, x, _ = found.vectors[0].T
    assert (x[found.labels == 1] < 20).all()
    assert (y[found.labels == 4] > 34).all()
    assert (x[found.labels == 4] > 49).all()
    assert y.max() < 40


def test_sliding_windows_show_the_same_pixels() -> None:
    labels = torch.arange(96)[None, :].expand(64, -1) // 24
    windows = Windows((64, 64), (64, 32))
    whole = coordinates(64, 96, 4)
    cut = torch.cat(
        [windows.cut(torch.nn.functional.interpolate(one[None], scale_factor=4)[0])[..., 1::4, 1::4] for one in whole]
    )
    samples = [label_map(labels, (64, 96), (64, 96)) for _ in range(2)]
    torch.manual_seed(1)
    expected = probe.of_label_maps([whole.expand(2, -1, -1, -1)], samples, None)
    torch.manual_seed(1)
    found = probe.of_label_maps([torch.cat([cut, cut])], samples, windows)
    assert torch.equal(found.labels, expected.labels)
    assert torch.equal(found.images, expected.images)
    assert torch.allclose(found.vectors[0], expected.vectors[0], atol=1e-3)


def boxes_of(sample_boxes: Tensor, labels: Tensor, shape: tuple[int, int]) -> Any:
    class Sample(SimpleNamespace):
        def __contains__(self, key: str) -> bool:
            return hasattr(self, key)

    instances = SimpleNamespace(bboxes=sample_boxes, labels=labels)
    return Sample(gt_instances=instances, metainfo={"img_shape": shape, "batch_input_shape": (128, 128)})


def test_boxes_without_objects_are_elsewhere() -> None:
    torch.manual_seed(0)
    objects = torch.tensor([[10.0, 10.0, 40.0, 30.0], [60.0, 50.0, 90.0, 90.0]])
    for _ in range(20):
        empty = probe._backgrounds(objects, (100, 128))
        assert 0 < len(empty) <= probe.BACKGROUNDS
        assert box_iou(empty, objects).max() <= probe.LARGEST_OVERLAP
        assert (empty[:, :2] >= 0).all()
        assert (empty[:, 2] <= 128).all()
        assert (empty[:, 3] <= 100).all()
    assert len(probe._backgrounds(torch.tensor([[0.0, 0.0, 128.0, 100.0]]), (100, 128))) == 0
    assert probe._backgrounds(torch.zeros(0, 4), (100, 128)).shape == (probe.BACKGROUNDS, 4)


def unaugmented(task: Task, split: Any, index: int) -> Any:
    samples = task.probe_dataset(split)
    return samples[index]


def demo_tasks(data: Path) -> dict[str, Task]:
    scenes = {"data_root": str(data / "scenes"), "train_images": "images/train", "val_images": "images/val"}
    return {
        "digits": Classification(str(data / "classification"), 2, image_size=64),
        "distance": Depth(str(data / "scenes"), 2, max_depth=20.0, input_size=(64, 64)),
        "objects": Detection(
            "mask_rcnn_demo.py",
            2,
            train="annotations/instances_train.json",
            val="annotations/instances_val.json",
            # Twice the size of the data, so that boxes have to follow the images.
            overrides={
                f"{split}_dataloader.dataset.pipeline.{step}.scale": (256, 256) for split, step in (("val", 1),)
            },
            **scenes,
        ),
        "regions": Segmentation(
            "upernet_demo.py",
            2,
            train_labels="labels/train",
            val_labels="labels/val",
            classes="classes.json",
            **scenes,
        ),
    }


@pytest.mark.parametrize("name", ["digits", "distance", "objects", "regions"])
def test_training_images_are_read_as_validation_images_are(demo_data: Path, name: str) -> None:
    task = demo_tasks(demo_data)[name]
    batches = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        np.random.seed(seed)
        batches.append(task.preprocess(task.collate([task.probe_dataset("train")[3]]), CPU, training=False))
    assert torch.equal(batches[0].images, batches[1].images)
    if name != "digits":
        file = sorted((demo_data / "scenes/images/train").glob("*.jpg"))[3]
        assert torch.equal(
            task.preprocess(task.collate([task.sample(file)]), CPU, training=False).images, batches[0].images
        )
    maps = [torch.rand(1, 4, *(side // stride for side in batches[0].images.shape[-2:])) for stride in (4, 8)]
    found: list[ProbeSamples] = []
    for _ in range(2):
        torch.manual_seed(5)
        found.append(task.probe(maps, batches[0].targets))
    one, two = found
    assert all(map(torch.equal, one.vectors, two.vectors))
    assert torch.equal(one.labels, two.labels)
    assert {len(part) for part in one.vectors} == {len(one.labels)} == {len(one.images)} != {0}
    assert one.labels.dtype == (torch.float32 if name == "distance" else torch.int64)


def test_boxes_follow_the_resized_image(demo_data: Path) -> None:
    task = demo_tasks(demo_data)["objects"]
    batch = task.preprocess(task.collate([task.probe_dataset("val")[1]]), CPU, training=False)
    assert batch.images.shape[-2:] == (256, 256)
    content = json.loads((demo_data / "scenes/annotations/instances_val.json").read_text())
    image = content["images"][1]
    theirs = torch.tensor([a["bbox"] for a in content["annotations"] if a["image_id"] == image["id"]])
    theirs[:, 2:] += theirs[:, :2]
    [sample] = batch.targets
    assert torch.allclose(sample.gt_instances.bboxes, 256 / image["height"] * theirs, atol=1e-3)
    maps = [coordinates(256, 256, stride) for stride in (4, 8)]
    found = task.probe(maps, batch.targets)
    objects = found.labels < 10
    assert objects.sum() == min(len(theirs), probe.POINTS - probe.BACKGROUNDS)
    assert (found.labels[~objects] == 10).all()


def test_a_kind_of_task_without_probe_says_so() -> None:
    class Bare(Classification):
        probe = Task.probe  # type: ignore[assignment]

    with pytest.raises(UserError, match="Bare cannot be probed: give it the method probe"):
        Bare("nowhere", 2).probe([], None)  # type: ignore[arg-type]
