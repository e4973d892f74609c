"""Detections as a file of COCO's format, which pycocotools and most annotation tools open."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image


def coco_content(found: Mapping[Path, Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """Images, the categories that were found, and an annotation with a ``score`` for every object.

    Args:
        found: by image file, the objects as detection describes them, with ``box`` as x1, y1, x2, y2 in pixels.

    Returns:
        Images and annotations are numbered from 1 in the order given, the id of a category is its label + 1, and
        ``bbox`` is x, y, width, height.
    """
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number, (path, objects) in enumerate(found.items(), 1):
        with Image.open(path) as image:
            width, height = image.size
        images.append({"id": number, "file_name": path.name, "width": width, "height": height})
        for one in objects:
            annotations.append({"id": len(annotations) + 1, "image_id": number, **_annotation(one)})
    names = {one["label"] + 1: one["class"] for objects in found.values() for one in objects}
    categories = [{"id": number, "name": names[number]} for number in sorted(names)]
    return {"images": images, "categories": categories, "annotations": annotations}


def _annotation(one: Mapping[str, Any]) -> dict[str, Any]:
    from pycocotools import mask as rle

    x1, y1, x2, y2 = one["box"]
    box, area = [x1, y1, x2 - x1, y2 - y1], (x2 - x1) * (y2 - y1)
    annotation = {"category_id": one["label"] + 1, "bbox": box, "area": area, "iscrowd": 0, "score": one["score"]}
    if "mask" in one:
        annotation["segmentation"] = one["mask"]
        annotation["area"] = float(rle.area({**one["mask"], "counts": one["mask"]["counts"].encode("ascii")}))
    return annotation


def write_coco(task: str, found: Mapping[Path, Sequence[Mapping[str, Any]]], folder: Path) -> Path:
    """Writes ``folder/TASK.coco.json``; see :func:`coco_content`."""
    target = folder / f"{task}.coco.json"
    target.write_text(json.dumps(coco_content(found)) + "\n")
    return target
