"""Sliding windows over an image, as mmseg's ``test_cfg.mode = "slide"`` places them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gppf_ds.errors import UserError

Size = tuple[int, int]
"""(height, width) in pixels."""


@dataclass(frozen=True)
class Windows:
    """Windows of one size; the last of a row or column is moved back so that it ends with the image.

    Raises:
        UserError: windows that leave gaps.
    """

    size: Size
    stride: Size

    def __post_init__(self) -> None:
        if not all(0 < step <= side for step, side in zip(self.stride, self.size, strict=True)):
            raise UserError(
                f"Sliding windows of {self.size} (height, width) cannot have the stride {self.stride}: "
                "set model.test_cfg.stride to 1 or more and to crop_size at most."
            )

    def places(self, image: Size) -> list[tuple[int, int]]:
        """(top, left) of every window on an image that is at least as large as a window, row by row."""
        starts: list[list[int]] = []
        for side, step, length in zip(self.size, self.stride, image, strict=True):
            count = -(-(length - side) // step) + 1
            starts.append([min(index * step, length - side) for index in range(count)])
        tops, lefts = starts
        return [(top, left) for top in tops for left in lefts]

    def cut(self, image: Tensor) -> Tensor:
        """(C, H, W) -> (number of windows, C, *size)."""
        height, width = self.size
        corners = self.places((image.shape[-2], image.shape[-1]))
        return torch.stack([image[:, top : top + height, left : left + width] for top, left in corners])

    def join(self, parts: Tensor, image: Size) -> Tensor:
        """(number of windows, C, *size) -> (C, H, W), float32: the mean of the windows that a pixel lies in."""
        height, width = self.size
        total = torch.zeros(parts.shape[1], *image, device=parts.device)
        count = torch.zeros(image, device=parts.device)
        for part, (top, left) in zip(parts, self.places(image), strict=True):
            total[:, top : top + height, left : left + width] += part
            count[top : top + height, left : left + width] += 1
        return total / count


def windows_of(test_cfg: Any) -> Windows | None:
    """The sliding windows of a segmentor's ``test_cfg``; None where it takes the whole image at once."""
    if not test_cfg or test_cfg.get("mode", "whole") == "whole":
        return None
    try:
        return Windows(tuple(test_cfg["crop_size"]), tuple(test_cfg["stride"]))
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"model.test_cfg ({dict(test_cfg)}) needs the mode whole, or slide with crop_size and stride, both as "
            "(height, width)."
        ) from error
