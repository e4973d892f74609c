"""Tiny sets in the official formats of the ten: coloured rectangles on grey, some flagged as to be ignored."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

WIDTH, HEIGHT = 128, 96

Scene = list[tuple[str, int, int, int, int]]
"""(class, left, top, right, bottom), edges in pixels from 0."""


def scene(classes: Sequence[str], index: int, width: int = WIDTH, height: int = HEIGHT) -> Scene:
    """Two objects for picture number ``index``: each class comes in its turn, at places that differ."""
    rng = np.random.default_rng(index)
    placed: Scene = []
    for half in (0, 1):
        side = int(rng.integers(24, 40))
        left = int(rng.integers(0, width // 2 - side)) + half * width // 2
        top = int(rng.integers(0, height - side))
        placed.append((classes[(2 * index + half) % len(classes)], left, top, left + side, top + side))
    return placed


def paint(path: Path, objects: Scene, classes: Sequence[str], width: int = WIDTH, height: int = HEIGHT) -> None:
    """The picture of a scene, a colour for each class."""
    pixels = np.random.default_rng(len(path.name)).integers(90, 110, (height, width, 3), dtype=np.uint8)
    for name, left, top, right, bottom in objects:
        colour = 40 + 160 * np.random.default_rng(classes.index(name)).random(3)
        pixels[top:bottom, left:right] = colour.astype(np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def write_voc(root: Path, lists: Sequence[tuple[str, str]], classes: Sequence[str], suffix: str) -> None:
    """Four pictures for each (folder, list); the second object of every list's first picture is difficult."""
    for number, (folder, name) in enumerate(lists):
        base = root / folder
        stems = []
        for index in range(4 * number, 4 * number + 4):
            objects = scene(classes, index)
            stems.append(f"{index + 1:06d}")
            paint(base / "JPEGImages" / f"{stems[-1]}{suffix}", objects, classes)
            (base / "Annotations").mkdir(exist_ok=True)
            text = _voc_xml(f"{stems[-1]}{suffix}", objects, difficult=1 if index == 4 * number else None)
            (base / "Annotations" / f"{stems[-1]}.xml").write_text(text)
        (base / "ImageSets" / "Main").mkdir(parents=True, exist_ok=True)
        (base / "ImageSets" / "Main" / f"{name}.txt").write_text("\n".join(stems) + "\n")


def _voc_xml(file: str, objects: Scene, difficult: int | None) -> str:
    text = f"<annotation>\n  <filename>{file}</filename>\n  <size>\n    <width>{WIDTH}</width>\n"
    text += f"    <height>{HEIGHT}</height>\n    <depth>3</depth>\n  </size>\n"
    for place, (name, left, top, right, bottom) in enumerate(objects):
        text += f"  <object>\n    <name>{name}</name>\n    <pose>Unspecified</pose>\n    <truncated>0</truncated>\n"
        text += f"    <difficult>{int(place == difficult)}</difficult>\n    <bndbox>\n"
        text += f"      <xmin>{left + 1}</xmin>\n      <ymin>{top + 1}</ymin>\n"
        text += f"      <xmax>{right}</xmax>\n      <ymax>{bottom}</ymax>\n    </bndbox>\n  </object>\n"
    return text + "</annotation>\n"


def write_kitti(root: Path) -> None:
    """30 pictures, so that two are held out; the first has a DontCare region and a van."""
    classes = ("Car", "Pedestrian", "Cyclist")
    labels = root / "training" / "label_2"
    labels.mkdir(parents=True)
    for index in range(30):
        objects = scene(classes, index)
        paint(root / "training" / "image_2" / f"{index:06d}.png", objects, classes)
        rows = [_kitti_row(*entry) for entry in objects]
        if index == 0:
            rows += [_kitti_row("Van", 0, 60, 20, 90), _kitti_row("DontCare", 100, 0, 128, 20)]
        (labels / f"{index:06d}.txt").write_text("\n".join(rows) + "\n")


def _kitti_row(name: str, left: int, top: int, right: int, bottom: int) -> str:
    return f"{name} 0.00 0 -1.57 {left:.2f} {top:.2f} {right:.2f} {bottom:.2f} 1.5 1.6 3.7 1.0 1.7 20.0 -1.5"


