"""Licences of the public data sets, as their own pages state them. What is not here could not be confirmed there."""

from __future__ import annotations

from collections.abc import Mapping

_IMAGENET = "ImageNet terms of access: non-commercial research and educational purposes only"
_COCO_IMAGES = "images under Flickr's terms of use"
_KITTI = "CC BY-NC-SA 3.0"

LICENCES: Mapping[str, str] = {
    "imagenet21k": _IMAGENET,
    "imagenet1k": _IMAGENET,
    "cls_aircraft": "images for non-commercial research purposes only; their photographers hold the copyright",
    "cls_dtd": "made available for research purposes",
    "cls_food101": "images of Foodspotting: scientific fair use, all else is to be agreed with their owners",
    "cls_pets": "CC BY-SA 4.0; the owners of the images hold their copyright",
    "coco": f"annotations CC BY 4.0; {_COCO_IMAGES}",
    "lvis": f"annotations CC BY 4.0; {_COCO_IMAGES} (those of COCO)",
    "openimages": "annotations CC BY 4.0; images listed as CC BY 2.0",
    "uodb_kitti": _KITTI,
    "uodb_dota": "academic purposes only, no commercial use; images of Google Earth under its terms",
    "cocostuff164k": f"annotations CC BY 4.0; {_COCO_IMAGES}",
    "kitti_depth": _KITTI,
}
"""By the name that a task's ``source`` has."""
