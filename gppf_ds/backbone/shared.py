"""Several paths over the same images: what they have in common, from the first layer on, runs once.

Paths that begin alike form a tree, whose nodes are the units to run. Where they part once, they stay apart: the same
unit behind different maps gives different maps.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from gppf_ds.backbone.controller import Route
from gppf_ds.backbone.lego import LegoBackbone, LegoLayer, Pass
from gppf_ds.backbone.norm import NormPolicy

_Branch = tuple[int, list[str], Tensor]
"""The layer to run next, the tasks that run the same unit there, and their common map."""


def units_run(paths: Iterable[Sequence[int]]) -> int:
    """How many units :func:`shared_forward` runs for these paths: one for each of their different beginnings."""
    return len({tuple(path[: end + 1]) for path in paths for end in range(len(path))})


@torch.no_grad()
def shared_forward(
    backbone: LegoBackbone, images: Tensor, paths: Mapping[str, Sequence[int]], sizes: Tensor | None = None
) -> dict[str, list[Tensor]]:
    """The feature maps of every path over the same images, equal to those of each path run alone.

    A map is let go as soon as no branch needs it: one branch is followed to its end before the next one starts.

    Args:
        backbone: in evaluation mode (in training, batch norm couples whatever runs together).
        images: (B, 3, H, W).
        paths: the unit of every layer, by task.
        sizes: of the images before they were padded, see :class:`gppf_ds.backbone.lego.Pass`.

    Returns:
        By task, the maps (B, channels[i], H / strides[i], W / strides[i]), finest first. Tasks that share a prefix
        share its tensors, so a head must not write into them (nor could it be trained: there they are leaves).

    Raises:
        ValueError: the backbone is in training mode.
    """
    if backbone.training:
        raise ValueError("paths are shared in evaluation mode only: call backbone.eval() first.")
    height, width = images.shape[-2:]
    weights = torch.ones(len(backbone.layers), max(backbone.units), device=images.device)
    features: dict[str, list[Tensor]] = {task: [] for task in paths}
    waiting = _part(backbone, paths, list(paths), 0, images)
    while waiting:
        index, tasks, x = waiting.pop()
        layer = backbone.layers[index]
        assert isinstance(layer, LegoLayer)
        route = Route(weights, tuple(paths[tasks[0]]), tasks[0])
        x, *_ = layer([Pass(images, route, sizes=sizes)], NormPolicy(), x)
        if layer.tap is not None:
            feature = layer.tap.as_map(x, (height, width))
            for task in tasks:
                features[task].append(feature)
        if index + 1 < len(backbone.layers):
            waiting += _part(backbone, paths, tasks, index + 1, x)
    return features


def _part(
    backbone: LegoBackbone, paths: Mapping[str, Sequence[int]], tasks: Sequence[str], layer: int, x: Tensor
) -> list[_Branch]:
    """The tasks by the unit that they run in this layer; where tokens choose experts, each task by itself."""
    branches: dict[tuple[int, str], list[str]] = {}
    for task in tasks:
        alone = task if backbone.layers[layer].moe_parts else ""
        branches.setdefault((paths[task][layer], alone), []).append(task)
    return [(layer, together, x) for together in branches.values()]
