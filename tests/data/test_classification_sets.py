"""The classification sets: made in their own layouts, counted, searched for faults, read, learnt from, measured."""

from __future__ import annotations

import json
import pickle
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.io import loadmat, savemat
from torch import nn

from gppf_ds.data.sets.classification import SETS, SOURCES, open_split
from gppf_ds.errors import SampleError, UserError
from gppf_ds.tasks.classification import Classification
from gppf_ds.tasks.task import FeatureInfo

CPU = torch.device("cpu")
MEAN_PER_CLASS = {"cls_aircraft", "cls_caltech101", "cls_flowers", "cls_pets"}


@pytest.fixture(autouse=True)
def _quiet(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    torch.set_num_threads(1)
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


def made(name: str, root: Path) -> Path:
    SOURCES[name].smoke(root)
    return root


def test_every_set_is_there() -> None:
    tens = "aircraft caltech101 cars cifar10 cifar100 dtd flowers food101 pets sun397"
    assert set(SOURCES) == {"imagenet21k", "imagenet1k", *(f"cls_{name}" for name in tens.split())}
    assert {name for name, chosen in SETS.items() if chosen.headline == "mean_class"} == MEAN_PER_CLASS
    pickle.dumps(dict(SETS))


@pytest.mark.parametrize("name", SOURCES)
def test_a_smoke_set_is_whole(name: str, tmp_path: Path) -> None:
    source, root = SOURCES[name], made(name, tmp_path)
    assert [part for part in source.layout if not (root / part).exists()] == []
    assert source.faults(root, 5) == []
    counts = source.count(root)
    assert counts.keys() == source.counts.keys()
    sizes = [len(open_split(name, root, split)) for split in ("train", "val")]
    assert list(counts.values()) == [*sizes, len(open_split(name, root, "train").classes)]
    assert min(sizes) > 0


@pytest.mark.parametrize("name", SOURCES)
def test_a_smoke_set_is_learnt_and_measured(name: str, tmp_path: Path) -> None:
    task = Classification("nowhere", batch_size=256, source=name, mixup=0.2, label_smoothing=0.1)
    task.use_data(made(name, tmp_path))
    task.shrink()
    task.check()
    dataset = pickle.loads(pickle.dumps(task.dataset("train")))
    head = task.build_head(FeatureInfo((3,), (8,)))
    raw = task.collate([dataset[i] for i in range(0, len(dataset), len(dataset) // 4)][:4])
    batch = task.preprocess(raw, CPU, training=True)
    assert batch.images.shape == (4, 3, 64, 64)
    loss = head.loss([nn.functional.avg_pool2d(batch.images, 8)], batch.targets)["cross_entropy"]
    loss.backward()
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in head.parameters())

    metric, unseen = task.metric(), task.dataset("val")
    for index in range(len(unseen)):
        batch = task.preprocess(task.collate([unseen[index]]), CPU, training=False)
        metric.update(head.predict([batch.images], batch.targets), batch.targets)
    assert 0 <= metric.compute()[task.headline] <= 1
    assert task.headline == ("mean_class" if name in MEAN_PER_CLASS else "top1")


@pytest.mark.parametrize("name", SOURCES)
def test_the_colours_of_the_classes_agree_in_both_splits(name: str, tmp_path: Path) -> None:
    """The labels are of the right images: an image of a class is nearest to the mean colour of the class in train."""
    made(name, tmp_path)
    train, val = (
        [(np.asarray(image).mean((0, 1)), label) for image, label in open_split(name, tmp_path, split)]
        for split in ("train", "val")
    )
    labels = sorted({label for _, label in train})
    assert len(labels) == 3
    means = np.stack([np.mean([colour for colour, other in train if other == label], axis=0) for label in labels])
    for colour, label in val:
        assert labels[int(np.abs(means - colour).sum(1).argmin())] == label


def test_lists_agree_with_torchvision(tmp_path: Path) -> None:
    """What we read ourselves, torchvision reads the same, as far as it can."""
    from torchvision.datasets import SUN397, ImageFolder, OxfordIIITPet

    made("cls_pets", tmp_path)
    for split, theirs in (("train", "trainval"), ("val", "test")):
        pets, ours = OxfordIIITPet(tmp_path, theirs), open_split("cls_pets", tmp_path, split)
        assert [label for _, label in pets] == [label for _, label in ours]
        assert [name.replace("_", " ").title() for name in ours.classes] == pets.classes

    made("cls_sun397", tmp_path)
    labels = {np.asarray(image).tobytes(): label for image, label in SUN397(tmp_path)}
    both = [pair for split in ("train", "val") for pair in open_split("cls_sun397", tmp_path, split)]
    assert {np.asarray(image).tobytes(): label for image, label in both} == labels

    made("cls_caltech101", tmp_path)
    splits = {split: open_split("cls_caltech101", tmp_path, split).entries for split in ("train", "val")}
    folder = ImageFolder(tmp_path / "caltech101/101_ObjectCategories")
    assert sorted((str(path), label) for entries in splits.values() for path, label in entries) == folder.samples
    assert [sum(label == k for _, label in splits["train"]) for k in range(3)] == [30, 30, 30]


def test_the_split_of_caltech_never_changes(tmp_path: Path) -> None:
    made("cls_caltech101", tmp_path)
    tested = [path.stem for path, label in open_split("cls_caltech101", tmp_path, "val").entries if label == 1]
    assert tested == ["image_0010", "image_0030"]


def test_cifar_records_are_planes_of_red_green_and_blue(tmp_path: Path) -> None:
    made("cls_cifar100", tmp_path)
    record = np.zeros(3074, np.uint8)
    record[:2] = 7, 93
    record[2 + 1024 + 32 * 5 + 9] = 200  # green, row 5, column 9
    path = tmp_path / "cifar-100-binary/test.bin"
    path.write_bytes(path.read_bytes() + record.tobytes())
    image, label = open_split("cls_cifar100", tmp_path, "val")[9]
    assert label == 93
    assert np.argwhere(np.asarray(image)).tolist() == [[5, 9, 1]]
    with pytest.raises(IndexError):
        open_split("cls_cifar100", tmp_path, "val")[10]


def replace(file: str, old: str, new: str) -> Callable[[Path], None]:
    def plant(root: Path) -> None:
        text = (root / file).read_text()
        assert old in text
        (root / file).write_text(text.replace(old, new, 1))

    return plant


def truncate(file: str, left: int = 300) -> Callable[[Path], None]:
    return lambda root: (root / file).write_bytes((root / file).read_bytes()[:left]) and None


def remove(file: str) -> Callable[[Path], None]:
    return lambda root: (root / file).unlink()


def change_mat(file: str, key: str, change: Callable[[Any], None]) -> Callable[[Path], None]:
    def plant(root: Path) -> None:
        content = {name: value for name, value in loadmat(root / file).items() if not name.startswith("__")}
        change(content[key])
        savemat(root / file, content)

    return plant


def set_first(value: int) -> Callable[[Any], None]:
    return lambda array: array.__setitem__((0, 0), value)


def set_class(value: int) -> Callable[[Any], None]:
    return lambda array: array[0, 2].__setitem__("class", np.array([[value]]))


def set_byte(file: str, place: int, value: int) -> Callable[[Path], None]:
    def plant(root: Path) -> None:
        content = bytearray((root / file).read_bytes())
        content[place] = value
        (root / file).write_bytes(content)

    return plant


AIRCRAFT = "fgvc-aircraft-2013b/data"
FAULTS: list[tuple[str, Callable[[Path], None], str]] = [
    (
        "cls_aircraft",
        replace(f"{AIRCRAFT}/images_variant_test.txt", "A300B4", "A300"),
        "test.txt, line 2: 'A300' is no",
    ),
    ("cls_aircraft", remove(f"{AIRCRAFT}/images/1000003.jpg"), "trainval.txt, line 3: there is no .*1000003.jpg"),
    (
        "cls_aircraft",
        truncate(f"{AIRCRAFT}/images/1000004.jpg"),
        "1000004.jpg cannot be read as .*(?i:truncated)",
    ),
    (
        "cls_caltech101",
        truncate("caltech101/101_ObjectCategories/accordion/image_0001.jpg", 0),
        "accordion/image_0001.jpg",
    ),
    (
        "cls_cars",
        change_mat("stanford_cars/devkit/cars_train_annos.mat", "annotations", set_class(4)),
        "train_annos.mat, annotation 3: class 4 is none of the 3",
    ),
    ("cls_cars", remove("stanford_cars/cars_test/00002.jpg"), "withlabels.mat, annotation 2: there is no .*00002.jpg"),
    ("cls_cars", truncate("stanford_cars/devkit/cars_meta.mat", 10), "cannot be read"),
    ("cls_cifar10", truncate("cifar-10-batches-bin/data_batch_2.bin", 4000), "data_batch_2.bin: 4000 bytes are no"),
    (
        "cls_cifar10",
        set_byte("cifar-10-batches-bin/test_batch.bin", 2 * 3073, 10),
        "test_batch.bin, record 2: label 10",
    ),
    (
        "cls_cifar100",
        set_byte("cifar-100-binary/train.bin", 3 * 3074 + 1, 255),
        "train.bin, record 3: label 255 is not",
    ),
    (
        "cls_dtd",
        replace("dtd/dtd/labels/test1.txt", "blotchy/", "botchy/"),
        "test1.txt, line 4: the class 'botchy' has",
    ),
    ("cls_dtd", replace("dtd/dtd/labels/val1.txt", "banded/", "banded_"), "val1.txt, line 1: is not CLASS/IMAGE"),
    (
        "cls_flowers",
        change_mat("flowers-102/setid.mat", "tstid", set_first(99)),
        "setid.mat, tstid, image 99: imagelab",
    ),
    ("cls_flowers", change_mat("flowers-102/imagelabels.mat", "labels", set_first(103)), "trnid, image 1: imagelabels"),
    (
        "cls_food101",
        replace("food-101/meta/test.json", "baklava/201", "baclava/201"),
        "test.json, baclava/201: does not",
    ),
    ("cls_food101", replace("food-101/meta/train.json", "]", ""), "cannot be read: Expecting .* line 1 column"),
    (
        "cls_pets",
        replace("oxford-iiit-pet/annotations/trainval.txt", "Bengal_1 3 1 2", "Bengal_1 3"),
        "line 13: 'Bengal_1 3'",
    ),
    (
        "cls_pets",
        replace("oxford-iiit-pet/annotations/test.txt", "Bengal_7 3", "Bengal_7 2"),
        "test.txt, line 7: class 2 is",
    ),
    (
        "cls_sun397",
        replace("SUN397/Partitions/Training_01.txt", "/a/abbey", "/a/abby"),
        "01.txt, line 1: the class '/a/abby'",
    ),
    ("imagenet1k", truncate("train/n01440764/n01440764_0.JPEG"), "n01440764_0.JPEG cannot be read"),
    (
        "imagenet1k",
        lambda root: (root / "val/n01443537").rename(root / "val/cat"),
        "val/cat is no class folder of a synset",
    ),
]


@pytest.mark.parametrize(("name", "plant", "sentence"), FAULTS, ids=[f"{f[0]}-{i}" for i, f in enumerate(FAULTS)])
def test_a_fault_is_named(name: str, plant: Callable[[Path], None], sentence: str, tmp_path: Path) -> None:
    plant(made(name, tmp_path))
    found = SOURCES[name].faults(tmp_path, 3)
    assert any(re.search(sentence, fault) for fault in found), found
    assert all(fault.endswith(".") for fault in found)
    assert SOURCES[name].faults(tmp_path, 0) == []
    SOURCES[name].count(tmp_path)


def test_broken_lists_end_with_the_sentence_that_names_the_line(tmp_path: Path) -> None:
    FAULTS[0][1](made("cls_aircraft", tmp_path))
    with pytest.raises(UserError, match=r"FGVC-Aircraft.* cannot be read: .*test.txt, line 2: 'A300'"):
        Classification(str(tmp_path), 4, source="cls_aircraft").check()
    replace("SUN397/Partitions/Training_01.txt", "/a/abbey", "/a/abby")(made("cls_sun397", tmp_path))
    with pytest.raises(UserError, match=r"SUN397.*Training_01.txt, line 1"):
        Classification(str(tmp_path), 4, source="cls_sun397").check()


def test_a_cifar_label_that_no_head_has_is_refused(tmp_path: Path) -> None:
    set_byte("cifar-10-batches-bin/test_batch.bin", 0, 200)(made("cls_cifar10", tmp_path))
    with pytest.raises(UserError, match=r"test_batch.bin, record 0: label 200"):
        Classification(str(tmp_path), 4, source="cls_cifar10").check()


def test_classes_without_a_test_image_are_refused(tmp_path: Path) -> None:
    """torchvision numbers the classes of each list by themselves: one class less would shift the labels."""
    made("cls_dtd", tmp_path)
    path = tmp_path / "dtd/dtd/labels/test1.txt"
    path.write_text("".join(f"{line}\n" for line in path.read_text().splitlines() if "blotchy" not in line))
    with pytest.raises(UserError, match=r"the same classes, .*'blotchy' \(in train\)"):
        Classification(str(tmp_path), 4, source="cls_dtd").check()


def test_an_unreadable_image_is_a_sample_error(tmp_path: Path) -> None:
    for name, image in (
        ("cls_pets", "oxford-iiit-pet/images/Abyssinian_1.jpg"),
        ("cls_food101", "food-101/images/apple_pie/100.jpg"),
    ):
        truncate(image)(made(name, tmp_path))
        with pytest.raises(SampleError, match=image):
            open_split(name, tmp_path, "train")[0]


def test_what_is_missing_is_said_with_where_it_comes_from(tmp_path: Path) -> None:
    remove("oxford-iiit-pet/annotations/trainval.txt")(made("cls_pets", tmp_path))
    with pytest.raises(UserError, match=r"trainval.txt is missing \(Oxford-IIIT Pets\): unpack images.tar.gz"):
        Classification(str(tmp_path), 4, source="cls_pets").check()
    with pytest.raises(UserError, match="source 'coco' is no set of images with one label"):
        Classification(str(tmp_path), 4, source="coco")


def test_the_flat_official_validation_images_are_refused_with_advice(tmp_path: Path) -> None:
    made("imagenet1k", tmp_path)
    for number, path in enumerate(sorted((tmp_path / "val").rglob("*.JPEG")), start=1):
        path.rename(tmp_path / f"val/ILSVRC2012_val_{number:08d}.JPEG")
    for folder in (tmp_path / "val").glob("n*"):
        folder.rmdir()
    (fault,) = SOURCES["imagenet1k"].faults(tmp_path, 3)
    assert "is flat" in fault
    assert "torchvision.datasets.ImageNet(root, 'val')" in fault
    with pytest.raises(UserError, match=r"ImageNet-1K .* cannot be read: .*val is flat"):
        Classification(str(tmp_path), 4, source="imagenet1k").check()
    assert json.dumps(SOURCES["imagenet1k"].count(tmp_path)) == "{}"
