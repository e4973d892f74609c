"""The simple feature pyramid, and dense heads that train behind it on a tiny ViT. Importing mmdet takes seconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from task_steps import batch_of
from torch import Tensor, nn

from gppf_ds.backbone.vit import FAMILY, split
from gppf_ds.tasks.classification import Classification, ClassificationHead
from gppf_ds.tasks.depth import Depth, DepthHead
from gppf_ds.tasks.detection import Detection
from gppf_ds.tasks.pyramid import PyramidHead, SimpleFeaturePyramid, build_head, resample
from gppf_ds.tasks.segmentation import Segmentation
from gppf_ds.tasks.task import FeatureInfo, Task

torch.set_num_threads(1)
ONE_MAP = FeatureInfo((48,), (16,))
RESNET = FeatureInfo((8, 8, 16, 16, 32), (2, 4, 8, 16, 32))


class TinyViT(nn.Module):
    """Images -> the one map of a ViT of 3 blocks."""

    def __init__(self, name: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        model = timm.create_model(
            name, **FAMILY.options, num_classes=0, embed_dim=48, depth=3, num_heads=3, img_size=112
        )
        blocks = split(model)
        self.layers = nn.Sequential(*(block.module for block in blocks))
        assert blocks[-1].tap is not None
        self.tap = blocks[-1].tap
        self.info = FeatureInfo((self.tap.channels,), (self.tap.stride,))

    def forward(self, images: Tensor) -> Tensor:
        return self.tap.as_map(self.layers(images), (images.shape[-2], images.shape[-1]))


@pytest.fixture(params=["vit_tiny_patch16_224", "vit_small_patch14_reg4_dinov2"])
def vit(request: pytest.FixtureRequest) -> TinyViT:
    return TinyViT(request.param)


def scenes(demo_data: Path, kind: str) -> Task:
    """A task on the demo's scenes."""
    root = demo_data / "scenes"
    places = {f"{split}_images": f"images/{split}" for split in ("train", "val")}
    if kind == "depth":
        return Depth(str(root), 2, max_depth=20.0, input_size=(96, 128), head_channels=32)
    if kind == "detection":
        jsons = {split: f"annotations/instances_{split}.json" for split in ("train", "val")}
        every_score = {"model.test_cfg.rcnn.score_thr": 0.0}
        return Detection("mask_rcnn_demo.py", 2, data_root=str(root), overrides=every_score, **places, **jsons)
    labels = {f"{split}_labels": f"labels/{split}" for split in ("train", "val")}
    return Segmentation("upernet_demo.py", 2, data_root=str(root), classes="classes.json", **places, **labels)


