"""Small images for a smoke run of an mmdet or mmseg configuration: the same transforms with smaller sizes."""

from __future__ import annotations

from typing import Any

from gppf_ds.tasks.openmm import walk

SHORT_SIDE = 128
"""Pixels of the shorter side of what a transform produces."""

_SIZE_KEYS = ("scale", "scales", "img_scale", "img_scales", "size", "crop_size", "stride", "max_size")


def shrink_sizes(cfg: Any) -> None:
    """Scales every image size of the pipelines, the data preprocessor and ``test_cfg`` down to :data:`SHORT_SIDE`.

    A size is a number of pixels or a pair of them; a pair keeps its aspect ratio (1333 x 800 becomes 213 x 128), and
    sizes that are small already stay.

    Args:
        cfg: a configuration (``mmengine.Config``), changed in place.
    """
    parts = [cfg.train_dataloader.dataset, cfg.val_dataloader.dataset]
    parts += [cfg.model.data_preprocessor, cfg.model.get("test_cfg") or {}]
    for node in walk(parts):
        for key in _SIZE_KEYS:
            if key in node:
                node[key] = _smaller(node[key])


def _smaller(value: Any) -> Any:
    if isinstance(value, int):
        return min(value, SHORT_SIDE)
    if not isinstance(value, list | tuple):
        return value
    if len(value) == 2 and all(isinstance(side, int) for side in value):
        factor = min(1.0, SHORT_SIDE / max(1, min(value)))
        return tuple(round(side * factor) for side in value)
    return type(value)(_smaller(entry) for entry in value)
