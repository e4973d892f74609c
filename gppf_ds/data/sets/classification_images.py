"""Classification sets as data sets of (image, label): torchvision's classes where they can read what we read.

A data set here is a map-style one with the attribute ``classes``, the names of the labels. Every ``open_*`` takes the
root of the data, the split, and what to do to each image, read as RGB.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from gppf_ds.data.folders import read_rgb
from gppf_ds.data.index import ClassFolders, MappedArray, class_folders
from gppf_ds.data.sets import classification_files as files
from gppf_ds.data.sets.classification_files import CIFAR_PIXELS, Row, Split

Transform = Callable[[Image.Image], Any] | None


class Images:
    """Image files with labels."""

    def __init__(self, entries: Sequence[tuple[Path, int]] | ClassFolders, classes: list[str], transform: Transform):
        self.entries = entries
        self.classes = classes
        self.transform = transform

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        path, label = self.entries[index]
        return _transformed(read_rgb(path), self.transform), label


class CifarImages:
    """Records of the binary CIFAR files, mapped into memory."""

    def __init__(self, paths: Iterable[Path], label_bytes: int, classes: list[str], transform: Transform) -> None:
        self.label_bytes = label_bytes
        self.classes = classes
        self.transform = transform
        size = label_bytes + CIFAR_PIXELS
        self.parts = [MappedArray(path, "uint8", path.stat().st_size // size * size) for path in paths]

    def __len__(self) -> int:
        return sum(map(len, self.parts)) // (self.label_bytes + CIFAR_PIXELS)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        size = self.label_bytes + CIFAR_PIXELS
        start = index * size
        for part in self.parts:
            if start < len(part):
                record = part.array[start : start + size]
                image = Image.fromarray(record[self.label_bytes :].reshape(3, 32, 32).transpose(1, 2, 0).copy())
                return _transformed(image, self.transform), int(record[self.label_bytes - 1])
            start -= len(part)
        raise IndexError(index)


def open_folders(root: Path, split: Split, transform: Transform, folders: tuple[str, str] = ("train", "val")) -> Images:
    """A folder of class folders, through its cached index."""
    found = class_folders(root / folders[0 if split == "train" else 1])
    return Images(found, found.classes, transform)


def _transformed(image: Image.Image, transform: Transform) -> Any:
    return image if transform is None else transform(image)


def _read(path: Path | str) -> Image.Image:
    return read_rgb(Path(path))


def whole(rows: Iterable[Row]) -> list[Row]:
    """The rows; raises ValueError over the first broken one. Torchvision would take some of these for other classes."""
    listed = list(rows)
    if broken := next((row for row in listed if row.problem), None):
        raise ValueError(broken.sentence())
    return listed


def open_rows(
    root: Path,
    split: Split,
    transform: Transform,
    rows: Callable[[Path], Iterable[Row]],
    order: Callable[[str], str] = str,
) -> Images:
    """For sets that torchvision reads in part (no partition of SUN397, no split and no background of Caltech-101), only
    with the sums of the official files (Flowers) or without naming what it cannot read (Pets).

    Args:
        rows: of the set.
        order: by what the labels are sorted.
    """
    listed = whole(rows(root))
    classes = sorted({row.label for row in listed}, key=order)
    labels = {name: label for label, name in enumerate(classes)}
    return Images([(row.image, labels[row.label]) for row in listed if row.split == split], classes, transform)


def open_aircraft(root: Path, split: Split, transform: Transform) -> Any:
    from torchvision.datasets import FGVCAircraft

    whole(files.aircraft(root))
    return FGVCAircraft(root, "trainval" if split == "train" else "test", transform=transform, loader=_read)


def open_cars(root: Path, split: Split, transform: Transform) -> Any:
    from torchvision.datasets import StanfordCars

    whole(files.cars(root))
    return StanfordCars(root, "train" if split == "train" else "test", transform, loader=_read)


def open_dtd(root: Path, split: Split, transform: Transform) -> Any:
    from torchvision.datasets import DTD

    whole(files.dtd(root))
    parts = ("train", "val") if split == "train" else ("test",)
    return _joined([DTD(root, part, transform=transform, loader=_read) for part in parts])


def open_flowers(root: Path, split: Split, transform: Transform) -> Images:
    from torchvision.datasets import Flowers102

    images = open_rows(root, split, transform, files.flowers)
    # The official files have numbers only.
    images.classes = [Flowers102.classes[int(number) - 1] for number in images.classes]
    return images


def open_food(root: Path, split: Split, transform: Transform) -> Any:
    from torchvision.datasets import Food101

    whole(files.food(root))
    return Food101(root, "train" if split == "train" else "test", transform=transform, loader=_read)


def _joined(parts: list[Any]) -> Any:
    from torch.utils.data import ConcatDataset

    if any(part.classes != parts[0].classes for part in parts):
        raise ValueError("the splits have different classes.")
    whole: Any = ConcatDataset(parts)
    whole.classes = parts[0].classes
    return whole
