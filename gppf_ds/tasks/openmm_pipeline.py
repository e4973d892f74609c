"""Pipelines of mmdet and mmseg as their configurations have them, safer and faster: the samples stay the same."""

from __future__ import annotations

from typing import Any

import numpy as np

from gppf_ds.data.planes import to_planes
from gppf_ds.errors import SampleError

PACKERS = ("PackDetInputs", "PackSegInputs")
"""The last transforms of pipelines: they bring the image from (H, W, C) to a tensor (C, H, W)."""


class ReadGuard:
    """A transform that reads a file: whatever fails in it is a :class:`SampleError` that names ``sample[key]``."""

    def __init__(self, transform: dict[str, Any], key: str) -> None:
        from mmengine.registry import TRANSFORMS

        self.transform = TRANSFORMS.build(transform)
        self.key = key

    def __call__(self, sample: dict[str, Any]) -> Any:
        try:
            return self.transform(sample)
        except Exception as error:
            raise SampleError(f"{sample.get(self.key)} cannot be read ({error}).") from error


class PackPlanes:
    """A packing transform that gets an image of the same shape whose planes lie one after another: nothing to copy."""

    def __init__(self, transform: dict[str, Any]) -> None:
        from mmengine.registry import TRANSFORMS

        self.transform = TRANSFORMS.build(transform)

    def __call__(self, sample: dict[str, Any]) -> Any:
        image = sample.get("img")
        if isinstance(image, np.ndarray) and image.ndim == 3:
            sample["img"] = to_planes(image).transpose(1, 2, 0)
        return self.transform(sample)


def adapted(node: Any, readers: dict[str, str]) -> Any:
    """A copy of a data set's configuration whose pipelines do what theirs do.

    Reading is guarded, packing finds the image as planes, and mmseg's random crop counts classes in a fast way. Runs in
    :func:`gppf_ds.tasks.openmm.scope`.

    Args:
        node: the configuration or a part of it.
        readers: the transforms that read files, and the key of the path that each reads.
    """
    if isinstance(node, list | tuple):
        return type(node)(adapted(child, readers) for child in node)
    if not isinstance(node, dict):
        return node
    kind = str(node.get("type", "")).rpartition(".")[2]
    if kind in readers:
        return {"type": ReadGuard, "transform": dict(node), "key": readers[kind]}
    if kind in PACKERS:
        return {"type": PackPlanes, "transform": dict(node)}
    changed = {key: adapted(value, readers) for key, value in node.items()}
    if kind == "RandomCrop" and (faster := _counting_crop(node["type"])) is not None:
        changed["type"] = faster
    return changed


def _counting_crop(kind: Any) -> type | None:
    """The faster class for the transform of this name, if that is mmseg's own."""
    from mmengine.registry import TRANSFORMS

    found = kind
    if isinstance(kind, str):
        with TRANSFORMS.switch_scope_and_registry(None) as registry:
            found = registry.get(kind)
    if getattr(found, "__module__", None) != "mmseg.datasets.transforms.transforms":
        return None
    from gppf_ds.tasks.mmseg_crop import CountingCrop

    return CountingCrop
