"""The large detection sets of pre-training: COCO, LVIS, Objects365 and the Open Images challenge.

The folders are those that mmdet's configurations name below their ``data_root``.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from gppf_ds.data.sets import detection_smoke
from gppf_ds.data.sets.detection_faults import JsonSplit, json_faults, open_images_faults
from gppf_ds.data.source import Source

COCO = {
    "train": JsonSplit("annotations/instances_train2017.json", "train2017"),
    "val": JsonSplit("annotations/instances_val2017.json", "val2017"),
}
LVIS = {
    "train": JsonSplit("annotations/lvis_v1_train.json", "", kind="lvis"),
    "val": JsonSplit("annotations/lvis_v1_val.json", "", kind="lvis"),
}
OBJECTS365 = {
    "train": JsonSplit("annotations/zhiyuan_objv2_train.json", "train", kind="objects365"),
    "val": JsonSplit("annotations/zhiyuan_objv2_val.json", "val", kind="objects365"),
}


def _files_below(folder: Path) -> int:
    return sum(len(files) for _, _, files in os.walk(folder))


def _count_folders(folders: Mapping[str, str], root: Path) -> dict[str, int]:
    return {name: _files_below(root / folder) for name, folder in folders.items()}


def _count_lvis(root: Path) -> dict[str, int]:
    """From the json files, as the images are COCO's; that of train takes some seconds."""
    counts: dict[str, int] = {}
    for name, split in LVIS.items():
        content = json.loads((root / split.annotations).read_bytes())
        counts |= {f"{name} images": len(content["images"]), "categories": len(content["categories"])}
    return counts


def _count_open_images(root: Path) -> dict[str, int]:
    with (root / "challenge2019/challenge-2019-classes-description-500.csv").open() as file:
        classes = sum(bool(line.strip()) for line in file)
    folders = {"train images": "OpenImages/train", "validation images": "OpenImages/validation"}
    return _count_folders(folders, root) | {"classes": classes}


SOURCES: dict[str, Source] = {
    "coco": Source(
        title="COCO 2017",
        home=(
            "https://cocodataset.org/#download: train2017.zip, val2017.zip and annotations_trainval2017.zip, unpacked "
            "in one folder."
        ),
        layout=(*(split.annotations for split in COCO.values()), "train2017", "val2017"),
        counts={"train images": 118_287, "val images": 5_000},
        count=partial(_count_folders, {"train images": "train2017", "val images": "val2017"}),
        faults=partial(json_faults, COCO),
        smoke=detection_smoke.coco,
    ),
    "lvis": Source(
        title="LVIS v1",
        home=(
            "https://www.lvisdataset.org/dataset: lvis_v1_train.json and lvis_v1_val.json into annotations, beside "
            "train2017 and val2017 of COCO."
        ),
        layout=(*(split.annotations for split in LVIS.values()), "train2017", "val2017"),
        counts={"train images": 100_170, "val images": 19_809, "categories": 1_203},
        count=_count_lvis,
        faults=partial(json_faults, LVIS),
        smoke=detection_smoke.lvis,
    ),
    "objects365": Source(
        title="Objects365 v2",
        home=(
            "https://www.objects365.org/download.html: the patches of train and val into train/patchN and val/patchN, "
            "zhiyuan_objv2_train.json and zhiyuan_objv2_val.json into annotations."
        ),
        layout=(*(split.annotations for split in OBJECTS365.values()), "train", "val"),
        # Of the unpacked patches, as YOLOv5's Objects365.yaml has them; the authors only say "2 million images".
        counts={"train images": 1_742_289, "val images": 80_000},
        count=partial(_count_folders, {"train images": "train", "val images": "val"}),
        faults=partial(json_faults, OBJECTS365),
        smoke=detection_smoke.objects365,
    ),
    "openimages": Source(
        title="Open Images, object detection track of the 2019 challenge",
        home=(
            "https://storage.googleapis.com/openimages/web/challenge2019.html: the csv and json files of the "
            "detection track into challenge2019, the images into OpenImages/train and OpenImages/validation."
        ),
        layout=(*detection_smoke.OPEN_IMAGES_FILES, "OpenImages/train", "OpenImages/validation"),
        counts={"train images": 1_743_042, "validation images": 41_620, "classes": 500},
        count=_count_open_images,
        faults=open_images_faults,
        smoke=detection_smoke.open_images,
    ),
}
