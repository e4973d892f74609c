"""A head on dense maps, small enough for tests that compare whole networks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from gppf_ds.tasks.task import Head


class DenseHead(Head):
    """Two loss terms on the two finest maps, and one parameter that neither uses.

    The last layers get their gradient from other tasks alone, and the loss has no kink. The second target is a factor
    on one of the terms: 1, or nan on a device that is to fail.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, 2, 3, padding=1)
        self.unused = nn.Parameter(torch.ones(3))

    def loss(self, features: list[Tensor], targets: tuple[Any, float]) -> dict[str, Tensor]:
        return {"near": self.conv(features[1]).square().mean(), "far": features[0].square().mean() * targets[1]}

    def predict(self, features: list[Tensor], targets: Any) -> list[Tensor]:
        return list(self.conv(features[1]))
