"""A repair of timm's augmentation: from Pillow 13 on, posterize to 0 bits is an error and not a black image."""

from __future__ import annotations

from itertools import chain
from typing import Any

from PIL import Image
from timm.data import auto_augment


def mend(transform: Any) -> Any:
    """The composed transform with all posterize operations of RandAugment, AutoAugment or AugMix replaced, in place."""
    for step in transform.transforms:
        for operation in chain(getattr(step, "ops", ()), *getattr(step, "policy", ())):
            if operation.aug_fn is auto_augment.posterize:
                operation.aug_fn = posterize
    return transform


def posterize(image: Image.Image, bits_to_keep: int, **options: Any) -> Image.Image:
    """As timm's, but that 0 bits, which its policies draw at the highest level, leave black."""
    if bits_to_keep > 0:
        posterized: Image.Image = auto_augment.posterize(image, bits_to_keep, **options)
        return posterized
    return Image.new(image.mode, image.size)
