"""Writes a small family of demo data sets in the formats that users have, from real images that need no download."""

from __future__ import annotations

import json
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from gppf_ds.data.demo_scenes import Scene, Sources, draw_crop, draw_scene, load_sources
from gppf_ds.errors import UserError

DIGIT_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
REGION_NAMES = ("wall", "ground", "digit")
IGNORE_LABEL = 255

_VERSION = 2
_STAMP = "demo.json"
_CONTENTS = {"classification", "scenes", "README.txt", _STAMP}
_CROPS, _SCENES = 0, 1  # the streams of random numbers

_README = """\
Demo data of gppf-ds
====================

Handwritten digits standing in photographed surroundings, made by `gppf-ds demo-data` from images that are part of the
scikit-learn and scikit-image packages. The digits and photographs of train and val are different ones. All pictures
here are adaptations: cropped, resized, recoloured and combined.

classification/SPLIT/DIGIT/*.jpg         one digit per picture, a folder per class
scenes/images/SPLIT/*.jpg                1 to 4 digits on the ground before a wall
scenes/annotations/instances_SPLIT.json  COCO: boxes and masks of the visible part; a mask with holes is stored as
                                         run lengths (RLE), the others as polygons
scenes/labels/SPLIT/*.png                8 bits, 0 = wall, 1 = ground, 2 = digit, 255 = ignore (outlines);
                                         names in scenes/classes.json
scenes/depth/SPLIT/*.png                 16 bits, millimetres along the optical axis, 0 = not measured;
                                         see scenes/depth.json

Sources and licences
--------------------

digits                  Optical Recognition of Handwritten Digits, E. Alpaydin and C. Kaynak, UCI Machine Learning
                        Repository (1998), CC BY 4.0; the copy in scikit-learn
china.jpg               "danielbuechele" on Flickr, CC BY 2.0, https://www.flickr.com/photos/danielbuechele/6061409035
flower.jpg              "vultilion" on Flickr, CC BY 2.0, https://www.flickr.com/photos/vultilion/6056698931
astronaut.png           NASA, public domain
hubble_deep_field.jpg   NASA and ESA, public domain
rocket.jpg              SpaceX, public domain
retina.jpg              Mikael Haggstrom, CC0 1.0
camera.png              Lav Varshney, CC0 1.0
chelsea.png             Stefan van der Walt, CC0 1.0
coffee.png              Rachel Michetti, CC0 1.0
brick.png, gravel.png   CC0Textures (Bricks25, Gravel04), CC0 1.0
grass.png               "linolafett" on DeviantArt, CC0 1.0

CC BY 2.0: https://creativecommons.org/licenses/by/2.0/  CC BY 4.0: https://creativecommons.org/licenses/by/4.0/
CC0 1.0: https://creativecommons.org/publicdomain/zero/1.0/
"""


@dataclass(frozen=True)
class DemoArguments:
    """What the content of the folder is a function of."""

    seed: int
    train_scenes: int
    val_scenes: int
    train_crops: int
    val_crops: int
    scene_size: int
    crop_size: int


def make_demo_data(
    root: Path,
    seed: int = 0,
    train_scenes: int = 240,
    val_scenes: int = 48,
    train_crops: int = 3000,
    val_crops: int = 200,
    scene_size: int = 128,
    crop_size: int = 64,
    overwrite: bool = False,
) -> None:
    """Writes the demo data sets into ``root``, or leaves it alone if it holds them already.

    On one machine the bytes are a function of the arguments and of the installed packages. The folder is made beside
    ``root`` and moved there when it is complete. Its ``README.txt`` describes the layout and names the sources.

    Args:
        root: the folder to make.
        seed: of everything random.
        train_scenes, val_scenes: number of scenes.
        train_crops, val_crops: number of pictures for classification, shared evenly among the 10 classes.
        scene_size: height and width of a scene in pixels, at least 64.
        crop_size: height and width of a picture for classification in pixels, at least 32.
        overwrite: replace demo data that is incomplete or was made with other arguments.

    Raises:
        UserError: ``root`` holds something else, cannot be written, or an argument is out of range.
    """
    arguments = DemoArguments(seed, train_scenes, val_scenes, train_crops, val_crops, scene_size, crop_size)
    _check_arguments(arguments)
    try:
        if _is_complete(root, arguments, overwrite):
            return
        root.parent.mkdir(parents=True, exist_ok=True)
        # What a kill leaves behind is this hidden folder; root itself appears with its full content or not at all.
        with tempfile.TemporaryDirectory(prefix=f".{root.name}.", dir=root.parent) as scratch:
            made = Path(scratch) / "made"
            _write(made, arguments)
            if root.exists():
                root.rename(Path(scratch) / "replaced")
            made.rename(root)
    except OSError as error:
        raise UserError(f"{root}: the demo data cannot be written ({error}): choose another folder.") from error


def _check_arguments(arguments: DemoArguments) -> None:
    least = DemoArguments(
        seed=0, train_scenes=1, val_scenes=1, train_crops=10, val_crops=10, scene_size=64, crop_size=32
    )
    for name, minimum in asdict(least).items():
        value = getattr(arguments, name)
        if value < minimum:
            raise UserError(f"{name} has to be at least {minimum}, not {value}.")


