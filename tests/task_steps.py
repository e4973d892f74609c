"""What tests do with a task: maps to feed its head, batches as workers send them, evaluation."""

from __future__ import annotations

import pickle
from collections.abc import Iterable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gppf_ds.data.source import Source
from gppf_ds.tasks.task import Batch, FeatureInfo, Head, Split, Task

CPU = torch.device("cpu")


class Stages(nn.Module):
    """A backbone of one strided convolution per map."""

    def __init__(self, info: FeatureInfo) -> None:
        super().__init__()
        channels, strides = pairwise((3, *info.channels)), pairwise((1, *info.strides))
        self.stages = nn.ModuleList(
            nn.Conv2d(a, b, after // before + 1 | 1, stride=after // before, padding=after // before // 2)
            for (a, b), (before, after) in zip(channels, strides, strict=True)
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        maps = []
        for stage in self.stages:
            x = F.relu(stage(x))
            maps.append(x)
        return maps


def batch_of(task: Task, split: Split, training: bool, indices: Iterable[int] = (0, 1)) -> Batch:
    """A batch on the CPU, after the way that it takes from a worker process."""
    samples = task.dataset(split)
    raw = pickle.loads(pickle.dumps(task.collate([samples[index] for index in indices])))
    return task.preprocess(raw, CPU, training)


def features_of(backbone: nn.Module, images: Tensor) -> list[Tensor]:
    """The maps as leaves of the graph, as heads get them in training."""
    return [x.detach().requires_grad_() for x in backbone(images)]


def evaluated(task: Task, head: Head, backbone: nn.Module, indices: Iterable[int]) -> dict[str, Any]:
    """The metrics of these val images, given one by one."""
    metric = task.metric()
    head.eval()
    for index in indices:
        batch = batch_of(task, "val", False, [index])
        with torch.no_grad():
            metric.update(head.predict(list(backbone(batch.images)), batch.targets), batch.targets)
    return metric.compute()


def smoke_roots(factory: pytest.TempPathFactory, sources: Mapping[str, Source]) -> dict[str, Path]:
    """A folder with the smoke set of every source."""
    roots = {name: factory.mktemp(name) for name in sources}
    for name, source in sources.items():
        source.smoke(roots[name])
    return roots
