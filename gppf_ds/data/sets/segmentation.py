"""ADE20K, Pascal VOC 2012 with SBD, and COCO-Stuff, in the layouts that mmseg's own configurations read.

Label maps are 8-bit png files of class indices. ADE20K counts its classes from 1 and means "not labelled" by 0.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from gppf_ds.data.folders import read_label_map
from gppf_ds.data.scan import first_faults
from gppf_ds.data.source import Source
from gppf_ds.errors import SampleError

IGNORE = 255


@dataclass(frozen=True)
class Part:
    """Images and label maps that belong together by their names; paths are relative to the root."""

    images: str
    labels: str
    names: str | None = None
    """File with a name per line; None for every image of the folder."""


@dataclass(frozen=True)
class Layout:
    """How a set lies on disk and what its label maps hold."""

    parts: Mapping[str, Part]
    classes: int
    unlabelled_zero: bool = False
    """Whether classes count from 1."""
    label_suffix: str = ".png"
    palette: bool = False
    """Whether a label map with a palette has that of VOC."""
    conversion: str = ""
    """Where label maps come from that the authors do not publish as png files."""

    @property
    def highest(self) -> int:
        """The highest class index in a label map."""
        return self.classes if self.unlabelled_zero else self.classes - 1

    @property
    def places(self) -> tuple[str, ...]:
        """Every file and folder that the parts name, once."""
        named = [place for part in self.parts.values() for place in (part.images, part.labels, part.names)]
        return tuple(dict.fromkeys(place for place in named if place))


@dataclass(frozen=True)
class Pair:
    """An image and its label map."""

    place: str
    """What names the pair: a line of a list, or the image."""
    image: Path
    labels: Path


def voc_palette(classes: int) -> list[int]:
    """VOC's colours, red, green and blue of class after class: the bits of the index, three by three, from the top."""
    colours = []
    for index in range(classes):
        for channel in range(3):
            bits = [index >> (3 * level + channel) & 1 for level in range(8)]
            colours.append(sum(bit << (7 - level) for level, bit in enumerate(bits)))
    return colours


def _pairs(layout: Layout, part: Part, root: Path) -> Iterator[Pair]:
    images, labels = root / part.images, root / part.labels
    if part.names is None:
        names = sorted(name.removesuffix(".jpg") for name in _list(images) if name.endswith(".jpg"))
        places = [str(images / f"{name}.jpg") for name in names]
    else:
        listing = root / part.names
        lines = enumerate(listing.read_text().splitlines() if listing.is_file() else (), start=1)
        listed = [(number, line.strip()) for number, line in lines if line.strip()]
        names = [name for _, name in listed]
        places = [f"{listing}:{number}" for number, _ in listed]
    for place, name in zip(places, names, strict=True):
        yield Pair(place, images / f"{name}.jpg", labels / f"{name}{layout.label_suffix}")


def _list(folder: Path) -> list[str]:
    return os.listdir(folder) if folder.is_dir() else []


def _count(layout: Layout, root: Path) -> dict[str, int]:
    """Pairs of which both files are there."""
    counts = {}
    for name, part in layout.parts.items():
        images, labels = set(_list(root / part.images)), set(_list(root / part.labels))
        pairs = _pairs(layout, part, root)
        counts[f"{name} images"] = sum(pair.image.name in images and pair.labels.name in labels for pair in pairs)
    return counts


def _faults(layout: Layout, root: Path, limit: int) -> list[str]:
    found: list[str] = []
    for part in layout.parts.values():
        check = partial(_fault_in, layout)
        found += first_faults(check, _pairs(layout, part, root), limit - len(found))
    return found


def _fault_in(layout: Layout, pair: Pair) -> str | None:
    if not pair.image.is_file():
        return f"{pair.place}: {pair.image} is missing"
    if not pair.labels.is_file():
        return f"{pair.place} has no label map {pair.labels}{layout.conversion and f' ({layout.conversion})'}"
    try:
        labels = read_label_map(pair.labels)
        with Image.open(pair.image) as image:
            width, height = image.size
    except (SampleError, OSError) as error:
        return str(error)
    if labels.shape != (height, width):
        return f"{pair.labels} is {labels.shape[1]}x{labels.shape[0]} and its image {width}x{height}"
    highest = int(np.where(labels == IGNORE, 0, labels).max())
    if highest > layout.highest:
        return f"{pair.labels} has a pixel of class {highest}, the highest is {layout.highest} ({IGNORE} = ignored)"
    if layout.palette and not _has_voc_palette(pair.labels, highest):
        return f"{pair.labels} has a palette that is not VOC's: its indices may mean other classes"
    return None


def _has_voc_palette(path: Path, highest: int) -> bool:
    """Up to the highest index in use; also true of a map without a palette."""
    with Image.open(path) as image:
        palette = image.getpalette()
    return palette is None or palette[: 3 * highest + 3] == voc_palette(highest + 1)


