"""Depth: files to metrics, the BTS decoder against its equations, the loss against numpy."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from task_steps import Stages, batch_of

from gppf_ds.errors import SampleError, UserError
from gppf_ds.tasks.bts import MAX_TILT, BTSDecoder, PlaneEstimator, local_planar_guidance
from gppf_ds.tasks.depth import Depth, jitter_color, scale_invariant_log_loss
from gppf_ds.tasks.depth_metric import DepthTargets
from gppf_ds.tasks.task import FeatureInfo

CPU = torch.device("cpu")
KITCHEN = Path(__file__).parents[3] / "shared" / "data" / "depth" / "kitchen"
RESNET = FeatureInfo((8, 12, 16, 20, 24), (2, 4, 8, 16, 32))
SWIN = FeatureInfo((12, 16, 20, 24), (4, 8, 16, 32))
PLAIN_VIT = FeatureInfo((24,), (16,))
STRIDE_8 = FeatureInfo((12, 24), (4, 8))


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)
    seed(0)


def seed(number: int) -> None:
    random.seed(number)
    np.random.seed(number)
    torch.manual_seed(number)


def write_pair(folder: Path, split: str, stem: str, red: np.ndarray, millimetres: np.ndarray) -> None:
    image = np.stack([red, np.full_like(red, 90), 255 - red], axis=-1).astype(np.uint8)
    for name in ("images", "depth"):
        (folder / name / split).mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(folder / "images" / split / f"{stem}.png")
    Image.fromarray(millimetres.astype(np.uint16)).save(folder / "depth" / split / f"{stem}.png")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Four images of odd size 90x70 in each split; red tells the depth (20 red = 1 m), one corner is not measured."""
    y, x = np.mgrid[:70, :90]
    for split in ("train", "val"):
        for i in range(4):
            metres = 2 + i / 2 + x / 30 + y / 20
            millimetres = 1000 * metres
            millimetres[:10, :20] = 0
            write_pair(tmp_path, split, f"{i}", np.round(20 * metres), millimetres)
    return tmp_path


def make(folder: Path, **options: Any) -> Depth:
    defaults = {"batch_size": 4, "input_size": (64, 64), "max_depth": 20.0, "head_channels": 16}
    return Depth(str(folder), **{**defaults, **options})


