"""The metrics of depth prediction, and the targets that heads and metrics of depth read."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# The part of a KITTI image, in shares of its height and width, that holds lidar points (Garg et al., ECCV 2016).
GARG_ROWS = (0.40810811, 0.99189189)
GARG_COLUMNS = (0.03594771, 0.96405229)


@dataclass
class DepthTargets:
    """Depth of a batch and the part of it that is no padding."""

    depth: Tensor
    """(B, H, W) metres, 0 = not measured."""
    sizes: list[tuple[int, int]]
    """(height, width) of each image before padding at the bottom and on the right."""
    mirrored: bool = False
    """Whether the images are there twice: all of them, then all of them flipped from left to right."""


class DepthMetric:
    """d1, d2, d3, abs_rel, sq_rel, rmse (metres), rmse_log, log10 and silog: per image, then the mean.

    The first seven are those of Eigen et al. (NIPS 2014); BTS adds log10 and silog, the standard deviation of the
    difference of the logarithms times 100.

    Pixels not measured or outside (min_depth, max_depth) do not count, nor do images without a pixel that counts.
    """

    NAMES = ("d1", "d2", "d3", "abs_rel", "sq_rel", "rmse", "rmse_log", "log10", "silog")

    def __init__(self, min_depth: float, max_depth: float, garg_crop: bool) -> None:
        self.min_depth = min_depth
        self.max_depth = max_depth
        self.garg_crop = garg_crop
        # The sum over the images of each metric, then their number.
        self._sums = torch.zeros(len(self.NAMES) + 1, dtype=torch.float64)

    def update(self, predictions: Sequence[Tensor], targets: DepthTargets) -> None:
        """Adds the predicted maps (H, W), in metres, of one batch."""
        for prediction, padded, (height, width) in zip(predictions, targets.depth.cpu(), targets.sizes, strict=True):
            depth = padded[:height, :width]
            valid = (depth > self.min_depth) & (depth < self.max_depth)
            if self.garg_crop:
                valid &= _garg_mask(height, width)
            if valid.any():
                errors = _errors(prediction[valid].double(), depth[valid].double())
                self._sums += torch.tensor([*errors, 1.0], dtype=torch.float64)

    def state(self) -> Tensor:
        """The sums and the number of images."""
        return self._sums

    def merge(self, states: Sequence[Tensor]) -> None:
        """Adds up the sums of all ranks."""
        self._sums = torch.stack(list(states)).sum(dim=0)

    def compute(self) -> dict[str, float]:
        """The means over the images; NaN where no image counted."""
        return dict(zip(self.NAMES, (self._sums[:-1] / self._sums[-1]).tolist(), strict=True))


def _errors(prediction: Tensor, depth: Tensor) -> list[float]:
    """The metrics of one image from its valid pixels (N,), in the order of their names."""
    ratio = torch.maximum(prediction / depth, depth / prediction)
    difference = prediction - depth
    logs = prediction.log() - depth.log()
    return [
        *(float((ratio < 1.25**power).double().mean()) for power in (1, 2, 3)),
        float((difference.abs() / depth).mean()),
        float((difference**2 / depth).mean()),
        math.sqrt(float((difference**2).mean())),
        math.sqrt(float((logs**2).mean())),
        float(logs.abs().mean()) / math.log(10),
        100 * float(logs.std(correction=0)),
    ]


def _garg_mask(height: int, width: int) -> Tensor:
    mask = torch.zeros(height, width, dtype=torch.bool)
    top, bottom = (int(share * height) for share in GARG_ROWS)
    left, right = (int(share * width) for share in GARG_COLUMNS)
    mask[top:bottom, left:right] = True
    return mask
