"""Open Images for mmdet: the files of the 2019 challenge as they are published, and those that mmdet's configs name.

No published file has the sizes of the images: mmdet takes them, and the hierarchy of the challenge, from pickles that
one makes or downloads. Here boxes stay relative until their image is loaded, so no pickle is read. This module imports
mmdet: import it inside functions, in :func:`gppf_ds.tasks.openmm.scope`.
"""

from __future__ import annotations

import csv
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from mmdet.datasets import OpenImagesDataset

from gppf_ds.errors import UserError
from gppf_ds.tasks.federated import JUDGED

Boxes = dict[str, list[dict[str, Any]]]
"""Instances by image file name."""


class OpenImagesBoxes(OpenImagesDataset):
    """Stands for mmdet's ``OpenImagesDataset`` and ``OpenImagesChallengeDataset`` and takes their arguments.

    Args:
        ann_file: boxes as a csv file (of the challenge, or of Open Images V4 to V7), or as mmdet's txt file.
        label_file: csv file of class ids (MIDs) and names, and mmdet's class numbers if it has three columns.
        hierarchy_file: the published json file, or the array ``.np`` that mmdet names for the challenge.
        image_level_ann_file: csv file of verified image labels. In ``test_mode`` its images without any box are there
            too, since a detection of a class that is verified to be absent is an error; else every sample has the
            labels :data:`gppf_ds.tasks.federated.JUDGED`.
        meta_file: not read.
    """

    METAINFO = {"dataset_type": "oid_challenge"}  # noqa: RUF012

    def __init__(self, meta_file: str = "", **settings: Any) -> None:
        super().__init__(meta_file="", **settings)
        self.pipeline.transforms.insert(1, boxes_in_pixels)  # the first loads the image

    def load_data_list(self) -> list[dict[str, Any]]:
        """One entry per image, boxes relative to its size; raises :class:`UserError` naming a bad line."""
        names, relations = self.class_table()
        self._metainfo["classes"], self._metainfo["RELATION_MATRIX"] = names, relations
        read = self._boxes_of_txt if self.ann_file.endswith(".txt") else self._boxes_of_csv
        boxes = read(Path(self.ann_file))
        verified = self._verified(Path(self.image_level_ann_file)) if self.image_level_ann_file else None
        if verified is not None and self.test_mode:
            known = {Path(name).stem for name in boxes}
            boxes |= {f"{image}.jpg": [] for image in verified if image not in known}
        tree = Tree(relations)
        entries = []
        for name, instances in boxes.items():
            image = Path(name).stem
            place = str(Path(self.data_prefix["img"]) / name)
            entry: dict[str, Any] = {"img_path": place, "img_id": image, "instances": instances}
            if verified is not None:
                labels = verified.get(image, {})
                entry["image_level_labels"] = np.array([*labels], dtype=np.int64)
                if not self.test_mode:
                    boxed = {one["bbox_label"] for one in instances}
                    entry[JUDGED] = np.array(tree.judged(boxed, labels), dtype=np.int64)
            entries.append(entry)
        return entries

    def class_table(self) -> tuple[list[str], np.ndarray[Any, Any]]:
        """Class names by label, and the relations: entry (i, j) is nonzero where class j is i or a parent of i."""
        rows = [row for _, row in _lines(Path(self.label_file), 2)]
        if all(len(row) > 2 for row in rows):
            rows.sort(key=lambda row: int(row[2]))
        self.label_id_mapping = {row[0]: label for label, row in enumerate(rows)}
        names = [row[1] for row in rows]
        self._metainfo["classes"] = names  # read by the next line
        if Path(self.hierarchy_file).suffix == ".json":
            return names, self._get_relation_matrix(self.hierarchy_file)
        try:
            return names, np.load(self.hierarchy_file, allow_pickle=False)[1:, 1:]  # class numbers start from 1
        except ValueError as error:
            raise UserError(
                f"{self.hierarchy_file} is no plain array ({error}): name the published json file as hierarchy_file."
            ) from error

    def _boxes_of_csv(self, path: Path) -> Boxes:
        boxes: Boxes = defaultdict(list)
        for number, row in _records(path, ("ImageID", "LabelName", "XMin", "YMin", "XMax", "YMax", "IsGroupOf")):
            try:
                corners = [float(row[key]) for key in ("XMin", "YMin", "XMax", "YMax")]
                label = self.label_id_mapping[row["LabelName"]]
            except (KeyError, TypeError, ValueError) as error:
                raise UserError(f"{path}:{number} is no box ({error!r}): correct or remove the line.") from error
            boxes[f"{row['ImageID']}.jpg"].append(_instance(corners, label, row["IsGroupOf"] == "1"))
        return dict(boxes)

    def _boxes_of_txt(self, path: Path) -> Boxes:
        """Per image: its file, a line that is not used, the number of boxes, the boxes (class number from 1 first)."""
        lines, boxes, i = path.read_text().splitlines(), Boxes(), 0
        try:
            while i < len(lines):
                name, count = lines[i].rstrip(), int(lines[i + 2])
                i += 3
                instances = []
                for _ in range(count):
                    number, *corners, group = lines[i].split()
                    i += 1
                    instances.append(_instance([float(v) for v in corners], int(number) - 1, group == "1"))
                boxes[name] = instances
        except (IndexError, ValueError) as error:
            raise UserError(f"{path}:{i + 1} is no box ({error}): correct the file.") from error
        return boxes

    def _verified(self, path: Path) -> dict[str, dict[int, bool]]:
        """By image the classes that somebody has looked for in it, and whether they are there."""
        labels: dict[str, dict[int, bool]] = defaultdict(dict)
        for number, row in _records(path, ("ImageID", "LabelName", "Confidence")):
            try:
                labels[row["ImageID"]][self.label_id_mapping[row["LabelName"]]] = float(row["Confidence"]) > 0
            except KeyError as error:
                raise UserError(f"{path}:{number} has the unknown class {error}: correct or remove the line.") from None
            except ValueError as error:
                raise UserError(f"{path}:{number} has no number as Confidence ({error}): correct the line.") from None
        return labels


