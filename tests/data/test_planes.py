"""Planes of an image against numpy's transposition, for every view that pipelines make."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from gppf_ds.data.planes import to_planes

VIEWS: dict[str, Callable[[Any], Any]] = {
    "whole": lambda image: image,
    "cut": lambda image: image[3:40, 5:50],
    "flipped": lambda image: image[:, ::-1],
    "cut, then flipped": lambda image: image[3:40, 5:50][:, ::-1],
    "upside down": lambda image: image[::-1],
    "turned": lambda image: image[::-1, ::-1],
    "RGB from BGR": lambda image: image[..., ::-1],
    "flipped RGB from BGR": lambda image: image[:, ::-1, ::-1],
    "every other pixel": lambda image: image[::2, ::2],
    "on its side": lambda image: image.transpose(1, 0, 2),
    "planes already": lambda image: np.ascontiguousarray(image.transpose(2, 0, 1)).transpose(1, 2, 0),
    "one colour": lambda image: image[..., :1],
    "two colours": lambda image: image[..., :2],
    "one row": lambda image: image[:1],
    "one column, flipped": lambda image: image[:, :1][:, ::-1],
}


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("kind", ["uint8", "int16", "float32", "float64", "int64", "float16", ">u2", "bool"])
def test_planes_are_the_transposed_image(view: str, kind: Any) -> None:
    whole = np.random.default_rng(0).integers(0, 255, (48, 64, 3)).astype(kind)
    image = VIEWS[view](whole)
    before = image.copy()
    planes = to_planes(image)
    assert planes.flags.c_contiguous
    assert planes.dtype == kind
    assert np.array_equal(planes, image.transpose(2, 0, 1))
    assert np.array_equal(image, before)


@pytest.mark.parametrize("view", VIEWS)
def test_planes_go_where_they_shall(view: str) -> None:
    image = VIEWS[view](np.random.default_rng(1).integers(0, 255, (48, 64, 3), dtype=np.uint8))
    batch = np.zeros((3, image.shape[2], *image.shape[:2]), np.uint8)
    assert to_planes(image, batch[1]) is not None
    assert np.array_equal(batch[1], image.transpose(2, 0, 1))
    assert not batch[0].any()
    assert not batch[2].any()
