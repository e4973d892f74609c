"""The single-process reference of a SIMT run: plain PyTorch, every device in turn, nothing distributed.

It shares with the product only timm's modules, the schedule, the controller's routes and the heads.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def batch_norm(norm: nn.BatchNorm2d, xs: list[Tensor]) -> list[Tensor]:
    """Batch norm on the concatenation of all elements of all maps, whatever their shapes."""
    elements = torch.cat([x.transpose(0, 1).flatten(1) for x in xs], dim=1)
    mean, variance = elements.mean(1), elements.var(1, unbiased=False)
    with torch.no_grad():
        norm.running_mean.lerp_(mean, norm.momentum)
        norm.running_var.lerp_(elements.var(1), norm.momentum)
        norm.num_batches_tracked += 1

    def column(v: Tensor) -> Tensor:
        return v.view(1, -1, 1, 1)

    scale = norm.weight / torch.sqrt(variance + norm.eps)
    return [(x - column(mean)) * column(scale) + column(norm.bias) for x in xs]


def bottleneck(block: nn.Module, xs: list[Tensor]) -> list[Tensor]:
    """A ResNet bottleneck (or the stem) on the inputs of all devices that use it."""
    if isinstance(block, nn.Sequential):
        return [block.act1(y) for y in batch_norm(block.bn1, [block.conv1(x) for x in xs])]
    ys = [block.act1(y) for y in batch_norm(block.bn1, [block.conv1(x) for x in xs])]
    ys = [block.act2(y) for y in batch_norm(block.bn2, [block.conv2(y) for y in ys])]
    ys = batch_norm(block.bn3, [block.conv3(y) for y in ys])
    if block.downsample is not None:
        xs = batch_norm(block.downsample[1], [block.downsample[0](x) for x in xs])
    return [block.act3(x + y) for x, y in zip(xs, ys, strict=True)]


def features(layers: nn.ModuleList, images: list[Tensor], routes: list) -> list[list[Tensor]]:
    """The feature maps of every device; in hard mode only the chosen units run."""
    xs, maps = images, [[] for _ in images]
    for index, layer in enumerate(layers):
        xs = [layer.before(x) for x in xs]
        mixed = [torch.zeros(()) for _ in xs]
        for k, unit in enumerate(layer.units.values()):
            users = [d for d, r in enumerate(routes) if r.path is None or r.path[index] == k]
            if users:
                for d, y in zip(users, bottleneck(unit, [xs[d] for d in users]), strict=True):
                    mixed[d] = mixed[d] + routes[d].weights[index, k] * y
        xs = mixed
        if layer.tap is not None:
            for device_maps, x in zip(maps, xs, strict=True):
                device_maps.append(x)
    return maps