@pytest.mark.parametrize("patch", [8, 14, 16, 32])
@pytest.mark.parametrize("size", [(224, 224), (96, 160), (352, 704), (1024, 32)])
def test_maps_have_their_strides_exactly(patch: int, size: tuple[int, int]) -> None:
    pyramid = SimpleFeaturePyramid(48, patch, (2, 4, 8, 16, 32))
    assert pyramid.features == FeatureInfo((6, 12, 24, 48, 48), (2, 4, 8, 16, 32))
    grid = [-(-side // patch) for side in size]
    with torch.no_grad():
        maps = pyramid(torch.randn(1, 48, *grid))
    for x, channels, stride in zip(maps, pyramid.features.channels, pyramid.features.strides, strict=True):
        assert x.shape == (1, channels, size[0] // stride, size[1] // stride)


def test_odd_images_keep_the_strides_of_a_resnet_to_a_patch() -> None:
    """Neighbouring maps fit each other, and the coarse ones have the ResNet's ceil(side / stride)."""
    for side in range(33, 130):
        pyramid = SimpleFeaturePyramid(8, 16, (4, 8, 16, 32))
        rows = [x.shape[-1] for x in pyramid(torch.randn(1, 8, 1, -(-side // 16)))]
        assert rows[2:] == [-(-side // 16), -(-side // 32)]
        assert rows[:2] == [4 * rows[2], 2 * rows[2]]
        sixteenths = resample(torch.zeros(1, 1, 1, -(-side // 14)), 14).shape[-1]
        assert sixteenths in (-(-side // 16) - 1, -(-side // 16))
        assert side - 16 * sixteenths < 14


@pytest.mark.parametrize("patch", [8, 14, 32])
def test_resampling_keeps_every_place(patch: int) -> None:
    """Each patch says where its centre is: so must each cell of the new grid, except outside the outermost centres."""
    columns = (torch.arange(224 // patch) + 0.5) * patch
    x = torch.stack([columns.expand(7, -1), (torch.arange(7)[:, None] + 0.5).expand(-1, len(columns)) * patch])[None]
    found = resample(x, patch)
    places = (torch.arange(found.shape[-1]) + 0.5) * 16
    inside = (places >= columns[0]) & (places <= columns[-1])
    assert inside.sum() >= 12
    torch.testing.assert_close(found[0, 0, 0, inside], places[inside])
    torch.testing.assert_close(found[0, 1, 1:3, 0], torch.tensor([24.0, 40.0]))


def test_layers_are_those_of_the_paper() -> None:
    """Parallel branches from the last map; layer norm over channels and GELU between transposed convolutions."""
    pyramid = SimpleFeaturePyramid(48, 16, (4, 8, 16, 32))
    kinds = [[type(module).__name__ for module in branch] for branch in pyramid.branches]
    deconvolution = "ConvTranspose2d"
    assert kinds == [[deconvolution, "LayerNorm2d", "GELU", deconvolution], [deconvolution], [], ["MaxPool2d"]]
    x = torch.randn(2, 48, 6, 4)
    maps = pyramid(x)
    assert torch.equal(maps[2], x)
    assert torch.equal(maps[3], nn.functional.max_pool2d(x, 2))
    first, norm, _, second = pyramid.branches[0]
    middle = nn.functional.layer_norm(first(x).movedim(1, -1), (24,), norm.weight, norm.bias, 1e-6).movedim(-1, 1)
    torch.testing.assert_close(maps[0], second(nn.functional.gelu(middle)))


def test_only_dense_heads_on_one_map_get_a_pyramid(tmp_path: Path) -> None:
    classification = Classification(str(tmp_path), 2, classes=3)
    depth = Depth(str(tmp_path), 2, head_channels=32)
    assert type(build_head(classification, ONE_MAP)) is ClassificationHead
    assert type(build_head(depth, RESNET)) is DepthHead
    head = build_head(depth, ONE_MAP)
    assert isinstance(head, PyramidHead)
    assert head.pyramid.features.strides == head.head.decoder.strides == (2, 4, 8, 16, 32)
    head = build_head(type("Coarse", (Depth,), {"min_stride": 8})(str(tmp_path), 2, head_channels=32), ONE_MAP)
    assert isinstance(head, PyramidHead)
    assert head.pyramid.features.strides == (8, 16, 32)


@pytest.mark.parametrize("kind", ["detection", "segmentation", "depth"])
def test_dense_heads_train_on_a_vit(kind: str, demo_data: Path, vit: TinyViT) -> None:
    task = scenes(demo_data, kind)
    task.check()
    torch.manual_seed(0)
    head = build_head(task, vit.info)
    assert isinstance(head, PyramidHead)
    assert not any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in head.pyramid.modules())
    batch = batch_of(task, "train", training=True)
    optimizer = torch.optim.Adam([*vit.parameters(), *head.parameters()], lr=1e-3)
    losses: list[float] = []
    for _ in range(5):
        torch.manual_seed(1)
        optimizer.zero_grad()
        loss = torch.stack(list(head.loss([vit(batch.images)], batch.targets).values())).sum()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    silent = [name for part in (vit, head) for name, p in part.named_parameters() if p.grad is None]
    assert silent == []
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("kind", ["detection", "segmentation", "depth"])
def test_predictions_go_through_the_pyramid(kind: str, demo_data: Path, vit: TinyViT) -> None:
    task = scenes(demo_data, kind)
    torch.manual_seed(0)
    head = build_head(task, vit.info).eval()
    assert isinstance(head, PyramidHead)
    batch, again = batch_of(task, "val", training=False), batch_of(task, "val", training=False)
    with torch.no_grad():
        x = vit.eval()(batch.images)
        found = head.predict([x], batch.targets)
        expected: list[Any] = head.head.predict(head.pyramid(x), again.targets)
    assert len(found) == 2
    assert kind != "detection" or all(len(one["boxes"]) > 0 for one in found)
    metric = task.metric()
    metric.update(found, batch.targets)
    assert task.headline in metric.compute()
    for one, other in zip(found, expected, strict=True):
        pairs = (
            [(one[key], other[key]) for key in ("boxes", "scores", "labels")] if kind == "detection" else [(one, other)]
        )
        assert all(torch.equal(torch.as_tensor(a), torch.as_tensor(b)) for a, b in pairs)
