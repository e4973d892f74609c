"""Losses for federated labels, against loops over proposals and through the real task on the smoke sets."""

from __future__ import annotations

import json
import math
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from task_steps import batch_of, smoke_roots
from torch import Tensor, nn

from gppf_ds.data.sets.detection import SOURCES
from gppf_ds.errors import UserError
from gppf_ds.tasks.class_balance import class_balanced_weights
from gppf_ds.tasks.detection import Detection, DetectionHead
from gppf_ds.tasks.federated import JUDGED, among_judged, leave_out_unjudged
from gppf_ds.tasks.openmm import scope
from gppf_ds.tasks.task import Batch, FeatureInfo

torch.set_num_threads(1)
CLASSES = 5
CONFIGS = {
    "mask_rcnn_lsj_lvis.py": "lvis",
    "cascade_mask_rcnn_lsj_lvis.py": "lvis",
    "faster_rcnn_lsj_openimages.py": "openimages",
    "cascade_rcnn_lsj_openimages.py": "openimages",
}


@pytest.fixture(scope="module")
def roots(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return smoke_roots(tmp_path_factory, {name: SOURCES[name] for name in ("lvis", "openimages", "coco")})


def smoke(config: str, root: Path, **more: Any) -> Detection:
    task = Detection(config, 2, data_root=str(root), **more)
    task.shrink()
    return task


# The loss itself: five classes, three images.

JUDGED_IN = [[0, 1, 2, 3, 4], [1, 3], []]
LABELS = [0, 5, 5, 2, 3, 1, 5, 5, 4, 5]
IMAGES = [0, 0, 0, 1, 1, 1, 1, 1, 2, 2]
WEIGHTS = [1.0, 1.0, 0.5, 1.0, 1.0, 2.0, 1.0, 0.0, 1.0, 1.0]


def seen(proposal: int) -> list[int]:
    """The classes that the loss of a proposal may look at, less the background."""
    return sorted({*JUDGED_IN[IMAGES[proposal]], LABELS[proposal]} - {CLASSES})


def softmax_loss(logits: Tensor, class_weight: list[float]) -> Tensor:
    total = torch.zeros((), dtype=logits.dtype)
    for i, label in enumerate(LABELS):
        denominator = sum(logits[i, c].exp() for c in [*seen(i), CLASSES])
        total = total - WEIGHTS[i] * class_weight[label] * (logits[i, label].exp() / denominator).log()
    return total / sum(weight > 0 for weight in WEIGHTS)


def sigmoid_loss(logits: Tensor) -> Tensor:
    total = torch.zeros((), dtype=logits.dtype)
    for i, label in enumerate(LABELS):
        for c in seen(i):
            p = 1 / (1 + (-logits[i, c]).exp())
            total = total - WEIGHTS[i] * (p if c == label else 1 - p).log()
    return total / sum(weight > 0 for weight in WEIGHTS)


def box_head(loss: dict[str, Any]) -> Any:
    """mmdet's own, as a federated head makes use of it, and one that stays as it is."""
    with scope("mmdet"):
        from mmengine.registry import MODELS

        settings = {"type": "Shared2FCBBoxHead", "in_channels": 2, "fc_out_channels": 4, "num_classes": CLASSES}
        stock, ours = (MODELS.build({**settings, "loss_cls": loss}) for _ in range(2))
    among_judged(ours)
    return stock, ours


def classification_loss(head: Any, logits: Tensor) -> Tensor:
    rois = torch.tensor([[float(image), 0, 0, 8, 8] for image in IMAGES])
    labels, weights = torch.tensor(LABELS), torch.tensor(WEIGHTS)
    return head.loss(logits, None, rois, labels, weights, None, None)["loss_cls"]


def judge(head: Any, judged: list[list[int]]) -> None:
    head.judged = torch.zeros(len(judged), CLASSES + 1, dtype=torch.bool)
    for row, labels in zip(head.judged, judged, strict=True):
        row[[*labels, CLASSES]] = True


CLASS_WEIGHT = [1.0, 2.0, 0.5, 3.0, 1.5, 0.25]
KINDS: dict[str, dict[str, Any]] = {
    "softmax": {"type": "CrossEntropyLoss", "class_weight": CLASS_WEIGHT},
    "sigmoid": {"type": "CrossEntropyCustomLoss", "use_sigmoid": True, "num_classes": CLASSES},
}


@pytest.mark.parametrize("kind", KINDS)
def test_equals_a_loop_over_the_proposals(kind: str) -> None:
    _, head = box_head(KINDS[kind])
    judge(head, JUDGED_IN)
    columns = CLASSES + (kind == "softmax")
    logits = torch.randn(len(LABELS), columns, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 3
    ours, theirs = (logits.clone().requires_grad_() for _ in range(2))
    found = classification_loss(head, ours)
    expected = softmax_loss(theirs, CLASS_WEIGHT) if kind == "softmax" else sigmoid_loss(theirs)
    exact: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-6, "check_dtype": False}  # mmdet's sigmoid loss is fp32
    torch.testing.assert_close(found, expected, **exact)
    found.backward()
    expected.backward()
    assert ours.grad is not None
    assert theirs.grad is not None
    torch.testing.assert_close(ours.grad, theirs.grad, **exact)
    for i, weight in enumerate(WEIGHTS):
        classes = seen(i) + ([CLASSES] if kind == "softmax" else [])
        # A background that stands alone is certain.
        assert (ours.grad[i] != 0).nonzero().flatten().tolist() == (classes if weight and seen(i) else [])


@pytest.mark.parametrize("kind", KINDS)
def test_is_the_stock_loss_where_every_class_was_judged(kind: str) -> None:
    stock, head = box_head(KINDS[kind])
    judge(head, [list(range(CLASSES))] * 3)
    logits = torch.randn(len(LABELS), CLASSES + (kind == "softmax"), generator=torch.Generator().manual_seed(1)) * 9
    found = []
    for one in (stock, head):
        leaf = logits.clone().requires_grad_()
        loss = classification_loss(one, leaf)
        found.append([loss.detach(), *torch.autograd.grad(loss, leaf)])
    assert all(torch.equal(theirs, ours) for theirs, ours in zip(*found, strict=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_has_no_nan(dtype: torch.dtype) -> None:
    logits = torch.tensor([[1.0, 60000, -2, 3], [-4, 2, 60000, 1]], dtype=dtype)
    judged = torch.tensor([[True, False, False, True]] * 2)
    labels = torch.tensor([3, 1])
    masked = leave_out_unjudged(logits, labels, judged)
    probabilities = masked.softmax(1)
    assert (probabilities == 0).tolist() == [[False, True, True, False], [False, False, True, False]]
    hard = nn.functional.binary_cross_entropy_with_logits(masked, torch.zeros_like(masked), reduction="none")
    assert hard[0, 1] == hard[0, 2] == hard[1, 2] == 0


# The whole head, on the data.


def train_batch(task: Detection) -> Batch:
    """Two images with objects in them after the augmentation."""
    torch.manual_seed(3)
    np.random.seed(3)
    return batch_of(task, "train", training=True)


def classifiers(head: DetectionHead) -> list[Any]:
    heads = head.model.roi_head.bbox_head
    return [one.fc_cls for one in (heads if isinstance(heads, nn.ModuleList) else [heads])]


def backward(head: DetectionHead, backbone: nn.Module, batch: Any) -> dict[str, float]:
    torch.manual_seed(5)  # the proposals that are sampled
    head.zero_grad()
    with torch.no_grad():
        maps = list(backbone(batch.images))
    terms = head.loss(maps, batch.targets)
    sum(terms.values(), torch.zeros(())).backward()
    return {name: float(term.detach()) for name, term in terms.items()}


@pytest.mark.parametrize("config", CONFIGS)
def test_classes_that_nobody_judged_get_no_gradient(
    config: str, roots: dict[str, Path], backbone: nn.Module, info: FeatureInfo
) -> None:
    task = smoke(config, roots[CONFIGS[config]])
    task.check()
    batch = train_batch(task)
    head = task.build_head(info)
    assert all(math.isfinite(term) for term in backward(head, backbone, batch).values())
    judged = {label for sample in batch.targets for label in sample.metainfo[JUDGED].tolist()}
    judged |= {label for sample in batch.targets for label in sample.gt_instances.labels.tolist()}
    for classifier in classifiers(head):
        moved = set((classifier.weight.grad != 0).any(1).nonzero().flatten().tolist())
        assert len(task.class_names) in moved
        assert len(moved) > 1
        assert moved <= judged | {len(task.class_names)}


@pytest.mark.parametrize("config", ["faster_rcnn_lsj_openimages.py", "cascade_rcnn_lsj_openimages.py"])
def test_is_the_stock_head_but_for_what_was_not_judged(
    config: str, roots: dict[str, Path], backbone: nn.Module, info: FeatureInfo
) -> None:
    task = smoke(config, roots["openimages"])
    batch = train_batch(task)
    head, stock = (
        task.build_head(info),
        smoke(config, roots["openimages"], overrides={"federated": False}).build_head(info),
    )
    assert type(stock) is DetectionHead
    assert stock.config == head.config  # an export needs nothing of ours
    stock.load_state_dict(head.state_dict())
    ours, theirs = (backward(one, backbone, batch) for one in (head, stock))
    assert ours.keys() == theirs.keys()
    differing = {name.rpartition(".")[2] for name in ours if ours[name] != theirs[name]}
    assert differing == {"loss_cls"}
    for classifier in classifiers(stock):
        assert (classifier.weight.grad != 0).any(1).all()
    for sample in batch.targets:
        sample.set_metainfo({JUDGED: np.arange(len(task.class_names))})
    assert backward(head, backbone, batch) == theirs
    for name, parameter in head.named_parameters():
        assert torch.equal(parameter.grad, stock.get_parameter(name).grad), name  # type: ignore[arg-type]


def test_lvis_samples_say_what_was_judged_also_after_copy_paste(roots: dict[str, Path]) -> None:
    content = json.loads((roots["lvis"] / "annotations/lvis_v1_train.json").read_text())
    task = smoke("mask_rcnn_lsj_lvis.py", roots["lvis"])
    samples: Any = pickle.loads(pickle.dumps(task.dataset("train")))  # as a worker process gets it
    assert [step.type for step in task.cfg.train_dataloader.dataset.pipeline] == ["CopyPaste", "PackDetInputs"]
    pasted = 0
    for index in range(len(samples)):
        sample = samples[index]["data_samples"]
        [image] = [one for one in content["images"] if one["id"] == sample.img_id]
        there = {one["category_id"] for one in content["annotations"] if one["image_id"] == image["id"]}
        known = (there | {*image["neg_category_ids"]}) - {*image["not_exhaustive_category_ids"]}
        assert sample.metainfo[JUDGED].tolist() == sorted(number - 1 for number in known)
        pasted += len({*sample.gt_instances.labels.tolist()} - {number - 1 for number in there})
        assert "img_shape" in sample.metainfo
    assert JUDGED not in task.dataset("val")[0]["data_samples"].metainfo


def test_an_lvis_json_that_does_not_tell_is_refused(roots: dict[str, Path], tmp_path: Path) -> None:
    SOURCES["lvis"].smoke(tmp_path)
    path = tmp_path / "annotations/lvis_v1_train.json"
    content = json.loads(path.read_text())
    del content["images"][2]["neg_category_ids"]
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"lvis_v1_train\.json has no 'neg_category_ids' for image 3"):
        smoke("mask_rcnn_lsj_lvis.py", tmp_path).dataset("train")
    smoke("mask_rcnn_lsj_lvis.py", tmp_path, overrides={"federated": False}).dataset("train")


def test_open_images_by_the_hierarchy() -> None:
    with scope("mmdet"):
        from gppf_ds.tasks.openimages_data import Tree
    entity, vehicle, car, bus, taxi, fish = range(6)
    relations = np.eye(6)
    relations[[vehicle, car, bus, taxi, fish], entity] = 1
    relations[[car, bus, taxi], vehicle] = relations[taxi, car] = 1
    tree = Tree(relations)
    assert tree.judged({car}, {}) == [car]  # a bus may be there, and every car is a vehicle
    assert tree.judged({car}, {bus: False, fish: False}) == [car, bus, fish]
    assert tree.judged(set(), {vehicle: False}) == [vehicle, car, bus, taxi]  # no vehicle, so none of its kinds
    assert tree.judged(set(), {vehicle: True}) == [vehicle]
    assert tree.judged({vehicle, taxi}, {car: True}) == [taxi]
    assert tree.judged({fish}, {entity: False}) == [vehicle, car, bus, taxi, fish]
    assert tree.judged(set(), {}) == []


def test_open_images_samples_say_what_was_judged(roots: dict[str, Path]) -> None:
    """Classes 0, 1, 2 are below 3; somebody looked for 4 everywhere and did not find it."""
    task = smoke("faster_rcnn_lsj_openimages.py", roots["openimages"])
    samples = task.dataset("train")
    assert len(samples) == 6
    inner: Any = samples.inner  # type: ignore[attr-defined]
    for index in range(len(samples)):
        boxed = {one["bbox_label"] for one in inner.get_data_info(index)["instances"]}
        assert samples[index]["data_samples"].metainfo[JUDGED].tolist() == sorted(boxed | {4})
    assert JUDGED not in task.dataset("val")[0]["data_samples"].metainfo


def test_open_images_trains_on_images_with_boxes(roots: dict[str, Path], tmp_path: Path) -> None:
    SOURCES["openimages"].smoke(tmp_path)
    path = tmp_path / "challenge2019/challenge-2019-train-detection-human-imagelabels.csv"
    text = path.read_text()
    path.write_text(text + "ffff,/m/smoke004,0\n")
    assert len(smoke("faster_rcnn_lsj_openimages.py", tmp_path).dataset("train")) == 6
    path.write_text(text + "ffff,/m/smoke004,no\n")
    with pytest.raises(UserError, match=rf"imagelabels\.csv:{len(path.read_text().splitlines())} .*Confidence"):
        smoke("faster_rcnn_lsj_openimages.py", tmp_path).dataset("train")
    path.unlink()
    with pytest.raises(UserError, match=r"train-detection-human-imagelabels\.csv does not exist"):
        smoke("faster_rcnn_lsj_openimages.py", tmp_path).check()


REFUSED: list[tuple[str, str, dict[str, Any], str]] = [
    ("mask_rcnn_lsj_coco.py", "coco", {"federated": True}, "CocoDataset"),
    ("mask-rcnn_r50_fpn_seesaw-loss_sample1e-3-ms-2x_lvis-v1.py", "lvis", {"federated": True}, "SeesawLoss"),
    ("faster_rcnn_lsj_openimages.py", "openimages", {"model.roi_head.bbox_head": None}, "without box head"),
    (
        "faster_rcnn_lsj_openimages.py",
        "openimages",
        {"train_dataloader.dataset.image_level_ann_file": None},
        "image_level_ann_file",
    ),
    (
        "mask_rcnn_lsj_lvis.py",
        "lvis",
        {"train_dataloader.dataset.pipeline": [{"type": "Mosaic"}, {"type": "PackDetInputs"}]},
        "Mosaic",
    ),
]


@pytest.mark.parametrize(("config", "name", "overrides", "message"), REFUSED, ids=[row[3] for row in REFUSED])
def test_what_cannot_be_federated_is_refused(
    config: str, name: str, overrides: dict[str, Any], message: str, roots: dict[str, Path]
) -> None:
    with pytest.raises(UserError, match=rf"{message}.*federated"):
        Detection(config, 2, data_root=str(roots[name]), overrides=overrides).check()


def test_own_data_in_place_of_lvis_is_judged_everywhere(roots: dict[str, Path]) -> None:
    places: dict[str, Any] = {f"{split}_images": f"{split}2017" for split in ("train", "val")}
    places |= {split: f"annotations/instances_{split}2017.json" for split in ("train", "val")}
    task = Detection("mask_rcnn_lsj_lvis.py", 2, data_root=str(roots["coco"]), **places)
    assert not task.federated
    task.check()


# Weights by the number of objects, and together with the above.


def test_class_balance_in_every_stage_of_a_cascade(roots: dict[str, Path], info: FeatureInfo) -> None:
    """That the loss is the one with these weights is for ``test_equals_a_loop_over_the_proposals``."""
    head = smoke("cascade_mask_rcnn_lsj_lvis.py", roots["lvis"], class_balance=0.999).build_head(info)
    content = json.loads((roots["lvis"] / "annotations/lvis_v1_train.json").read_text())
    counts = np.bincount([one["category_id"] - 1 for one in content["annotations"]], minlength=1203)
    raw = [(1 - 0.999) / (1 - 0.999 ** max(int(count), 1)) for count in counts]
    weights = [value / (sum(raw) / 1203) for value in [*raw, 1 - 0.999]]
    assert len(head.model.roi_head.bbox_head) == 3
    for stage in head.model.roi_head.bbox_head:
        np.testing.assert_allclose(stage.loss_cls.class_weight, weights, rtol=1e-6)


def test_objects_and_background_keep_their_balance() -> None:
    """On a long tail like that of LVIS an object weighs on average as much as the background, and rare ones more."""
    share = 1 / np.arange(1, 1204) ** 1.5
    counts = np.maximum(1, 1_270_000 * share / share.sum()).astype(int)
    *weights, background = class_balanced_weights(counts.tolist(), 0.999)
    average = float((counts * weights).sum() / counts.sum())
    assert 1 <= average / background < 4
    assert weights[-1] / weights[0] > 50
    assert class_balanced_weights([5, 50], 0.0) == [1.0, 1.0, 1.0]
