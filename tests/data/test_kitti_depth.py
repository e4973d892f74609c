"""KITTI depth with the Eigen split: made in its official layout, read by the depth task."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from task_steps import Stages, batch_of

from gppf_ds.data.sets.kitti_depth import DEPTH_FOLDER, LISTS, SOURCES, read_pairs
from gppf_ds.errors import SampleError, UserError
from gppf_ds.tasks.depth import Depth
from gppf_ds.tasks.task import FeatureInfo

torch.set_num_threads(1)
INFO = FeatureInfo((8, 8, 8, 8, 8), (2, 4, 8, 16, 32))
SOURCE = SOURCES["kitti_depth"]
TRAIN_DEPTH = f"{DEPTH_FOLDER}/train/2011_09_26_drive_0001_sync/proj_depth/groundtruth/image_02/0000000006.png"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("kitti")
    SOURCE.smoke(made)
    return made


@pytest.fixture
def copy(root: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(root, tmp_path / "copy"))


def depth_task(root: Path, **more: Any) -> Depth:
    """The options of the recipe, a quarter of KITTI's size."""
    options: dict[str, Any] = {
        "images": ".",
        "depth": DEPTH_FOLDER,
        "train_list": LISTS["train"],
        "val_list": LISTS["test"],
        "depth_scale": 1 / 256,
        "kb_crop": (88, 304),
        "input_size": (64, 128),
        "head_channels": 32,
        "garg_crop": True,
        "flip_test": True,
        "source": "kitti_depth",
    }
    return Depth(str(root), batch_size=4, **(options | more))


def test_clean_smoke_set_has_the_layout_and_no_faults(root: Path) -> None:
    assert [place for place in SOURCE.layout if not (root / place).exists()] == []
    assert SOURCE.count(root) == {"train pairs": 8, "test pairs": 4}
    assert SOURCE.counts == {"train pairs": 23158, "test pairs": 652}
    assert SOURCE.faults(root, 5) == []


def test_smoke_run_trains_and_evaluates(root: Path) -> None:
    task = depth_task(Path("nowhere"), kb_crop=(352, 1216), input_size=(352, 704))
    task.use_data(root)
    task.shrink()
    task.check()
    assert (len(task.dataset("train")), len(task.dataset("val"))) == (
        8,
        4,
    )  # the test list has a line without a depth map
    torch.manual_seed(0)
    backbone, head = Stages(INFO), task.build_head(INFO)
    batch = batch_of(task, "train", True, (0, 7))
    assert batch.images.shape == (2, 3, 64, 64)
    assert float(batch.targets.depth.max()) > 4
    [loss] = head.loss(backbone(batch.images), batch.targets).values()
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in backbone.parameters())

    metric, head = task.metric(), head.eval()
    batch = batch_of(task, "val", False, (0, 3))
    assert batch.images.shape == (4, 3, 64, 128)
    with torch.no_grad():
        metric.update(head.predict(backbone(batch.images), batch.targets), batch.targets)
    found = metric.compute()
    assert all(np.isfinite(list(found.values())))
    assert 0 < found["abs_rel"] < 30


def test_crop_is_at_the_bottom_and_in_the_middle(root: Path) -> None:
    image, depth = depth_task(root).dataset("val")[0]
    path, depth_path = read_pairs(root / LISTS["test"], root, root / DEPTH_FOLDER)[0]
    pixels, metres = np.array(Image.open(path)), np.array(Image.open(depth_path)) / 256
    assert pixels.shape == (94, 310, 3)
    np.testing.assert_array_equal(image.permute(1, 2, 0).numpy(), pixels[6:, 3:307])
    np.testing.assert_allclose(depth.numpy(), metres[6:, 3:307], rtol=1e-6)
    with pytest.raises(SampleError, match=r"0000000005.png is 310x94, smaller than kb_crop \(1216x352\)"):
        depth_task(root, kb_crop=(352, 1216)).dataset("val")[0]