class Tree:
    """The hierarchy of the classes.

    Args:
        relations: (classes, classes), entry (i, j) nonzero where class j is i or a parent of i.
    """

    def __init__(self, relations: np.ndarray[Any, Any]) -> None:
        self.above = [set(np.flatnonzero(row).tolist()) - {label} for label, row in enumerate(relations)]
        self.below = [set(np.flatnonzero(row).tolist()) - {label} for label, row in enumerate(relations.T)]

    def judged(self, boxed: set[int], verified: Mapping[int, bool]) -> list[int]:
        """The labels for which an object without a box can count as absent in an image.

        Those with a box or a verified image label, and as in the challenge's own expansion of the labels all below an
        absent one. Not those above one that is there: its objects are theirs too.

        Args:
            boxed: labels of the boxes.
            verified: whether the class is there, by label.
        """
        there = boxed | {label for label, found in verified.items() if found}
        absent = [self.below[label] for label, found in verified.items() if not found]
        return sorted((boxed | verified.keys()).union(*absent) - set().union(*(self.above[label] for label in there)))


def boxes_in_pixels(sample: dict[str, Any]) -> dict[str, Any]:
    """A transform for behind the loading of the image: boxes by its size."""
    height, width = sample["ori_shape"][:2]
    for one in sample["instances"]:
        x1, y1, x2, y2 = one["bbox"]
        one["bbox"] = [x1 * width, y1 * height, x2 * width, y2 * height]
    return sample


def _instance(corners: list[float], label: int, group: bool) -> dict[str, Any]:
    x1, y1, x2, y2 = corners
    return {"bbox": [x1, y1, x2, y2], "bbox_label": label, "ignore_flag": 0, "is_group_of": group}


def _records(path: Path, columns: tuple[str, ...]) -> Iterator[tuple[int, dict[str, str]]]:
    """Line numbers and rows by column name."""
    lines = _lines(path, len(columns))
    header = next(lines, (1, []))[1]
    missing = [name for name in columns if name not in header]
    if missing:
        raise UserError(f"{path} has no column {missing[0]}: give a csv file of Open Images.")
    places = [(name, header.index(name)) for name in columns]
    for number, row in lines:
        if len(row) != len(header):
            raise UserError(f"{path}:{number} has {len(row)} columns, not {len(header)}: correct or remove the line.")
        yield number, {name: row[place] for name, place in places}


def _lines(path: Path, columns: int) -> Iterator[tuple[int, list[str]]]:
    try:
        with path.open(newline="") as file:
            reader = csv.reader(file)
            for row in reader:
                if len(row) < columns:
                    raise UserError(f"{path}:{reader.line_num} has fewer than {columns} columns: correct the line.")
                yield reader.line_num, row
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): correct its place.") from error
