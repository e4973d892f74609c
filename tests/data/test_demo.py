import hashlib
import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from gppf_ds.data.coco import check_coco
from gppf_ds.data.demo import DIGIT_NAMES, IGNORE_LABEL, make_demo_data
from gppf_ds.data.demo_scenes import DIGITS, GROUNDS, WALLS, load_sources
from gppf_ds.data.folders import pair_by_stem, read_depth, read_label_map, read_rgb
from gppf_ds.errors import UserError

torch.set_num_threads(1)

SMALL = {"train_scenes": 12, "val_scenes": 6, "train_crops": 20, "val_crops": 10}


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    root = tmp_path_factory.mktemp("demo") / "data"
    make_demo_data(root, **SMALL)
    return root


def _digests(root: Path) -> dict[str, str]:
    files = (path for path in sorted(root.rglob("*")) if path.is_file())
    return {path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


WALL, GROUND, DIGIT = range(3)


def _scenes(root: Path):
    """(labels, depth, [(annotation, mask), ...]) of every scene."""
    for split in ("train", "val"):
        coco = COCO(str(root / f"scenes/annotations/instances_{split}.json"))
        for image_id in coco.getImgIds():
            stem = Path(coco.imgs[image_id]["file_name"]).stem
            labels = read_label_map(root / f"scenes/labels/{split}/{stem}.png")
            depth = read_depth(root / f"scenes/depth/{split}/{stem}.png", 0.001)
            annotations = coco.loadAnns(coco.getAnnIds(imgIds=[image_id]))
            yield labels, depth, [(a, coco.annToMask(a).astype(bool)) for a in annotations]


def test_layout(demo):
    assert (demo / "README.txt").read_text().count("CC BY") >= 3
    assert json.loads((demo / "scenes/classes.json").read_text()) == ["wall", "ground", "digit"]
    unit = json.loads((demo / "scenes/depth.json").read_text())
    assert unit == {"unit": "millimetre", "scale_to_metres": 0.001, "invalid": 0}
    for split, scenes, crops in (("train", 12, 20), ("val", 6, 10)):
        folders = sorted((demo / "classification" / split).iterdir())
        assert [folder.name for folder in folders] == [str(digit) for digit in range(10)]
        assert {len(list(folder.iterdir())) for folder in folders} == {crops // 10}
        assert read_rgb(folders[3] / "00000.jpg").size == (64, 64)
        for kind in ("labels", "depth"):
            pairs = pair_by_stem(demo / "scenes/images" / split, demo / "scenes" / kind / split, ".png")
            assert len(pairs) == scenes
            assert {Image.open(path).size for pair in pairs for path in pair} == {(128, 128)}


def test_check_coco_accepts(demo):
    scenes = demo / "scenes"
    jsons = [scenes / f"annotations/instances_{split}.json" for split in ("train", "val")]
    assert check_coco(*jsons, scenes / "images/train", scenes / "images/val") == list(DIGIT_NAMES)


def test_masks_boxes_and_labels_agree(demo):
    kinds = set()
    for labels, _, annotations in _scenes(demo):
        assert 1 <= len(annotations) <= 4
        objects = np.zeros_like(labels)
        for annotation, mask in annotations:
            kinds.add(type(annotation["segmentation"]))
            x, y, width, height = coco_mask.toBbox(coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8)))
            np.testing.assert_allclose(annotation["bbox"], [x, y, width, height], atol=1)
            assert 28 <= height <= 70  # 30 to 67 when drawn, and a nearer digit may cover up to 30 %
            assert abs(annotation["area"] - mask.sum()) <= 0.05 * mask.sum()
            # The polygons are rastered again by pycocotools, so single border pixels may differ.
            assert (labels[mask] == DIGIT).mean() > 0.95
            assert annotation["iscrowd"] == 0
            objects[mask] = DIGIT
        assert set(np.unique(labels)) == {WALL, GROUND, DIGIT, IGNORE_LABEL}
        assert ((labels == IGNORE_LABEL) & (objects == 0)).any()
        assert ((labels == DIGIT) != (objects == DIGIT))[labels != IGNORE_LABEL].mean() < 0.01
        rows = np.arange(len(labels))[:, None]
        assert np.where(labels == WALL, rows, 0).max() < np.where(labels == GROUND, rows, 0).max()
        assert (labels[0] != GROUND).all(), "the ground reaches the top"
    assert kinds == {list, dict}


def test_objects_are_nearer_than_what_they_cover(demo):
    for labels, depth, annotations in _scenes(demo):
        valid = depth > 0
        assert 0.85 < valid.mean() < 0.99
        assert depth[valid].min() > 1
        assert depth.max() < 12
        for annotation, mask in annotations:
            x, y, width, height = (int(v) for v in annotation["bbox"])
            inside = np.zeros_like(mask)
            inside[y : y + height, x : x + width] = True
            behind = inside & ((labels == WALL) | (labels == GROUND)) & valid
            own = np.median(depth[mask & valid])
            assert depth[behind].min() >= own * 0.95
            assert np.median(depth[behind]) > own * 1.05