def test_flipped_images_are_averaged(root: Path) -> None:
    torch.manual_seed(0)
    backbone = Stages(INFO)
    plain, both = depth_task(root, flip_test=False), depth_task(root)
    head = both.build_head(INFO).eval()
    with torch.no_grad():
        single, double = (batch_of(task, "val", False, (0, 2)) for task in (plain, both))
        alone = head.predict(backbone(single.images), single.targets)
        mirror = head.predict(backbone(single.images.flip(-1)), single.targets)
        together = head.predict(backbone(double.images), double.targets)
    # 304 columns were padded to 320, so what was flipped begins with the padding.
    width = single.images.shape[-1]
    assert width == 320
    full = head.decoder(backbone(single.images.flip(-1))).squeeze(1).clamp(1e-3, 80).flip(-1)
    for index, found in enumerate(together):
        torch.testing.assert_close(found, (alone[index] + full[index, :88, :304]) / 2)
    assert not torch.allclose(together[0], alone[0])
    assert len(mirror) == len(together) == 2


# ---- the lists


def test_lists_without_dates_and_merged_depth_folders(root: Path, tmp_path: Path) -> None:
    """Older lists leave the date out, and BTS has the benchmark's train and val in one folder."""
    lines = (root / LISTS["test"]).read_text().splitlines()
    older = tmp_path / "older.txt"
    older.write_text("\n".join(line.removeprefix("2011_09_26/") for line in lines))
    assert read_pairs(older, root, root / DEPTH_FOLDER / "val") == read_pairs(
        root / LISTS["test"], root, root / DEPTH_FOLDER
    )


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("only_one_field.png", "has 1 fields"),
        ("a/b.png c/d.png 721.5 more", "has 4 fields"),
        ("a/b.txt c/d.png 721.5", "names a/b.txt, which is no image"),
        ("a/b.png c/d.jpg 721.5", "names c/d.jpg for a depth map"),
        ("/a/b.png c/d.png 721.5", "absolute path"),
    ],
)
def test_bad_line_is_named(copy: Path, line: str, sentence: str) -> None:
    path = copy / LISTS["train"]
    path.write_text(path.read_text() + line + "\n")
    [fault] = SOURCE.faults(copy, 5)
    assert fault.startswith(f"{path}:9 ")
    assert sentence in fault
    with pytest.raises(UserError, match=f"{path}:9 "):
        depth_task(copy).check()


def test_lists_that_cannot_work_are_refused(root: Path, copy: Path) -> None:
    with pytest.raises(UserError, match="give both or neither"):
        depth_task(root, val_list=None)
    with pytest.raises(UserError, match="train_test_inputs"):
        depth_task(root, train_list="absent.txt").check()
    with pytest.raises(UserError, match="correct data, images, depth or train_list"):
        depth_task(root, depth="elsewhere").check()
    (copy / LISTS["test"]).write_text("a/b.png None 721.5\n")
    with pytest.raises(UserError, match="names no depth map"):
        depth_task(copy).check()
    (copy / LISTS["test"]).unlink()
    assert SOURCE.faults(copy, 5) == [f"{copy / LISTS['test']} is missing"]
    assert SOURCE.count(copy) == {"train pairs": 8, "test pairs": 0}


# ---- the depth maps


def test_missing_files(copy: Path) -> None:
    (copy / TRAIN_DEPTH).unlink()
    assert SOURCE.faults(copy, 5) == [f"{copy / LISTS['train']}:2 names {copy / TRAIN_DEPTH}, which is missing"]
    assert SOURCE.count(copy)["train pairs"] == 7
    with pytest.raises(SampleError, match=r"0000000006\.png"):
        depth_task(copy).dataset("train")[1]


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        (np.full((94, 300), 2560, dtype=np.uint16), "is 300x94 and its image 310x94"),
        (np.full((94, 310), 99, dtype=np.uint8), "16-bit"),
        (np.zeros((94, 310), dtype=np.uint16), "no measured pixel"),
    ],
    ids=["size", "8 bit", "empty"],
)
def test_wrong_depth_map(copy: Path, values: np.ndarray, sentence: str) -> None:
    Image.fromarray(values).save(copy / TRAIN_DEPTH)
    [fault] = SOURCE.faults(copy, 5)
    assert fault.startswith(f"{copy / LISTS['train']}:2: ")
    assert sentence in fault


def test_truncated_png(copy: Path) -> None:
    path = copy / TRAIN_DEPTH
    path.write_bytes(path.read_bytes()[:-40])
    [fault] = SOURCE.faults(copy, 5)
    assert fault.startswith(f"{copy / LISTS['train']}:2: ")
    assert str(path) in fault
    with pytest.raises(SampleError, match=r"0000000006\.png"):
        depth_task(copy).dataset("train")[1]
