"""ImageNet-21K-P, ImageNet-1K and the ten sets of the common transfer protocol (Kornblith et al. 2019; GPPF D.2).

The ten share one root folder, laid out as torchvision's ``download=True`` leaves it, except for CIFAR: its Python
version is a pickle, which would run whatever a downloaded file says, so the binary version is read. Where a set has an
official validation split, GPPF's protocol trains on train and validation images together and tests on the test split.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from gppf_ds.data.folders import read_rgb
from gppf_ds.data.index import class_folders
from gppf_ds.data.scan import first_faults
from gppf_ds.data.sets import classification_files as files
from gppf_ds.data.sets import classification_images as images
from gppf_ds.data.sets.classification_files import CIFAR_PIXELS, Row, Split
from gppf_ds.data.sets.classification_images import Transform
from gppf_ds.data.source import Source
from gppf_ds.errors import SampleError, UserError

DECODED = 500
"""Images that a search for faults decodes, spread evenly over a set; of the others it asks only whether they exist."""
UNREADABLE = (OSError, LookupError, ValueError, TypeError, RuntimeError)
"""What the libraries raise over a broken file of labels."""


@dataclass(frozen=True)
class ClassificationSet:
    """A set with the metric that papers report of it, and its splits as data sets of (transformed image, label)."""

    source: Source
    headline: Literal["top1", "mean_class"]
    open: Callable[[Path, Split, Transform], Any]
    """(root, split, transform) -> a map-style data set with the attribute ``classes``."""


def open_split(name: str, root: Path, split: Split, transform: Transform = None) -> Any:
    """A split of a set, as a map-style data set of (image, label) with ``classes``, the names of the labels.

    Raises:
        UserError: something is missing below ``root``, or cannot be read.
    """
    chosen = SETS[name]
    for part in chosen.source.layout:
        if not (root / part).exists():
            raise UserError(f"{root / part} is missing ({chosen.source.title}): {chosen.source.home}")
    try:
        return chosen.open(root, split, transform)
    except (UserError, *UNREADABLE) as error:
        first = next(iter(chosen.source.faults(root, 1)), str(error))
        raise UserError(f"{chosen.source.title} in {root} cannot be read: {first} Mend or download it anew.") from error


@dataclass(frozen=True)
class _Cifar:
    """The files of a binary CIFAR."""

    train: tuple[str, ...]
    test: tuple[str, ...]
    label_bytes: int
    """In front of an image; the last one counts (CIFAR-100: coarse, fine)."""
    names: str
    classes: int

    def open(self, root: Path, split: Split, transform: Transform) -> images.CifarImages:
        if found := self.faults(root, 1):
            raise ValueError(found[0])
        return self._images(root, split, transform)

    def _images(self, root: Path, split: Split, transform: Transform = None) -> images.CifarImages:
        paths = [root / name for name in (self.train if split == "train" else self.test)]
        return images.CifarImages(paths, self.label_bytes, (root / self.names).read_text().split(), transform)

    def count(self, root: Path) -> dict[str, int]:
        train, test = self._images(root, "train"), self._images(root, "val")
        return {"train images": len(train), "test images": len(test), "classes": len(train.classes)}

    def faults(self, root: Path, limit: int) -> list[str]:
        found = []
        size = self.label_bytes + CIFAR_PIXELS
        for name in (*self.train, *self.test):
            try:
                records = np.fromfile(root / name, np.uint8)
            except OSError as error:
                found.append(f"{name}: {error.strerror}.")
                continue
            if len(records) % size:
                found.append(f"{name}: {len(records)} bytes are no multiple of the {size} of a record.")
            labels = records[: len(records) // size * size].reshape(-1, size)[:, self.label_bytes - 1]
            for record in np.flatnonzero(labels >= self.classes):
                found.append(f"{name}, record {record}: label {labels[record]} is not below {self.classes}.")
        return found[:limit]

    def smoke(self, root: Path) -> None:
        counts = dict.fromkeys(self.train, 18 // len(self.train)) | dict.fromkeys(self.test, 9)
        files.make_cifar(root, counts, self.label_bytes, (self.names, self.classes))


def _count_rows(root: Path, rows: Callable[[Path], Iterable[Row]]) -> dict[str, int]:
    """Nothing where the lists are broken: the search for faults says how."""
    try:
        listed = list(rows(root))
    except UNREADABLE:
        return {}
    train = sum(row.split == "train" for row in listed)
    classes = len({row.label for row in listed if not row.problem})
    return {"train images": train, "test images": len(listed) - train, "classes": classes}


def _faults_of_rows(root: Path, limit: int, rows: Callable[[Path], Iterable[Row]]) -> list[str]:
    try:
        listed = list(rows(root))
    except UNREADABLE as error:
        return [f"{root}: the lists of images cannot be read: {error}."][:limit]
    step = max(1, len(listed) // DECODED)

    def check(numbered: tuple[int, Row]) -> str | None:
        number, row = numbered
        if row.problem:
            return row.sentence()
        if not row.image.is_file():
            return f"{row.where}: there is no {row.image}."
        return _undecodable(row.image) if number % step == 0 else None

    return first_faults(check, enumerate(listed), limit)


def _count_folders(root: Path, folders: tuple[str, str]) -> dict[str, int]:
    """Nothing where a folder has no class folders: the search for faults says more."""
    try:
        train, val = (class_folders(root / folder) for folder in folders)
    except UserError:
        return {}
    return {"train images": len(train), "val images": len(val), "classes": len(train.classes)}


def _faults_of_folders(root: Path, limit: int, folders: tuple[str, str]) -> list[str]:
    if any((root / folders[1]).glob("ILSVRC2012_val_*.JPEG")):
        return [
            f"{root / folders[1]} is flat, as ILSVRC2012_img_val.tar unpacks, but the images must lie in one folder "
            "for each synset: put the tar and ILSVRC2012_devkit_t12.tar.gz into the root, remove the flat folder and "
            "let torchvision.datasets.ImageNet(root, 'val') sort it."
        ][:limit]
    try:
        both = [class_folders(root / folder) for folder in folders]
    except UserError as error:
        return [str(error)][:limit]
    found = [
        f"{listed.folder / name} is no class folder of a synset (n and eight digits)."
        for listed in both
        for name in listed.classes
        if not re.fullmatch(r"n\d{8}", name)
    ]
    for name in sorted(set(both[0].classes) ^ set(both[1].classes)):
        found.append(f"{root}: the class folder {name} is in only one of {folders[0]} and {folders[1]}.")
    spread = (listed[index][0] for listed in both for index in range(0, len(listed), max(1, len(listed) // DECODED)))
    return found[:limit] + first_faults(_undecodable, spread, limit - len(found[:limit]))


def _undecodable(image: Path) -> str | None:
    try:
        read_rgb(image)
    except SampleError as error:
        return f"{error}."
    return None


def _folder_set(title: str, home: str, folders: tuple[str, str], counts: Mapping[str, int]) -> ClassificationSet:
    source = Source(
        title,
        home,
        folders,
        counts,
        partial(_count_folders, folders=folders),
        partial(_faults_of_folders, folders=folders),
        partial(files.make_class_folders, folders=folders),
    )
    return ClassificationSet(source, "top1", partial(images.open_folders, folders=folders))


def _listed_set(
    title: str,
    home: str,
    layout: tuple[str, ...],
    sizes: tuple[int, int, int],
    headline: Literal["top1", "mean_class"],
    rows: Callable[[Path], Iterable[Row]],
    smoke: Callable[[Path], None],
    open: Callable[[Path, Split, Transform], Any] | None = None,
) -> ClassificationSet:
    """A set whose splits are lists; ``sizes`` are its training images, test images and classes."""
    source = Source(
        title,
        home,
        layout,
        dict(zip(("train images", "test images", "classes"), sizes, strict=True)),
        partial(_count_rows, rows=rows),
        partial(_faults_of_rows, rows=rows),
        smoke,
    )
    return ClassificationSet(source, headline, open or partial(images.open_rows, rows=rows))


def _cifar_set(title: str, home: str, cifar: _Cifar) -> ClassificationSet:
    layout = (*cifar.train, *cifar.test, cifar.names)
    counts = {"train images": 50000, "test images": 10000, "classes": cifar.classes}
    return ClassificationSet(
        Source(title, home, layout, counts, cifar.count, cifar.faults, cifar.smoke), "top1", cifar.open
    )


SETS: Mapping[str, ClassificationSet] = {
    "imagenet21k": _folder_set(
        "ImageNet-21K-P, winter 21 (Ridnik et al. 2021)",
        "log in at https://image-net.org/download.php and unpack the processed ImageNet-21K "
        "(imagenet21k_resized.tar.gz); the data are its folder imagenet21k_resized.",
        ("imagenet21k_train", "imagenet21k_val"),
        {"train images": 11060223, "val images": 522500, "classes": 10450},
    ),
    "imagenet1k": _folder_set(
        "ImageNet-1K (ILSVRC 2012)",
        "log in at https://image-net.org/download.php, put ILSVRC2012_img_train.tar, ILSVRC2012_img_val.tar and "
        "ILSVRC2012_devkit_t12.tar.gz into one folder, and let torchvision.datasets.ImageNet(folder, 'train') and "
        "ImageNet(folder, 'val') sort them into class folders.",
        ("train", "val"),
        {"train images": 1281167, "val images": 50000, "classes": 1000},
    ),
    "cls_aircraft": _listed_set(
        "FGVC-Aircraft 2013b, variants",
        "unpack fgvc-aircraft-2013b.tar.gz from https://www.robots.ox.ac.uk/~vgg/data/fgvc-aircraft/.",
        (
            "fgvc-aircraft-2013b/data/images",
            "fgvc-aircraft-2013b/data/variants.txt",
            "fgvc-aircraft-2013b/data/images_variant_trainval.txt",
            "fgvc-aircraft-2013b/data/images_variant_test.txt",
        ),
        (6667, 3333, 100),
        "mean_class",
        files.aircraft,
        files.make_aircraft,
        images.open_aircraft,
    ),
    "cls_caltech101": _listed_set(
        "Caltech-101",
        "unpack caltech-101.zip from https://data.caltech.edu/records/mzrjq-6wc02, and its 101_ObjectCategories.tar.gz "
        "into caltech101/.",
        ("caltech101/101_ObjectCategories",),
        (3060, 6084, 102),
        "mean_class",
        files.caltech,
        files.make_caltech,
    ),
    "cls_cars": _listed_set(
        "Stanford Cars",
        "its home (https://ai.stanford.edu/~jkrause/cars/car_dataset.html) no longer serves it; from a copy, put "
        "cars_train/, cars_test/, devkit/ and cars_test_annos_withlabels.mat into stanford_cars/.",
        (
            "stanford_cars/cars_train",
            "stanford_cars/cars_test",
            "stanford_cars/devkit/cars_meta.mat",
            "stanford_cars/devkit/cars_train_annos.mat",
            "stanford_cars/cars_test_annos_withlabels.mat",
        ),
        (8144, 8041, 196),
        "top1",
        files.cars,
        files.make_cars,
        images.open_cars,
    ),
    "cls_cifar10": _cifar_set(
        "CIFAR-10, binary version",
        "unpack cifar-10-binary.tar.gz (not the Python version, a pickle) from https://www.cs.toronto.edu/~kriz/cifar.html.",
        _Cifar(
            tuple(f"cifar-10-batches-bin/data_batch_{number}.bin" for number in range(1, 6)),
            ("cifar-10-batches-bin/test_batch.bin",),
            1,
            "cifar-10-batches-bin/batches.meta.txt",
            10,
        ),
    ),
    "cls_cifar100": _cifar_set(
        "CIFAR-100, binary version",
        "unpack cifar-100-binary.tar.gz (not the Python version, a pickle) from https://www.cs.toronto.edu/~kriz/cifar.html.",
        _Cifar(
            ("cifar-100-binary/train.bin",),
            ("cifar-100-binary/test.bin",),
            2,
            "cifar-100-binary/fine_label_names.txt",
            100,
        ),
    ),
    "cls_dtd": _listed_set(
        "Describable Textures Dataset r1.0.1, partition 1",
        "unpack dtd-r1.0.1.tar.gz from https://www.robots.ox.ac.uk/~vgg/data/dtd/ in a folder dtd/.",
        ("dtd/dtd/images", "dtd/dtd/labels/train1.txt", "dtd/dtd/labels/val1.txt", "dtd/dtd/labels/test1.txt"),
        (3760, 1880, 47),
        "top1",
        files.dtd,
        files.make_dtd,
        images.open_dtd,
    ),
    "cls_flowers": _listed_set(
        "Oxford Flowers-102",
        "put imagelabels.mat, setid.mat and the unpacked 102flowers.tgz (jpg/) from "
        "https://www.robots.ox.ac.uk/~vgg/data/flowers/102/ into flowers-102/.",
        ("flowers-102/jpg", "flowers-102/imagelabels.mat", "flowers-102/setid.mat"),
        (2040, 6149, 102),
        "mean_class",
        files.flowers,
        files.make_flowers,
        images.open_flowers,
    ),
    "cls_food101": _listed_set(
        "Food-101",
        "unpack food-101.tar.gz from https://data.vision.ee.ethz.ch/cvl/datasets_extra/food-101/.",
        ("food-101/images", "food-101/meta/train.json", "food-101/meta/test.json"),
        (75750, 25250, 101),
        "top1",
        files.food,
        files.make_food,
        images.open_food,
    ),
    "cls_pets": _listed_set(
        "Oxford-IIIT Pets",
        "unpack images.tar.gz and annotations.tar.gz from https://www.robots.ox.ac.uk/~vgg/data/pets/ in "
        "oxford-iiit-pet/.",
        ("oxford-iiit-pet/images", "oxford-iiit-pet/annotations/trainval.txt", "oxford-iiit-pet/annotations/test.txt"),
        (3680, 3669, 37),
        "mean_class",
        files.pets,
        files.make_pets,
        # The class numbers in the annotations follow the breeds in this order.
        partial(images.open_rows, rows=files.pets, order=str.lower),
    ),
    "cls_sun397": _listed_set(
        "SUN397, partition 1",
        "unpack SUN397.tar.gz from https://vision.princeton.edu/projects/2010/SUN/, and Partitions.zip from the same "
        "page into SUN397/Partitions/.",
        ("SUN397/ClassName.txt", "SUN397/Partitions/Training_01.txt", "SUN397/Partitions/Testing_01.txt"),
        (19850, 19850, 397),
        "top1",
        files.sun397,
        files.make_sun397,
    ),
}
SOURCES: Mapping[str, Source] = {name: chosen.source for name, chosen in SETS.items()}