def test_nearer_is_larger(demo):
    """Focal length (128) times height (1 m) over size in pixels is the distance, for digits nothing stands before."""
    checked = 0
    for _, depth, annotations in _scenes(demo):
        if len(annotations) == 1:
            annotation, mask = annotations[0]
            expected = 128 / annotation["bbox"][3]
            assert np.median(depth[mask & (depth > 0)]) == pytest.approx(expected, rel=0.12)
            checked += 1
    assert checked


def test_splits_share_no_source():
    assert not set(DIGITS["train"]) & set(DIGITS["val"])
    assert not {*GROUNDS["train"], *WALLS["train"]} & {*GROUNDS["val"], *WALLS["val"]}
    train, val = (load_sources(split) for split in ("train", "val"))
    train_inks = {(ink.size, ink.tobytes()) for ink in train.digits}
    assert not train_inks & {(ink.size, ink.tobytes()) for ink in val.digits}
    assert set(val.classes) == set(range(10))


def test_same_arguments_same_bytes(demo, tmp_path):
    """In another process, so that nothing hangs on its state."""
    code = (
        f"from pathlib import Path; from gppf_ds.data.demo import make_demo_data; make_demo_data(Path('d'), **{SMALL})"
    )
    repo = str(Path(__file__).parents[2])
    subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={"PYTHONPATH": repo, "PYTHONHASHSEED": "7"},
        check=True,
        timeout=120,
    )
    assert _digests(tmp_path / "d") == _digests(demo)
    make_demo_data(tmp_path / "e", seed=1, **SMALL)
    first, second = _digests(demo), _digests(tmp_path / "e")
    same = {name for name in first if first[name] == second.get(name)}
    assert same == {"README.txt", "scenes/classes.json", "scenes/depth.json"}


def test_complete_folder_is_reused(demo):
    before = {path: path.stat().st_mtime_ns for path in demo.rglob("*")}
    make_demo_data(demo, **SMALL)
    assert {path: path.stat().st_mtime_ns for path in demo.rglob("*")} == before
    with pytest.raises(UserError, match=f"{demo} .*other arguments"):
        make_demo_data(demo, seed=5, **SMALL)


def test_incomplete_folder_is_refused_until_overwrite(tmp_path):
    root = tmp_path / "data"
    tiny = {"train_scenes": 1, "val_scenes": 1, "train_crops": 10, "val_crops": 10}
    make_demo_data(root, **tiny)
    whole = _digests(root)
    (root / "scenes/images/train/000001.jpg").unlink()
    with pytest.raises(UserError, match="incomplete"):
        make_demo_data(root, **tiny)
    make_demo_data(root, **tiny, overwrite=True)
    assert _digests(root) == whole
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_a_stranger_s_folder_is_never_replaced(tmp_path):
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(UserError, match="something other"):
        make_demo_data(tmp_path, **SMALL, overwrite=True)
    assert (tmp_path / "thesis.tex").read_text() == "mine"


def test_failure_leaves_nothing(tmp_path, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("gppf_ds.data.demo.draw_scene", stop)
    with pytest.raises(KeyboardInterrupt):
        make_demo_data(tmp_path / "data", **SMALL)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("key", "value"), [("train_scenes", 0), ("val_crops", 9), ("scene_size", 32), ("crop_size", 8), ("seed", -1)]
)
def test_bad_arguments(tmp_path, key, value):
    with pytest.raises(UserError, match=key):
        make_demo_data(tmp_path / "data", **{**SMALL, key: value})


def test_classification_can_be_learnt(tmp_path):
    """A tiny network on the default number of crops gets far above chance (0.1) on other writers and photographs."""
    make_demo_data(tmp_path / "data", train_scenes=1, val_scenes=1)

    def load(split):
        files = sorted((tmp_path / "data/classification" / split).glob("*/*.jpg"))
        images = np.stack([np.asarray(read_rgb(file).resize((32, 32))) for file in files])
        labels = torch.tensor([int(file.parent.name) for file in files])
        return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255 - 0.5, labels

    (images, labels), (val_images, val_labels) = load("train"), load("val")
    torch.manual_seed(0)
    layers: list[torch.nn.Module] = []
    for a, b in pairwise((3, 16, 32, 64)):
        layers += [torch.nn.Conv2d(a, b, 3, padding=1), torch.nn.BatchNorm2d(b), torch.nn.ReLU(), torch.nn.MaxPool2d(2)]
    model = torch.nn.Sequential(*layers, torch.nn.Flatten(), torch.nn.Dropout(0.3), torch.nn.Linear(64 * 16, 10))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=160)
    for _ in range(160):
        chosen = torch.randint(len(images), (64,))
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(images[chosen]), labels[chosen]).backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        accuracy = (model.eval()(val_images).argmax(1) == val_labels).float().mean().item()
    assert accuracy > 0.4
