"""Several feature maps for dense heads, from the one map of a plain backbone: the simple feature pyramid.

Source: Li, Mao, Girshick, He, "Exploring Plain Vision Transformer Backbones for Object Detection", ECCV 2022 (arXiv
2203.16527), section 3. The 1x1 and 3x3 convolutions that follow in the paper are those of the head's own neck.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from timm.layers import LayerNorm2d
from torch import Tensor, nn

from gppf_ds.tasks.task import FeatureInfo, Head, Task

BASE_STRIDE = 16
"""The stride that the pyramid starts from."""

STRIDES = (2, 4, 8, 16, 32)


def build_head(task: Task, features: FeatureInfo) -> Head:
    """The task's head, behind a pyramid where the backbone has a single map and the task wants several.

    Raises:
        UserError: the head cannot take these maps.
    """
    if len(features.strides) > 1 or not task.multi_scale:
        return task.build_head(features)
    return PyramidHead(task, features)


class PyramidHead(Head):
    """A simple feature pyramid and a task's head on its maps: 1/4 to 1/32, and 1/2 where the task wants it.

    Args:
        task: whose head to build.
        features: the one map of the backbone.

    Attributes:
        pyramid: the pyramid.
        head: the task's own head.
    """

    def __init__(self, task: Task, features: FeatureInfo) -> None:
        super().__init__()
        strides = tuple(stride for stride in STRIDES if stride >= task.min_stride)
        self.pyramid = SimpleFeaturePyramid(features.channels[0], features.strides[0], strides)
        self.head = task.build_head(self.pyramid.features)

    def loss(self, features: list[Tensor], targets: Any) -> dict[str, Tensor]:
        """The loss terms of the task's head."""
        return self.head.loss(self.pyramid(features[0]), targets)

    def predict(self, features: list[Tensor], targets: Any) -> list[Any]:
        """The predictions of the task's head."""
        return self.head.predict(self.pyramid(features[0]), targets)


class SimpleFeaturePyramid(nn.Module):
    """Parallel branches from one map: transposed convolutions to finer strides, max-pooling to coarser ones.

    Only layer norms: nothing here communicates, and a batch of one image is as good as any.

    Args:
        channels: of the map.
        patch: stride of the map. Another one than 16 (ViT patches of 8, 14 or 32 pixels) is resampled to 16 first.
        strides: of the maps to make, powers of two, finest first.

    Attributes:
        features: what :meth:`forward` returns; the channels halve with every doubling of the resolution.
    """

    def __init__(self, channels: int, patch: int, strides: tuple[int, ...]) -> None:
        super().__init__()
        self.patch = patch
        self.features = FeatureInfo(tuple(channels * min(s, BASE_STRIDE) // BASE_STRIDE for s in strides), strides)
        self.branches = nn.ModuleList(_branch(channels, stride) for stride in strides)

    def forward(self, x: Tensor) -> list[Tensor]:
        """(B, channels, h, w) -> maps (B, features.channels[i], H / strides[i], W / strides[i]).

        H and W are the image's where they are multiples of 32, as the dense tasks pad them. The head does not know the
        size of other images: they count as padded to whole patches, or as :func:`resample` takes them.
        """
        x = resample(x, self.patch)
        return [branch(x) for branch in self.branches]


def resample(x: Tensor, patch: int) -> Tensor:
    """Bilinear, from the grid of the patches (B, C, h, w) to that of stride 16, pixel for pixel in place.

    h patches may stand for any of ``patch`` image heights. The result has H / 16 rows if one of these heights is a
    multiple of 16, which it then is taken for; otherwise it has ceil(H / 16), which is the same for all of them.
    """
    if patch == BASE_STRIDE:
        return x
    height, width = ((side * patch - min(patch, BASE_STRIDE)) // BASE_STRIDE + 1 for side in x.shape[-2:])
    # A row and a column more, so that the last ones of the result are there; interpolation repeats edges likewise.
    x = F.pad(x, (0, 1, 0, 1), mode="replicate")
    # Given the factor, and not the size, torch keeps each place of the image where it was.
    x = F.interpolate(x, scale_factor=patch / BASE_STRIDE, mode="bilinear")
    return x[..., :height, :width]


def _branch(channels: int, stride: int) -> nn.Sequential:
    """From stride 16 to ``stride``; layer norm and GELU stand between transposed convolutions."""
    layers: list[nn.Module] = []
    current = BASE_STRIDE
    while current < stride:
        layers.append(nn.MaxPool2d(2, ceil_mode=True))
        current *= 2
    while current > stride:
        if layers:
            layers += [LayerNorm2d(channels), nn.GELU()]
        layers.append(nn.ConvTranspose2d(channels, channels // 2, 2, stride=2))
        channels //= 2
        current //= 2
    return nn.Sequential(*layers)
