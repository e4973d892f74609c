"""The BTS depth decoder: dense ASPP, skip connections and multi-scale local planar guidance.

Source: Lee, Han, Ko, Suh, "From Big to Small: Multi-Scale Local Planar Guidance for Monocular Depth Estimation",
arXiv 1907.10326, section 3. What the paper leaves open is decided here and says so.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from gppf_ds.errors import UserError
from gppf_ds.tasks.task import FeatureInfo

GUIDANCE_STRIDE = 8
"""The dense ASPP and the coarsest local planar guidance work at 1/8 of the input's resolution."""

DILATIONS = (3, 6, 12, 18, 24)

# Our bound on the tilt of a plane: up to 50 degrees the denominator of the ray-plane intersection stays
# above 0.1 anywhere in a patch, so a depth cannot pass through infinity: cos(50) - sin(50) * sqrt(0.5) = 0.101.
MAX_TILT = math.radians(50)


def local_planar_guidance(plane: Tensor, size: int) -> Tensor:
    """The depth at which each pixel's ray meets the plane of its patch.

    A patch of ``size`` x ``size`` pixels has one plane (n1, n2, n3, n4); the pixel at patch coordinates (u, v) sees it
    at n4 / (n1 u + n2 v + n3). The coordinates are those of the pixel's centre, in patch sides from the patch's centre.

    Args:
        plane: (B, 4, H, W), the unit normal and the distance from the origin.
        size: side of a patch in pixels.

    Returns:
        Depth (B, 1, size * H, size * W), in the unit of the distance.
    """
    plane = plane.repeat_interleave(size, dim=2).repeat_interleave(size, dim=3)
    centres = (torch.arange(size, device=plane.device, dtype=plane.dtype) + 0.5) / size - 0.5
    height, width = plane.shape[-2:]
    v = centres.repeat(height // size)[:, None]
    u = centres.repeat(width // size)[None, :]
    n1, n2, n3, n4 = plane.unbind(dim=1)
    return (n4 / (n1 * u + n2 * v + n3)).unsqueeze(1)


class PlaneEstimator(nn.Module):
    """1x1 convolutions down to (theta, phi, distance) of one plane per pixel, then local planar guidance.

    Returns depth (B, 1, size * H, size * W) in (0, about 10), in shares of the largest depth.
    """

    def __init__(self, channels: int, size: int) -> None:
        super().__init__()
        self.reduce = _reduction(channels, 3)
        self.size = size

    def forward(self, features: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, 1, size * H, size * W)."""
        # In half precision neighbouring angles would fall together.
        theta, phi, distance = self.reduce(features).float().sigmoid().unbind(dim=1)
        theta, phi = theta * MAX_TILT, phi * (2 * math.pi)
        normal = (theta.sin() * phi.cos(), theta.sin() * phi.sin(), theta.cos())
        return local_planar_guidance(torch.stack([*normal, distance], dim=1), self.size).to(features.dtype)


class DenseASPP(nn.Module):
    """Dilated convolutions that each see the input and all results of smaller dilation."""

    def __init__(self, channels: int, growth: int) -> None:
        super().__init__()
        inputs = [channels + i * growth for i in range(len(DILATIONS) + 1)]
        self.branches = nn.ModuleList(
            nn.Sequential(
                nn.BatchNorm2d(width),
                nn.ReLU(),
                nn.Conv2d(width, 2 * growth, 1, bias=False),
                nn.BatchNorm2d(2 * growth),
                nn.ReLU(),
                nn.Conv2d(2 * growth, growth, 3, padding=dilation, dilation=dilation, bias=False),
            )
            for width, dilation in zip(inputs[:-1], DILATIONS, strict=True)
        )
        self.fuse = _conv(inputs[-1], growth)

    def forward(self, features: Tensor) -> Tensor:
        """(B, channels, H, W) -> (B, growth, H, W)."""
        for branch in self.branches:
            features = torch.cat([features, branch(features)], dim=1)
        return self.fuse(features)


class Up(nn.Module):
    """Doubles the resolution and fuses the features with what is there already."""

    def __init__(self, channels: int, width: int, extra: int) -> None:
        super().__init__()
        self.upconv = _upconv(channels, width)
        self.fuse = _conv(width + extra, width)

    def forward(self, features: Tensor, extras: list[Tensor]) -> Tensor:
        """(B, channels, H, W) and maps with ``extra`` channels in all, at (2H, 2W) -> (B, width, 2H, 2W)."""
        return self.fuse(torch.cat([self.upconv(features), *extras], dim=1))


class BTSDecoder(nn.Module):
    """Backbone maps -> depth at the input's resolution, whose sides must be multiples of the coarsest stride.

    From the coarsest map up to 1/8, dense ASPP there, then planes at 1/8, 1/4 and 1/2; each guidance goes on to the
    next finer stage, and all of them meet in the last convolutions. The backbone's map of a stride is the skip
    connection of that stride; a stride without a map has none.

    Args:
        features: the backbone's maps; the coarsest stride is a power of two from 8 on.
        width: channels of the coarsest stage, a multiple of 16 (paper: 512); later stages have fewer.
        max_depth: the largest depth, in metres.

    Raises:
        UserError: the strides or the width do not fit.
    """

    def __init__(self, features: FeatureInfo, width: int, max_depth: float) -> None:
        super().__init__()
        if width < 16 or width % 16:
            raise UserError(f"head_channels must be a multiple of 16, not {width}.")
        coarsest = features.strides[-1]
        if coarsest < GUIDANCE_STRIDE or coarsest & (coarsest - 1):
            raise UserError(f"The depth head needs a map of stride 8, 16 or 32, but the backbone ends at {coarsest}.")
        self.strides = features.strides
        self.max_depth = max_depth
        skips = dict(zip(features.strides, features.channels, strict=True))

        channels, stride = features.channels[-1], coarsest
        self.context = nn.ModuleDict()
        while stride > GUIDANCE_STRIDE:
            stride //= 2
            stage_width = width if stride > GUIDANCE_STRIDE else width // 2
            self.context[str(stride)] = Up(channels, stage_width, skips.get(stride, 0))
            channels = stage_width
        self.aspp = DenseASPP(channels, width // 4)
        self.planes8 = PlaneEstimator(width // 4, 8)
        self.up4 = Up(width // 4, width // 4, skips.get(4, 0) + 1)
        self.planes4 = PlaneEstimator(width // 4, 4)
        self.up2 = Up(width // 4, width // 8, skips.get(2, 0) + 1)
        self.planes2 = PlaneEstimator(width // 8, 2)
        self.up1 = _upconv(width // 8, width // 16)
        self.pixels = nn.Sequential(_reduction(width // 16, 1), nn.Sigmoid())
        self.fuse = nn.Sequential(_conv(width // 16 + 4, width // 16), nn.Conv2d(width // 16, 1, 3, padding=1))

    def forward(self, features: list[Tensor]) -> Tensor:
        """Depth in metres (B, 1, H, W), float32, in (0, max_depth)."""
        skips = {stride: [feature] for stride, feature in zip(self.strides, features, strict=True)}
        context = features[-1]
        for stride, up in self.context.items():
            context = up(context, skips.get(int(stride), []))
        context = self.aspp(context)
        guide8 = self.planes8(context)
        quarter = self.up4(context, [*skips.get(4, []), guide8[:, :, ::4, ::4]])
        guide4 = self.planes4(quarter)
        half = self.up2(quarter, [*skips.get(2, []), guide4[:, :, ::2, ::2]])
        guide2 = self.planes2(half)
        full = self.up1(half)
        share = self.fuse(torch.cat([full, self.pixels(full), guide2, guide4, guide8], dim=1))
        return share.float().sigmoid() * self.max_depth


def _conv(channels: int, width: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(channels, width, 3, padding=1), nn.ELU())


def _upconv(channels: int, width: int) -> nn.Sequential:
    """Nearest neighbour and a convolution instead of a deconvolution."""
    return nn.Sequential(nn.Upsample(scale_factor=2), _conv(channels, width), nn.BatchNorm2d(width))


def _reduction(channels: int, outputs: int) -> nn.Sequential:
    """1x1 convolutions that halve the channels down to ``outputs``."""
    layers: list[nn.Module] = []
    while channels // 2 > outputs:
        layers += [nn.Conv2d(channels, channels // 2, 1), nn.ELU()]
        channels //= 2
    return nn.Sequential(*layers, nn.Conv2d(channels, outputs, 1))
