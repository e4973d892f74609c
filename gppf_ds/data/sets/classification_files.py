"""How the classification sets write down their splits: read row by row, broken rows included, and written in small."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from zlib import crc32

import numpy as np
from PIL import Image

Split = Literal["train", "val"]

CALTECH_TRAIN = 30
"""Training images of each Caltech-101 class; all others test (the protocol of Kornblith et al. 2019)."""
CIFAR_PIXELS = 3 * 32 * 32
COLOURS = ((200, 60, 60), (60, 180, 60), (60, 60, 200))
"""Of the three classes of a smoke set."""


@dataclass(frozen=True)
class Row:
    """One image of a split, or what is wrong with the place where one should be."""

    split: Split
    where: str
    """File and line, or file and id."""
    image: Path
    label: str
    problem: str = ""

    def sentence(self) -> str:
        """What is wrong, for people."""
        return f"{self.where}: {self.problem}."


def aircraft(root: Path) -> Iterator[Row]:
    """FGVC-Aircraft: lines ``IMAGE VARIANT``; trained on trainval."""
    base = root / "fgvc-aircraft-2013b/data"
    variants = set((base / "variants.txt").read_text().splitlines())
    files: tuple[tuple[Split, str], ...] = (
        ("train", "images_variant_trainval.txt"),
        ("val", "images_variant_test.txt"),
    )
    for split, file in files:
        for where, line in _lines(base / file, root):
            image, _, variant = line.partition(" ")
            problem = "" if variant in variants else f"'{variant}' is no line of variants.txt"
            yield Row(split, where, base / "images" / f"{image}.jpg", variant, problem)


def caltech(root: Path) -> Iterator[Row]:
    """Caltech-101 with its background class: 30 images of each folder, drawn by a fixed seed, train."""
    base = root / "caltech101/101_ObjectCategories"
    for folder in sorted(path for path in base.iterdir() if path.is_dir()):
        # BACKGROUND_Google also holds a file that is no image.
        images = sorted(folder.glob("image_*.jpg"))
        order = np.random.default_rng(crc32(folder.name.encode())).permutation(len(images))
        chosen = set(order[:CALTECH_TRAIN].tolist())
        for number, image in enumerate(images):
            yield Row("train" if number in chosen else "val", str(image.relative_to(root)), image, folder.name)
        if len(images) <= CALTECH_TRAIN:
            few = f"has {len(images)} images, but {CALTECH_TRAIN} train and the others test"
            yield Row("val", str(folder.relative_to(root)), folder, folder.name, few)


def cars(root: Path) -> Iterator[Row]:
    """Stanford Cars: struct arrays of MATLAB, one annotation per image."""
    base = root / "stanford_cars"
    classes = np.atleast_1d(_mat(base / "devkit/cars_meta.mat")["class_names"]).tolist()
    files: tuple[tuple[Split, str, str], ...] = (
        ("train", "devkit/cars_train_annos.mat", "cars_train"),
        ("val", "cars_test_annos_withlabels.mat", "cars_test"),
    )
    for split, file, images in files:
        annotations = np.atleast_1d(_mat(base / file)["annotations"])
        for number, annotation in enumerate(annotations, start=1):
            label = int(annotation["class"])
            known = 1 <= label <= len(classes)
            problem = "" if known else f"class {label} is none of the {len(classes)} of cars_meta.mat"
            where = f"stanford_cars/{file}, annotation {number}"
            image = base / images / str(annotation["fname"])
            yield Row(split, where, image, classes[label - 1] if known else "", problem)


def dtd(root: Path) -> Iterator[Row]:
    """DTD, the first of its ten partitions: lines ``CLASS/IMAGE``; trained on train1 and val1."""
    base = root / "dtd/dtd"
    classes: set[str] = set()
    files: tuple[tuple[Split, str], ...] = (("train", "train1.txt"), ("train", "val1.txt"), ("val", "test1.txt"))
    for split, file in files:
        for where, line in _lines(base / "labels" / file, root):
            label, separator, _ = line.partition("/")
            if file == "train1.txt":
                classes.add(label)
            problem = "" if label in classes else f"the class '{label}' has no image in train1.txt"
            yield Row(split, where, base / "images" / line, label, problem if separator else "is not CLASS/IMAGE")


def flowers(root: Path) -> Iterator[Row]:
    """Oxford Flowers-102: image ids of each split and one label per id, in MATLAB files; trained on train and val."""
    base = root / "flowers-102"
    labels = np.atleast_1d(_mat(base / "imagelabels.mat")["labels"])
    splits = _mat(base / "setid.mat")
    keys: tuple[tuple[Split, str], ...] = (("train", "trnid"), ("train", "valid"), ("val", "tstid"))
    for split, key in keys:
        for number in np.atleast_1d(splits[key]).tolist():
            label = int(labels[number - 1]) if 1 <= number <= len(labels) else 0
            problem = "" if 1 <= label <= 102 else f"imagelabels.mat has no label from 1 to 102 for image {number}"
            image = base / "jpg" / f"image_{number:05d}.jpg"
            yield Row(split, f"flowers-102/setid.mat, {key}, image {number}", image, f"{label:03d}", problem)


def food(root: Path) -> Iterator[Row]:
    """Food-101: json objects {class: ["CLASS/IMAGE", ...]}."""
    base = root / "food-101"
    files: tuple[tuple[Split, str], ...] = (("train", "meta/train.json"), ("val", "meta/test.json"))
    classes: set[str] = set()
    for split, file in files:
        content = json.loads((base / file).read_text())
        classes = classes or set(content)
        for label, images in content.items():
            problem = "" if label in classes else f"the class '{label}' is not in train.json"
            for image in images:
                wrong = problem or ("" if image.startswith(f"{label}/") else f"does not belong to the class '{label}'")
                yield Row(split, f"food-101/{file}, {image}", base / "images" / f"{image}.jpg", label, wrong)


def pets(root: Path) -> Iterator[Row]:
    """Oxford-IIIT Pets: lines ``BREED_NUMBER CLASS SPECIES BREED``; trained on trainval."""
    base = root / "oxford-iiit-pet"
    breeds: dict[str, str] = {}
    files: tuple[tuple[Split, str], ...] = (("train", "trainval.txt"), ("val", "test.txt"))
    for split, file in files:
        for where, line in _lines(base / "annotations" / file, root):
            columns = line.split()
            if len(columns) != 4 or not all(column.isdigit() and int(column) > 0 for column in columns[1:]):
                yield Row(split, where, base, "", f"'{line}' is not IMAGE CLASS SPECIES BREED")
                continue
            name, label = columns[:2]
            breed = name.rpartition("_")[0]
            problem = (
                "" if breeds.setdefault(label, breed) == breed else f"class {label} is {breeds[label]}, not {breed}"
            )
            yield Row(split, where, base / "images" / f"{name}.jpg", breed, problem)


def sun397(root: Path) -> Iterator[Row]:
    """SUN397, the first of its ten partitions: lines ``/LETTER/CLASS/IMAGE``."""
    base = root / "SUN397"
    classes = set((base / "ClassName.txt").read_text().split())
    files: tuple[tuple[Split, str], ...] = (("train", "Training_01.txt"), ("val", "Testing_01.txt"))
    for split, file in files:
        for where, line in _lines(base / "Partitions" / file, root):
            label = line.rpartition("/")[0]
            problem = "" if label in classes else f"the class '{label}' is no line of ClassName.txt"
            yield Row(split, where, base / line.lstrip("/"), label, problem)


def _mat(path: Path) -> dict[str, Any]:
    """The variables of a MATLAB file; scipy runs no code of it."""
    from scipy.io import loadmat

    try:
        return loadmat(path, squeeze_me=True)
    except Exception as error:  # scipy reports broken files in its own, zlib's and Python's errors
        raise ValueError(f"{path} cannot be read as a MATLAB file: {error}") from error


def _lines(path: Path, root: Path) -> Iterator[tuple[str, str]]:
    """("FILE, line N", the line) of every line."""
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        yield f"{path.relative_to(root)}, line {number}", line.strip()


def make_class_folders(root: Path, folders: tuple[str, str]) -> None:
    """Three synsets in both folders."""
    for folder, images in zip(folders, (6, 3), strict=True):
        for label, synset in enumerate(("n01440764", "n01443537", "n01484850")):
            for number in range(images):
                _image(root / folder / synset / f"{synset}_{number}.JPEG", label)


def make_aircraft(root: Path) -> None:
    """Three variants."""
    base = root / "fgvc-aircraft-2013b/data"
    variants = ["707-320", "A300B4", "DC-10"]
    rows: dict[str, list[str]] = {"trainval": [], "test": []}
    for number in range(27):
        name, label = f"{1000001 + number}", number % 3
        _image(base / "images" / f"{name}.jpg", label)
        rows["test" if number >= 18 else "trainval"].append(f"{name} {variants[label]}")
    _text(base / "variants.txt", variants)
    for part, lines in rows.items():
        _text(base / f"images_variant_{part}.txt", lines)


def make_caltech(root: Path) -> None:
    """Three categories of 32 images, the background and its odd file among them."""
    base = root / "caltech101/101_ObjectCategories"
    for label, name in enumerate(("BACKGROUND_Google", "accordion", "airplanes")):
        for number in range(1, CALTECH_TRAIN + 3):
            _image(base / name / f"image_{number:04d}.jpg", label)
    (base / "BACKGROUND_Google/tmp").touch()


def make_cars(root: Path) -> None:
    """Three models."""
    from scipy.io import savemat

    base = root / "stanford_cars"
    names = np.array(["AM General Hummer SUV 2000", "Acura RL Sedan 2012", "Acura TL Sedan 2012"], dtype=object)
    (base / "devkit").mkdir(parents=True)
    savemat(base / "devkit/cars_meta.mat", {"class_names": names[None]})
    fields = [(name, object) for name in ("bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2", "class", "fname")]
    for file, folder, count in (
        ("devkit/cars_train_annos.mat", "cars_train", 18),
        ("cars_test_annos_withlabels.mat", "cars_test", 9),
    ):
        rows = [(1, 1, 60, 50, number % 3 + 1, f"{number + 1:05d}.jpg") for number in range(count)]
        for row in rows:
            _image(base / folder / row[5], row[4] - 1)
        savemat(base / file, {"annotations": np.array(rows, dtype=fields)[None]})


def make_cifar(root: Path, files: dict[str, int], label_bytes: int, names: tuple[str, int]) -> None:
    """Records of label bytes (the last one counts) and 3072 pixels, as in the binary versions.

    Args:
        files: number of records by path.
        label_bytes: in front of the pixels.
        names: the file of class names, and how many it lists.
    """
    noise = np.random.default_rng(0)
    for file, count in files.items():
        labels = np.tile(np.arange(count, dtype=np.uint8)[:, None] % 3, label_bytes)
        pixels = np.array(COLOURS, np.uint8)[labels[:, -1]].repeat(1024, axis=1)
        pixels = pixels + noise.integers(0, 50, pixels.shape, dtype=np.uint8)
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).write_bytes(np.concatenate([labels, pixels], axis=1).tobytes())
    _text(root / names[0], [f"class_{number}" for number in range(names[1])])


def make_dtd(root: Path) -> None:
    """Three textures."""
    base = root / "dtd/dtd"
    for part, file in enumerate(("train1.txt", "val1.txt", "test1.txt")):
        rows = [
            f"{name}/{name}_{9 * part + number:04d}.jpg"
            for name in ("banded", "blotchy", "braided")
            for number in range(3)
        ]
        for number, row in enumerate(rows):
            _image(base / "images" / row, number // 3)
        _text(base / "labels" / file, rows)


def make_flowers(root: Path) -> None:
    """Three of the 102 flowers."""
    from scipy.io import savemat

    base = root / "flowers-102"
    labels = [1 + number % 3 for number in range(27)]
    for number, label in enumerate(labels, start=1):
        _image(base / f"jpg/image_{number:05d}.jpg", label - 1)
    savemat(base / "imagelabels.mat", {"labels": np.array([labels], np.uint8)})
    ids = np.arange(1, 28, dtype=np.uint16)[None]
    savemat(base / "setid.mat", {"trnid": ids[:, :9], "valid": ids[:, 9:18], "tstid": ids[:, 18:]})


def make_food(root: Path) -> None:
    """Three dishes."""
    base = root / "food-101"
    (base / "meta").mkdir(parents=True)
    for file, numbers in (("train.json", range(100, 106)), ("test.json", range(200, 203))):
        content = {
            name: [f"{name}/{number}" for number in numbers] for name in ("apple_pie", "baby_back_ribs", "baklava")
        }
        for label, images in enumerate(content.values()):
            for image in images:
                _image(base / "images" / f"{image}.jpg", label)
        (base / "meta" / file).write_text(json.dumps(content))


def make_pets(root: Path) -> None:
    """Three breeds."""
    base = root / "oxford-iiit-pet"
    breeds = (("Abyssinian", 1, 1), ("american_bulldog", 2, 1), ("Bengal", 1, 2))
    for file, numbers in (("trainval.txt", range(1, 7)), ("test.txt", range(7, 10))):
        rows = []
        for label, (breed, species, of_species) in enumerate(breeds):
            for number in numbers:
                _image(base / f"images/{breed}_{number}.jpg", label)
                rows.append(f"{breed}_{number} {label + 1} {species} {of_species}")
        _text(base / "annotations" / file, rows)


def make_sun397(root: Path) -> None:
    """Three scenes, one of them with a place."""
    base = root / "SUN397"
    classes = ["/a/abbey", "/a/airplane_cabin", "/b/bow_window/indoor"]
    _text(base / "ClassName.txt", classes)
    for file, letters in (("Training_01.txt", "abcdef"), ("Testing_01.txt", "xyz")):
        rows = [f"{name}/sun_{letter * 16}.jpg" for name in classes for letter in letters]
        for number, row in enumerate(rows):
            _image(base / row.lstrip("/"), number // len(letters))
        _text(base / "Partitions" / file, rows)


def _image(path: Path, label: int) -> None:
    """80 x 64 pixels in the colour of the class, with noise."""
    noise = np.random.default_rng(crc32(path.name.encode())).integers(0, 50, (64, 80, 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(noise + np.array(COLOURS[label], np.uint8)).save(path, "JPEG")


def _text(path: Path, lines: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines))