def _smoke(layout: Layout, stems: Mapping[str, tuple[str, int]], root: Path) -> None:
    """``stems``: for every part the pattern of its names and how many."""
    rng = np.random.default_rng(0)
    for part_name, part in layout.parts.items():
        pattern, number = stems[part_name]
        names = [pattern.format(index) for index in range(1, number + 1)]
        for folder in (part.images, part.labels):
            (root / folder).mkdir(parents=True, exist_ok=True)
        for index, name in enumerate(names):
            labels = _smoke_labels(layout, (72, 96) if index % 2 else (96, 72), rng)
            stored = Image.fromarray(labels)
            if layout.palette and part.labels == "SegmentationClass":  # those from SBD have none
                stored = Image.fromarray(labels, mode="P")
                stored.putpalette(voc_palette(256))
            stored.save(root / part.labels / f"{name}{layout.label_suffix}")
            colours = (np.arange(256)[:, None] * (37, 91, 53) % 200).astype(np.uint8)
            pixels = colours[labels] + rng.integers(0, 40, (*labels.shape, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / part.images / f"{name}.jpg")
        if part.names is not None:
            (root / part.names).parent.mkdir(parents=True, exist_ok=True)
            (root / part.names).write_text("\n".join(names) + "\n")


def _smoke_labels(layout: Layout, size: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """Rectangles of a few classes, the highest among them, and a rim that does not count."""
    known = np.array([layout.highest, *range(layout.unlabelled_zero, 4)])
    tiles = rng.choice(known, (4, 4))
    tiles[1, 1] = layout.highest
    labels = np.kron(tiles, np.ones((size[0] // 4, size[1] // 4), dtype=int)).astype(np.uint8)
    labels[:3] = 0 if layout.unlabelled_zero else IGNORE
    return labels


def _source(
    layout: Layout, title: str, home: str, counts: Mapping[str, int], stems: Mapping[str, tuple[str, int]]
) -> Source:
    return Source(
        title=title,
        home=home,
        layout=layout.places,
        counts={f"{name} images": number for name, number in counts.items()},
        count=partial(_count, layout),
        faults=partial(_faults, layout),
        smoke=partial(_smoke, layout, stems),
    )


ADE20K = Layout(
    {
        "train": Part("images/training", "annotations/training"),
        "val": Part("images/validation", "annotations/validation"),
    },
    classes=150,
    unlabelled_zero=True,
)
_LISTS = "ImageSets/Segmentation"
VOC2012AUG = Layout(
    {
        "train": Part("JPEGImages", "SegmentationClass", f"{_LISTS}/train.txt"),
        "aug": Part("JPEGImages", "SegmentationClassAug", f"{_LISTS}/aug.txt"),
        "val": Part("JPEGImages", "SegmentationClass", f"{_LISTS}/val.txt"),
    },
    classes=21,
    palette=True,
    conversion="those of SegmentationClassAug and aug.txt are made by mmseg's tools/dataset_converters/voc_aug.py",
)
COCOSTUFF164K = Layout(
    {
        "train": Part("images/train2017", "annotations/train2017"),
        "val": Part("images/val2017", "annotations/val2017"),
    },
    classes=171,
    label_suffix="_labelTrainIds.png",
    conversion="made from the authors' maps by mmseg's tools/dataset_converters/coco_stuff164k.py",
)

SOURCES = {
    "ade20k": _source(
        ADE20K,
        "ADE20K, scene parsing benchmark of 150 classes (ADEChallengeData2016)",
        "http://sceneparsing.csail.mit.edu: ADEChallengeData2016.zip; the root is the folder ADEChallengeData2016.",
        {"train": 20210, "val": 2000},
        {"train": ("ADE_train_{:08d}", 6), "val": ("ADE_val_{:08d}", 3)},
    ),
    "voc2012aug": _source(
        VOC2012AUG,
        "Pascal VOC 2012 segmentation with the additional label maps of SBD",
        "http://host.robots.ox.ac.uk/pascal/VOC/voc2012: VOCtrainval_11-May-2012.tar; the root is the folder "
        "VOCdevkit/VOC2012. SBD (its page is linked from torchvision.datasets.SBDataset) comes in by mmseg's "
        "tools/dataset_converters/voc_aug.py, which writes SegmentationClassAug and aug.txt.",
        {"train": 1464, "aug": 9118, "val": 1449},  # the converter insists on 10582 for train and aug together
        {"train": ("2007_{:06d}", 4), "aug": ("2008_{:06d}", 4), "val": ("2009_{:06d}", 3)},
    ),
    "cocostuff164k": _source(
        COCOSTUFF164K,
        "COCO-Stuff, 171 classes on all images of COCO 2017",
        "https://github.com/nightrome/cocostuff: train2017.zip and val2017.zip of COCO under images/ and "
        "stuffthingmaps_trainval2017.zip under annotations/, then mmseg's "
        "tools/dataset_converters/coco_stuff164k.py.",
        {"train": 118287, "val": 5000},
        {"train": ("{:012d}", 6), "val": ("{:012d}", 3)},
    ),
}