def pyramid(info: FeatureInfo, height: int, width: int, batch: int = 2) -> list[torch.Tensor]:
    return [
        torch.randn(batch, channels, height // stride, width // stride, requires_grad=True)
        for channels, stride in zip(info.channels, info.strides, strict=True)
    ]


# ---- decoder


def test_local_planar_guidance_is_the_intersection_of_ray_and_plane() -> None:
    angles = torch.rand(2, 2, 2, 3, dtype=torch.float64)
    theta, phi = angles[:, 0] * MAX_TILT, angles[:, 1] * 2 * math.pi
    distance = torch.rand(2, 2, 3, dtype=torch.float64) + 0.1
    plane = torch.stack([theta.sin() * phi.cos(), theta.sin() * phi.sin(), theta.cos(), distance], dim=1)
    depth = local_planar_guidance(plane, 4)
    assert depth.shape == (2, 1, 8, 12)
    for b in range(2):
        for row in range(8):
            for column in range(12):
                # A pixel's ray is t * (u, v, 1); its depth t lies on the plane normal . point = distance.
                ray = np.array([(column % 4 - 1.5) / 4, (row % 4 - 1.5) / 4, 1.0])
                point = ray * float(depth[b, 0, row, column])
                patch = plane[b, :, row // 4, column // 4].numpy()
                assert point @ patch[:3] == pytest.approx(patch[3])


@pytest.mark.parametrize("size", [2, 4, 8])
def test_no_tilt_lets_a_depth_pass_through_infinity(size: int) -> None:
    estimator = PlaneEstimator(8, size)
    depth = estimator(1e4 * torch.randn(4, 8, 16, 16))
    assert float(depth.detach().min()) >= 0
    assert float(depth.detach().max()) < 10


@pytest.mark.parametrize("info", [RESNET, SWIN, PLAIN_VIT, STRIDE_8], ids=["resnet", "swin", "vit", "stride8"])
def test_gradients_reach_every_parameter_and_every_map(info: FeatureInfo) -> None:
    head = Depth("unused", batch_size=2, head_channels=32).build_head(info)
    features = pyramid(info, 64, 96)
    depth = torch.rand(2, 64, 96) * 70 + 1
    [loss] = head.loss(features, DepthTargets(depth, [(64, 96)] * 2)).values()
    loss.backward()
    for name, tensor in [*head.named_parameters(), *((f"map {i}", f) for i, f in enumerate(features))]:
        assert tensor.grad is not None, name
        assert torch.isfinite(tensor.grad).all(), name
        assert float(tensor.grad.abs().sum()) > 0, name


def test_output_covers_the_input_in_metres_and_the_paper_width_builds() -> None:
    decoder = BTSDecoder(RESNET, 16, max_depth=7.0).eval()
    with torch.no_grad():
        for height, width in ((32, 32), (64, 160)):
            depth = decoder(pyramid(RESNET, height, width))
            assert depth.shape == (2, 1, height, width)
            assert 0 < float(depth.min()) <= float(depth.max()) < 7.0
    assert BTSDecoder(FeatureInfo((64, 256, 512, 1024, 2048), (2, 4, 8, 16, 32)), 512, 80.0).planes8.size == 8


def test_half_precision_gives_nearly_the_same_depth() -> None:
    head = make(Path("unused")).build_head(RESNET).eval()
    features = pyramid(RESNET, 64, 64)
    targets = DepthTargets(torch.full((2, 64, 64), 5.0), [(64, 64)] * 2)
    with torch.no_grad():
        full = torch.stack(head.predict(features, targets))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            half = torch.stack(head.predict(features, targets))
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, full, rtol=0.05, atol=0.05)

    pure = head.decoder.bfloat16()
    assert pure([feature.bfloat16() for feature in features]).dtype == torch.float32


def test_planes_are_computed_in_single_precision() -> None:
    estimator = PlaneEstimator(8, 4)
    features = torch.randn(1, 8, 6, 6)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        logits = estimator.reduce(features)
        depth = estimator(features)
    estimator.reduce = torch.nn.Sequential()
    assert logits.dtype == torch.bfloat16
    assert torch.equal(depth, estimator(logits.float()))


def test_decoder_refuses_what_it_cannot_use() -> None:
    with pytest.raises(UserError, match="multiple of 16, not 24"):
        BTSDecoder(RESNET, 24, 80.0)
    with pytest.raises(UserError, match="ends at 4"):
        BTSDecoder(FeatureInfo((8,), (4,)), 16, 80.0)


# ---- loss


@pytest.mark.parametrize("focus", [0.85, 0.5, 1.0])
def test_loss_is_the_formula_over_valid_pixels(focus: float) -> None:
    prediction, depth = torch.rand(2, 5, 7) * 9 + 0.5, torch.rand(2, 5, 7) * 9 + 0.5
    valid = torch.rand(2, 5, 7) < 0.6
    g = np.log(prediction[valid].double().numpy() + 1e-3) - np.log(depth[valid].double().numpy() + 1e-3)
    expected = math.sqrt(g.var() + (1 - focus) * g.mean() ** 2)
    assert float(scale_invariant_log_loss(prediction, depth, valid, focus)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("case", ["nothing measured", "perfect"])
def test_loss_without_error_has_finite_gradients(case: str) -> None:
    prediction = torch.full((2, 3), 2.0, requires_grad=True)
    depth = torch.zeros(2, 3) if case == "nothing measured" else torch.full((2, 3), 2.0)
    loss = scale_invariant_log_loss(prediction, depth, depth > 0, 0.85)
    loss.backward()
    assert loss.item() < 1e-5
    assert prediction.grad is not None
    assert float(prediction.grad.abs().max()) == 0


# ---- data


def test_training_batch_keeps_image_and_depth_aligned(folder: Path) -> None:
    """Red tells the depth, so any crop, flip or rotation of one without the other shows."""
    task = make(folder, color=0.0, rotate=10.0)
    task.check()
    dataset = task.dataset("train")
    for i in [0, 1, 2, 3] * 3:
        image, depth = dataset[i]
        assert image.shape == (3, 64, 64)
        assert depth.shape == (64, 64)
        inside = (depth > 0) & (image[1] == 90)  # green is 90 but where rotation brought in black
        assert int(inside.sum()) > 2000
        assert float((image[0] / 20 - depth)[inside].abs().max()) < 0.2


def test_rotation_makes_new_pixels_unmeasured_and_never_mixes_depths(tmp_path: Path) -> None:
    steps = np.where(np.arange(96) < 48, 2000, 8000) * np.ones((96, 1))
    for split in ("train", "val"):
        write_pair(tmp_path, split, "a", np.full((96, 96), 50), steps)
    dataset = make(tmp_path, input_size=(96, 96), rotate=20.0).dataset("train")
    values = [set(dataset[0][1].unique().tolist()) for _ in range(8)]
    assert all(found <= {0.0, 2.0, 8.0} for found in values)
    assert any(0.0 in found for found in values)


def test_small_images_are_padded_to_the_crop(folder: Path) -> None:
    image, depth = make(folder, input_size=(96, 128), rotate=0.0, color=0.0).dataset("train")[0]
    assert image.shape == (3, 96, 128)
    assert int((depth > 0).sum()) == 70 * 90 - 200


def test_validation_keeps_the_whole_image_at_its_size(folder: Path) -> None:
    write_pair(folder, "val", "z", np.full((33, 110), 60), np.full((33, 110), 3000))
    task = make(folder)
    batch = batch_of(task, "val", False, [0, 4])
    assert batch.images.shape == (2, 3, 96, 128)
    assert batch.targets.sizes == [(70, 90), (33, 110)]
    assert int((batch.targets.depth[1, :33, :110] - 3.0).abs().lt(1e-5).sum()) == 33 * 110
    assert int((batch.targets.depth[1] > 0).sum()) == 33 * 110  # no depth in the padding
    torch.testing.assert_close(batch.images[1, :, 32, 0], batch.images[1, :, 95, 0])  # padded by the last row

    head = task.build_head(RESNET).eval()
    with torch.no_grad():
        predictions = head.predict(pyramid(RESNET, 96, 128), batch.targets)
    assert [tuple(p.shape) for p in predictions] == batch.targets.sizes
    metric = task.metric()
    metric.update(predictions, batch.targets)
    assert all(math.isfinite(value) for value in metric.compute().values())


def test_samples_are_a_function_of_the_seeds(folder: Path) -> None:
    dataset = make(folder).dataset("train")

    def draw(number: int) -> tuple[torch.Tensor, torch.Tensor]:
        seed(number)
        return dataset[0]

    first, again, other = draw(1), draw(1), draw(2)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[1], other[1])


def test_color_changes_half_of_the_images_within_bounds() -> None:
    image = torch.full((3, 4, 4), 128, dtype=torch.uint8)
    outcomes = [jitter_color(image, 0.1) for _ in range(200)]
    changed = [outcome for outcome in outcomes if not torch.equal(outcome, image)]
    assert 70 < len(changed) < 130
    low, high = 255 * (128 / 255) ** 1.1 * 0.81, 255 * (128 / 255) ** 0.9 * 1.21
    assert all(low - 1 < float(o.min()) <= float(o.max()) < high + 1 for o in changed)
    assert torch.equal(jitter_color(image, 0.0), image)


@pytest.mark.parametrize("which", ["images", "depth"])
def test_unreadable_file_is_a_sample_error_that_names_it(folder: Path, which: str) -> None:
    path = folder / which / "train" / "0.png"
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(SampleError, match=str(path)):
        make(folder).dataset("train")[0]


def test_corrupt_jpeg_is_a_sample_error(folder: Path) -> None:
    png = folder / "images" / "train" / "0.png"
    jpeg = png.with_suffix(".jpg")
    Image.open(png).save(jpeg)
    png.unlink()
    jpeg.write_bytes(jpeg.read_bytes()[:400])
    with pytest.raises(SampleError, match=str(jpeg)):
        make(folder).dataset("train")[0]


def test_depth_of_another_size_is_a_sample_error(folder: Path) -> None:
    path = folder / "depth" / "train" / "0.png"
    Image.fromarray(np.full((35, 45), 3000, np.uint16)).save(path)
    with pytest.raises(SampleError, match="is 45x35, but its image 0.png is 90x70".replace(".", r"\.")):
        make(folder).dataset("train")[0]


def test_check_names_what_is_wrong(folder: Path) -> None:
    with pytest.raises(UserError, match=r"correct depth_scale \(1\.0\)"):
        make(folder, depth_scale=1.0).check()
    with pytest.raises(UserError, match="depth_maps"):
        make(folder, depth="depth_maps/{split}").check()
    (folder / "depth" / "val" / "2.png").unlink()
    with pytest.raises(UserError, match=r"2\.png"):
        make(folder).check()
    for path in (folder / "depth" / "train").iterdir():
        path.write_bytes(b"no image")
    with pytest.raises(UserError, match="no 16-bit PNG"):
        make(folder).check()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"input_size": (64, 70)}, "input_size"),
        ({"min_depth": 0.0}, "min_depth"),
        ({"min_depth": 30.0}, "below max_depth"),
        ({"depth_scale": 0.0}, "depth_scale"),
        ({"color": 1.5}, "color must lie in"),
        ({"variance_focus": -0.1}, "variance_focus must lie in"),
    ],
)
def test_bad_arguments(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        make(Path("unused"), **options)


# ---- all together


def test_overfits_a_few_images(folder: Path) -> None:
    task = make(folder, head_channels=32)
    backbone = Stages(RESNET)
    head = task.build_head(RESNET)
    optimizer = torch.optim.Adam([*backbone.parameters(), *head.parameters()], lr=5e-3)
    losses = []
    for step in range(60):
        if step % 10 == 0:
            batch = batch_of(task, "train", True, [0, 1, 2, 3])
        optimizer.zero_grad()
        loss = head.loss(backbone(batch.images), batch.targets)["silog"]
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.4 * losses[0]

    head.eval()
    metric = task.metric()
    batch = batch_of(task, "val", False, [0, 1, 2, 3])
    with torch.no_grad():
        metric.update(head.predict(backbone(batch.images), batch.targets), batch.targets)
    assert metric.compute()["abs_rel"] < 0.3


def test_kitchen_loads_through_lists_and_crops(tmp_path: Path) -> None:
    """The lists name files of two folders, and both parts of a pair are cut alike."""
    if not KITCHEN.is_dir():
        pytest.skip(f"{KITCHEN} is absent")
    for split in ("train", "val"):
        names = sorted(path.stem for path in (KITCHEN / "rgb" / split).iterdir())[:5]
        lines = [f"rgb/{split}/{name}.jpg depth/{split}/{name}.png 525.0" for name in names]
        (tmp_path / f"{split}.txt").write_text("\n".join([*lines, f"rgb/{split}/none.jpg None 525.0"]))
    lists = {f"{split}_list": str(tmp_path / f"{split}.txt") for split in ("train", "val")}
    task = make(KITCHEN, images=".", depth=".", max_depth=10.0, kb_crop=(352, 608), **lists)
    task.check()
    assert len(task.dataset("train")) == len(task.dataset("val")) == 5
    whole = make(KITCHEN, images="rgb/{split}", max_depth=10.0).dataset("val")
    for cut, full in zip(task.dataset("val")[3], whole[3], strict=True):
        assert torch.equal(cut, full[..., 128:, 16:624])
    assert task.dataset("train")[0][0].shape == (3, 64, 64)


def test_kitchen_loads_through_the_same_code() -> None:
    if not KITCHEN.is_dir():
        pytest.skip(f"{KITCHEN} is absent")
    task = make(KITCHEN, images="rgb/{split}", max_depth=10.0)
    task.check()
    assert len(task.dataset("train")) == 160
    assert len(task.dataset("val")) == 40
    batch = batch_of(task, "val", False, [0, 39])
    assert batch.images.shape == (2, 3, 480, 640)
    measured = batch.targets.depth[batch.targets.depth > 0]
    assert 0.5 < float(measured.median()) < 4
    head = task.build_head(RESNET)
    loss = head.loss(Stages(RESNET)(batch.images), batch.targets)["silog"]
    assert 0 < loss.item() < 5
