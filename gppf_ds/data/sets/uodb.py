"""The ten detection sets of the universal object detection benchmark (Wang et al., CVPR 2019), COCO left out.

Their annotations come in seven formats. ``gppf-ds prepare-data`` reads each once and writes one COCO json per split
(``uodb_coco``), which the tasks train and are evaluated on; what is broken is skipped, counted and listed by file and
line. mmdet's own classes would read two of the formats only (VOC xml; of WIDER FACE a conversion by others), at every
start, and end at the first broken file.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

from gppf_ds.data.sets import uodb_smoke
from gppf_ds.data.sets.uodb_coco import (
    FOLDER,
    Fault,
    Items,
    Reader,
    Renderer,
    Summary,
    annotation_file,
    convert,
    required_lines,
)
from gppf_ds.data.sets.uodb_tables import LISA_CLASSES, read_lesions, read_lisa, window_slice
from gppf_ds.data.sets.uodb_text import KITTI_CLASSES, crop_dota, read_dota, read_kitti, read_wider
from gppf_ds.data.sets.uodb_voc import read_voc
from gppf_ds.data.source import Source
from gppf_ds.errors import UserError

SPLITS = ("train", "val")
VOC_CLASSES = (
    "aeroplane",
    "bicycle",
    "bird",
    "boat",
    "bottle",
    "bus",
    "car",
    "cat",
    "chair",
    "cow",
    "diningtable",
    "dog",
    "horse",
    "motorbike",
    "person",
    "pottedplant",
    "sheep",
    "sofa",
    "train",
    "tvmonitor",
)
ART_CLASSES = ("bicycle", "bird", "car", "cat", "dog", "person")
DOTA_CLASSES = (
    "plane",
    "baseball-diamond",
    "bridge",
    "ground-track-field",
    "small-vehicle",
    "large-vehicle",
    "ship",
    "tennis-court",
    "basketball-court",
    "storage-tank",
    "soccer-ball-field",
    "roundabout",
    "harbor",
    "swimming-pool",
    "helicopter",
)
KITCHEN_CLASSES = (
    "coca_cola_glass_bottle",
    "coffee_mate_french_vanilla",
    "honey_bunches_of_oats_honey_roasted",
    "hunts_sauce",
    "mahatma_rice",
    "nature_valley_soft_baked_oatmeal_squares_cinnamon_brown_sugar",
    "nature_valley_sweet_and_salty_nut_almond",
    "palmolive_orange",
    "pop_secret_light_butter",
    "pringles_bbq",
    "red_bull",
)
VOC_LISTS: Mapping[str, tuple[tuple[str, str], ...]] = {
    "train": (("VOCdevkit/VOC2007", "trainval"), ("VOCdevkit/VOC2012", "trainval")),
    "val": (("VOCdevkit/VOC2007", "test"),),
}
OTHER_LISTS: Mapping[str, tuple[tuple[str, str], ...]] = {"train": (("", "train"),), "val": (("", "test"),)}


@dataclass(frozen=True)
class Conversion:
    """How the official files of a set become what a task reads."""

    classes: tuple[str, ...]
    read: Reader
    render: Renderer | None = None
    """Where the images have to be written anew."""


def prepare(name: str, root: Path, progress: Callable[[str, int], None] = lambda split, images: None) -> list[Summary]:
    """Converts both splits of a set, anew where they were converted already.

    Args:
        name: of the source, for example ``uodb_kitti``.
        root: of the data set in its official layout.
        progress: told the split and the number of its images so far.

    Raises:
        UserError: there is no such source, or ``root`` does not hold it.
    """
    conversion = conversion_of(name)
    missing = [place for place in SOURCES[name].layout if not (root / place).exists()]
    if missing:
        raise UserError(f"{root / missing[0]} does not exist: {SOURCES[name].home}")
    return [
        convert(root, split, conversion.classes, conversion.read, conversion.render, partial(progress, split))
        for split in SPLITS
    ]


def conversion_of(name: str) -> Conversion:
    """The conversion of a source; raises :class:`UserError` if it needs none or is unknown."""
    if name not in CONVERSIONS:
        raise UserError(f"source {name!r} is not one that is converted: choose from {', '.join(CONVERSIONS)}.")
    return CONVERSIONS[name]


def places(name: str, root: Path) -> dict[str, Path]:
    """Where the json and the images of a prepared set are: ``train``, ``val``, ``train_images``, ``val_images``.

    Of a set that is not prepared, where they will be.
    """
    rendered = conversion_of(name).render is not None
    found: dict[str, Path] = {}
    for split in SPLITS:
        path = (annotation_file(root, split) or root / FOLDER / f"{split}.json").absolute()
        found |= {split: path, f"{split}_images": path.parent if rendered else root.absolute()}
    return found


def faults(name: str, root: Path, limit: int) -> list[str]:
    """The first broken entries of the official files, at most so many; reads the headers of the images up to there."""
    read = CONVERSIONS[name].read
    broken = (item.sentence for split in SPLITS for item in read(root, split) if isinstance(item, Fault))
    found: list[str] = []
    try:
        found.extend(islice(broken, limit))
    except UserError as error:  # nothing behind this can be read
        found.append(str(error))
    return found


def _voc(lists: Mapping[str, tuple[tuple[str, str], ...]], classes: tuple[str, ...]) -> Conversion:
    def read(root: Path, split: str) -> Items:
        return read_voc(root, lists[split], classes)

    return Conversion(classes, read)


CONVERSIONS: dict[str, Conversion] = {
    "uodb_kitti": Conversion(KITTI_CLASSES, read_kitti),
    "uodb_widerface": Conversion(("face",), read_wider),
    "uodb_voc": _voc(VOC_LISTS, VOC_CLASSES),
    "uodb_lisa": Conversion(LISA_CLASSES, read_lisa),
    "uodb_dota": Conversion(DOTA_CLASSES, partial(read_dota, classes=DOTA_CLASSES), crop_dota),
    "uodb_watercolor": _voc(OTHER_LISTS, ART_CLASSES),
    "uodb_clipart": _voc(OTHER_LISTS, VOC_CLASSES),
    "uodb_comic": _voc(OTHER_LISTS, ART_CLASSES),
    "uodb_kitchen": _voc(OTHER_LISTS, KITCHEN_CLASSES),
    "uodb_deeplesion": Conversion(("lesion",), read_lesions, window_slice),
}


def _list_lengths(lists: Mapping[str, str]) -> Callable[[Path], dict[str, int]]:
    """Counts the lines of lists: what they count -> the list."""
    return lambda root: {what: len(required_lines(root / path)) for what, path in lists.items()}


def _files(patterns: Mapping[str, str]) -> Callable[[Path], dict[str, int]]:
    return lambda root: {what: sum(1 for _ in root.glob(pattern)) for what, pattern in patterns.items()}


def _count_wider(root: Path) -> dict[str, int]:
    lists = {split: root / "wider_face_split" / f"wider_face_{split}_bbx_gt.txt" for split in SPLITS}
    return {
        f"{split} images": sum(line.endswith(".jpg") for _, line in required_lines(lists[split])) for split in SPLITS
    }


def _count_table(path: str, delimiter: str, images: str, rows: str) -> Callable[[Path], dict[str, int]]:
    """Counts the rows of a csv and the different values of its first column."""

    def count(root: Path) -> dict[str, int]:
        names = [line.partition(delimiter)[0] for _, line in required_lines(root / path)[1:]]
        return {images: len(set(names)), rows: len(names)}

    return count


def _source(
    name: str,
    title: str,
    home: str,
    layout: tuple[str, ...],
    counts: Mapping[str, int],
    count: Callable[[Path], Mapping[str, int]],
    write: Callable[[Path], None],
) -> Source:
    def smoke(root: Path) -> None:
        write(root)
        prepare(name, root)

    return Source(title, home, layout, counts, count, partial(faults, name), smoke)


def _art(name: str, title: str, images: int, classes: tuple[str, ...]) -> Source:
    lists = {split: f"ImageSets/Main/{split}.txt" for split in ("train", "test")}
    return _source(
        f"uodb_{name}",
        title,
        f"github.com/naoto0804/cross-domain-detection (datasets/download.sh): unpack {name}.zip, give its folder.",
        ("JPEGImages", "Annotations", *lists.values()),
        {f"{split} images": images for split in lists},
        _list_lengths({f"{split} images": path for split, path in lists.items()}),
        lambda root: uodb_smoke.write_voc(root, [("", "train"), ("", "test")], classes, ".jpg"),
    )


_VOC_FILES = {
    "VOC2007 trainval images": "VOCdevkit/VOC2007/ImageSets/Main/trainval.txt",
    "VOC2012 trainval images": "VOCdevkit/VOC2012/ImageSets/Main/trainval.txt",
    "VOC2007 test images": "VOCdevkit/VOC2007/ImageSets/Main/test.txt",
}
_KITCHEN_FILES = {split: f"ImageSets/Main/{split}.txt" for split in ("train", "test")}

SOURCES: dict[str, Source] = {
    "uodb_kitti": _source(
        "uodb_kitti",
        "KITTI 2D object detection 2012",
        "www.cvlibs.net/datasets/kitti/eval_object.php: unpack data_object_image_2.zip and data_object_label_2.zip.",
        ("training/image_2", "training/label_2"),
        {"training images": 7481, "label files": 7481},
        _files({"training images": "training/image_2/*.png", "label files": "training/label_2/*.txt"}),
        uodb_smoke.write_kitti,
    ),
    "uodb_widerface": _source(
        "uodb_widerface",
        "WIDER FACE",
        "shuoyang1213.me/WIDERFACE: unpack WIDER_train.zip, WIDER_val.zip and wider_face_split.zip.",
        ("WIDER_train/images", "WIDER_val/images", "wider_face_split"),
        {"train images": 12880, "val images": 3226},
        _count_wider,
        uodb_smoke.write_wider,
    ),
    "uodb_voc": _source(
        "uodb_voc",
        "Pascal VOC 2007 and 2012",
        "host.robots.ox.ac.uk/pascal/VOC: unpack trainval and test of VOC2007 and trainval of VOC2012 (VOCdevkit).",
        ("VOCdevkit/VOC2007/JPEGImages", "VOCdevkit/VOC2012/JPEGImages", *_VOC_FILES.values()),
        dict(zip(_VOC_FILES, (5011, 11540, 4952), strict=True)),
        _list_lengths(_VOC_FILES),
        lambda root: uodb_smoke.write_voc(root, [*VOC_LISTS["train"], *VOC_LISTS["val"]], VOC_CLASSES, ".jpg"),
    ),
    "uodb_lisa": _source(
        "uodb_lisa",
        "LISA Traffic Sign Dataset",
        "cvrr.ucsd.edu/LISA/lisa-traffic-sign-dataset.html: unpack signDatabasePublicFramesOnly.zip.",
        ("allAnnotations.csv",),
        {"frames": 6610, "annotations": 7855},
        _count_table("allAnnotations.csv", ";", "frames", "annotations"),
        uodb_smoke.write_lisa,
    ),
    "uodb_dota": _source(
        "uodb_dota",
        "DOTA v1.0",
        "captain-whu.github.io/DOTA/dataset.html: unpack the images and labelTxt of train and val of v1.0.",
        ("train/images", "train/labelTxt", "val/images", "val/labelTxt"),
        {"train images": 1411, "val images": 458},
        _files({f"{split} images": f"{split}/images/*.png" for split in SPLITS}),
        lambda root: uodb_smoke.write_dota(root, DOTA_CLASSES),
    ),
    "uodb_watercolor": _art("watercolor", "Watercolor2k", 1000, ART_CLASSES),
    "uodb_clipart": _art("clipart", "Clipart1k", 500, VOC_CLASSES),
    "uodb_comic": _art("comic", "Comic2k", 1000, ART_CLASSES),
    "uodb_kitchen": _source(
        "uodb_kitchen",
        "GMU Kitchen, as the authors of the benchmark hand it out in VOC form",
        "www.svcl.ucsd.edu/projects/universal-detection: unpack Kitchen and give its folder VOCdevkit.",
        ("JPEGImages", "Annotations", *_KITCHEN_FILES.values()),
        {},
        _list_lengths({f"{split} images": path for split, path in _KITCHEN_FILES.items()}),
        lambda root: uodb_smoke.write_voc(root, [("", "train"), ("", "test")], KITCHEN_CLASSES, ".png"),
    ),
    "uodb_deeplesion": _source(
        "uodb_deeplesion",
        "DeepLesion",
        "nihcc.app.box.com/v/DeepLesion: unpack all of Images_png and put DL_info.csv beside them.",
        ("DL_info.csv", "Images_png"),
        {"key slices": 32120, "lesions": 32735},
        _count_table("DL_info.csv", ",", "key slices", "lesions"),
        uodb_smoke.write_lesions,
    ),
}