def write_wider(root: Path) -> None:
    """Four pictures per split; one face is invalid, and one picture has none."""
    (root / "wider_face_split").mkdir(parents=True)
    for start, split in ((0, "train"), (4, "val")):
        text = ""
        for index in range(start, start + 4):
            name = f"0--Parade/0_Parade_marchingband_1_{index}.jpg"
            faces = scene(("face",), index) if index != start + 3 else []
            paint(root / f"WIDER_{split}" / "images" / name, faces, ("face",))
            text += f"{name}\n{len(faces)}\n"
            rows = [f"{x1} {y1} {x2 - x1} {y2 - y1} 0 0 0 0 0 0 \n" for _, x1, y1, x2, y2 in faces]
            if index == start:
                rows[1] = rows[1].replace(" 0 0 0 0 0 0 ", " 0 0 0 1 0 0 ")
            text += "".join(rows) or "0 0 0 0 0 0 0 0 0 0 \n"
        (root / "wider_face_split" / f"wider_face_{split}_bbx_gt.txt").write_text(text)


def write_lisa(root: Path) -> None:
    """Ten frames of ten tracks, so that two are held out; the first also shows a sign of no class."""
    classes = ("stop", "speedLimit25", "noLeftTurn", "merge")
    header = (
        "Filename;Annotation tag;Upper left corner X;Upper left corner Y;Lower right corner X;Lower right corner Y;"
    )
    header += "Occluded,On another road;Origin file;Origin frame number;Origin track;Origin track frame number"
    rows = [header]
    for index in range(10):
        objects = scene(classes, index)
        folder = "aiua120214-0/frameAnnotations-DataLog02142012_external_camera.avi_annotations"
        file = f"{folder}/{objects[0][0]}_133054591{index}.avi_image0.png"
        paint(root / file, objects, classes)
        origin = f"0,0;aiua120214-0/2012-02-14_1.avi;{index};{objects[0][0]}_{index}.avi;0"
        if index == 0:
            objects = [*objects, ("keepRight", 0, 0, 20, 20)]
        rows += [f"{file};{name};{x1};{y1};{x2};{y2};{origin}" for name, x1, y1, x2, y2 in objects]
    (root / "allAnnotations.csv").write_text("\n".join(rows) + "\n")


def write_dota(root: Path, classes: Sequence[str]) -> None:
    """Three pictures per split, the first of each wider than a crop; in it one object is difficult."""
    for start, split in ((0, "train"), (3, "val")):
        (root / split / "labelTxt").mkdir(parents=True)
        for index in range(start, start + 3):
            width = 1200 if index == start else WIDTH
            objects = scene(classes, index, width)
            paint(root / split / "images" / f"P{index:04d}.png", objects, classes, width)
            text = "imagesource:GoogleEarth\ngsd:0.146343590398\n"
            for place, (name, x1, y1, x2, y2) in enumerate(objects):
                middle = (x1 + x2) // 2  # a kite: its corners touch all four sides of the box
                corners = (middle, y1, x2, (y1 + y2) // 2, middle, y2, x1, (y1 + y2) // 2)
                text += f"{' '.join(f'{corner:.1f}' for corner in corners)} {name} {int(place == 1 and width > 1024)}\n"
            (root / split / "labelTxt" / f"P{index:04d}.txt").write_text(text)


def write_lesions(root: Path) -> None:
    """Four slices of the training split, one of the validation and two of the test split; one lesion may be noise."""
    columns = [
        "File_name",
        "Patient_index",
        "Study_index",
        "Series_ID",
        "Key_slice_index",
        "Measurement_coordinates",
        "Bounding_boxes",
        "Lesion_diameters_Pixel_",
        "Normalized_lesion_location",
        "Coarse_lesion_type",
        "Possibly_noisy",
        "Slice_range",
        "Spacing_mm_px_",
        "Image_size",
        "DICOM_windows",
        "Patient_gender",
        "Patient_age",
        "Train_Val_Test",
    ]
    root.mkdir(parents=True, exist_ok=True)
    with (root / "DL_info.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        for index, split in enumerate((1, 1, 1, 1, 2, 3, 3)):
            objects = scene(("lesion",), index)
            folder = root / "Images_png" / f"{index + 1:06d}_01_01"
            folder.mkdir(parents=True)
            units = np.full((HEIGHT, WIDTH), -800)
            for _, x1, y1, x2, y2 in objects:
                units[y1:y2, x1:x2] = 60
            Image.fromarray((units + 32768).astype(np.uint16)).save(folder / "109.png")
            for place, (_, x1, y1, x2, y2) in enumerate(objects):
                row: dict[str, object] = dict.fromkeys(columns, "")
                row |= {"File_name": f"{folder.name}_109.png", "Bounding_boxes": f"{x1}, {y1}, {x2}, {y2}"}
                row |= {"Possibly_noisy": int((index, place) == (0, 1)), "Train_Val_Test": split}
                writer.writerow(row.values())