def _is_complete(root: Path, arguments: DemoArguments, overwrite: bool) -> bool:
    """Whether ``root`` can be used as it is; False means that it may be (re)made."""
    if not root.exists() or (root.is_dir() and not any(root.iterdir())):
        return False
    if not root.is_dir() or not {path.name for path in root.iterdir()} <= _CONTENTS:
        raise UserError(f"{root} holds something other than demo data: choose a new or empty folder.")
    try:
        stamp = json.loads((root / _STAMP).read_text())
    except (FileNotFoundError, ValueError):
        stamp = None
    if stamp == _stamp(root, arguments):
        return True
    if not overwrite:
        raise UserError(
            f"{root} holds demo data that is incomplete or was made with other arguments: choose another folder or "
            f"set overwrite to replace it."
        )
    return False


def _stamp(root: Path, arguments: DemoArguments) -> dict[str, Any]:
    # Hidden files are not ours: the index of a large folder, for one.
    files = sum(path.is_file() and not path.name.startswith(".") and path.name != _STAMP for path in root.rglob("*"))
    return {"version": _VERSION, "arguments": asdict(arguments), "files": files}


def _write(root: Path, arguments: DemoArguments) -> None:
    scenes = root / "scenes"
    _write_split(root, "train", arguments.train_crops, arguments.train_scenes, arguments)
    _write_split(root, "val", arguments.val_crops, arguments.val_scenes, arguments)
    _write_json(scenes / "classes.json", list(REGION_NAMES))
    _write_json(scenes / "depth.json", {"unit": "millimetre", "scale_to_metres": 0.001, "invalid": 0})
    (root / "README.txt").write_text(_README, encoding="utf-8")
    _write_json(root / _STAMP, _stamp(root, arguments))


def _write_split(root: Path, split: Literal["train", "val"], crops: int, scenes: int, arguments: DemoArguments) -> None:
    sources = load_sources(split)
    seed = [arguments.seed, ("train", "val").index(split)]
    _write_crops(root / "classification" / split, sources, crops, arguments.crop_size, [*seed, _CROPS])

    folders = {kind: root / "scenes" / kind / split for kind in ("images", "labels", "depth")}
    for folder in folders.values():
        folder.mkdir(parents=True)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number in range(1, scenes + 1):
        scene = draw_scene(sources, arguments.scene_size, np.random.default_rng([*seed, _SCENES, number]))
        name = f"{number:06d}"
        Image.fromarray(scene.image).save(folders["images"] / f"{name}.jpg", quality=92)
        Image.fromarray(_label_map(scene)).save(folders["labels"] / f"{name}.png")
        Image.fromarray((scene.depth * 1000 + 0.5).astype(np.uint16)).save(folders["depth"] / f"{name}.png")
        size = arguments.scene_size
        images.append({"id": number, "file_name": f"{name}.jpg", "width": size, "height": size})
        for annotation in _coco_annotations(scene):
            annotations.append({"id": len(annotations) + 1, "image_id": number, **annotation})
    categories = [{"id": index + 1, "name": name} for index, name in enumerate(DIGIT_NAMES)]
    path = root / "scenes" / "annotations" / f"instances_{split}.json"
    path.parent.mkdir(exist_ok=True)
    _write_json(path, {"images": images, "annotations": annotations, "categories": categories})


def _write_crops(folder: Path, sources: Sources, count: int, size: int, seed: list[int]) -> None:
    """The digits of every class in turn, from the first again when all have been used."""
    by_class = [[i for i, c in enumerate(sources.classes) if c == digit] for digit in range(10)]
    for digit in range(10):
        (folder / str(digit)).mkdir(parents=True)
    for number in range(count):
        index, digit = divmod(number, 10)
        chosen = by_class[digit][index % len(by_class[digit])]
        crop = draw_crop(sources, chosen, size, np.random.default_rng([*seed, number]))
        Image.fromarray(crop).save(folder / str(digit) / f"{index:05d}.jpg", quality=92)


def _label_map(scene: Scene) -> NDArray[np.uint8]:
    """Indices into :data:`REGION_NAMES`, and IGNORE_LABEL on the pixels beside a digit that touch it."""
    ink = np.pad(scene.instances > 0, 1)
    touched = ink[:-2, 1:-1] | ink[2:, 1:-1] | ink[1:-1, :-2] | ink[1:-1, 2:]
    around = np.where(touched, IGNORE_LABEL, scene.ground)
    return np.where(scene.instances > 0, REGION_NAMES.index("digit"), around).astype(np.uint8)


def _coco_annotations(scene: Scene) -> list[dict[str, Any]]:
    annotations = []
    for number, digit in enumerate(scene.classes, start=1):
        mask = scene.instances == number
        rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
        top, left = int(rows[0]), int(columns[0])
        annotations.append(
            {
                "category_id": digit + 1,
                "bbox": [left, top, int(columns[-1]) + 1 - left, int(rows[-1]) + 1 - top],
                "area": int(mask.sum()),
                "iscrowd": 0,
                "segmentation": _segmentation(mask),
            }
        )
    return annotations


def _segmentation(mask: NDArray[np.bool_]) -> list[list[float]] | dict[str, Any]:
    """COCO polygons, or compressed run lengths for a mask with holes, which polygons cannot say."""
    from pycocotools.mask import encode
    from scipy.ndimage import label
    from skimage.measure import find_contours

    # Padded by 1 so that every contour is closed; COCO puts the middle of the first pixel at 0.5.
    contours = find_contours(np.pad(mask, 1).astype(np.float64), 0.5)
    _, parts = label(mask)
    if len(contours) == parts:
        return [(contour[:-1, ::-1] - 0.5).ravel().tolist() for contour in contours]
    runs = encode(np.asfortranarray(mask, dtype=np.uint8))
    return {"size": list(mask.shape), "counts": runs["counts"].decode("ascii")}


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content), encoding="utf-8")
