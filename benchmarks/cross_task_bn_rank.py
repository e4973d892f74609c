"""One rank of cross_task_bn.py, which starts it."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import harness
import torch
import torch.distributed as dist
from torch import Tensor, nn

from gppf_ds.backbone.controller import Controller
from gppf_ds.backbone.lego import LegoBackbone, Pass
from gppf_ds.backbone.norm import BatchNormRule, NormPolicy
from gppf_ds.config import BackboneConfig
from gppf_ds.simt.job import start_distributed


@dataclass(frozen=True)
class Settings:
    """What the command line of cross_task_bn.py decides."""

    ranks: int
    steps: int
    warmup: int
    batch_size: int
    image_size: int
    units: int
    options: dict[str, Any]


def local(norms: Sequence[nn.BatchNorm2d], lanes: Sequence[tuple[int, Tensor]]) -> list[Tensor]:
    """torch's own batch norm, each device's by itself: nothing is sent."""
    return [nn.BatchNorm2d.forward(norms[slot], x) for slot, x in lanes]


class Network:
    """A lego backbone in training, and the devices of this rank.

    Args:
        settings: of the benchmark.
        devices: of this rank.
        batch_norm: what batch norms do.
        synchronised: whether they are torch.nn.SyncBatchNorm instead.
        device: of this rank.
    """

    def __init__(
        self, settings: Settings, devices: int, batch_norm: BatchNormRule, synchronised: bool, device: torch.device
    ) -> None:
        self.backbone = LegoBackbone(BackboneConfig(options=settings.options, units=settings.units))
        norms = sum(isinstance(module, nn.BatchNorm2d) for module in self.backbone.modules())
        self.positions = norms // settings.units
        if synchronised:
            nn.SyncBatchNorm.convert_sync_batchnorm(self.backbone)
        self.backbone.to(device).train()
        self.controller = Controller(["task"], self.backbone.units).to(device)
        self.batch_norm = batch_norm
        torch.manual_seed(dist.get_rank())
        shape = (settings.batch_size, 3, settings.image_size, settings.image_size)
        self.images = [torch.randn(shape, device=device) for _ in range(devices)]

    def forward(self, number: int) -> Tensor:
        """The sum of the devices' losses."""
        passes = []
        for index, images in enumerate(self.images):
            noise = self.controller.noise(0, number, dist.get_rank() * len(self.images) + index)
            frozen = self.controller.frozen
            route = self.controller.fixed_route("task") if frozen else self.controller.soft_route("task", noise, 1.0)
            passes.append(Pass(images, route))
        maps = self.backbone(passes, self.batch_norm)
        return torch.stack([own[-1].float().square().mean() for own in maps]).sum()

    def step(self, number: int) -> None:
        """Forward and backward."""
        self.forward(number).backward()
        self.backbone.zero_grad()
        self.controller.zero_grad()

    def collectives(self) -> dict[str, float]:
        """Started in forward and in backward, for every batch-norm position of the network."""
        losses: list[Tensor] = []
        forward = _count(lambda: losses.append(self.forward(0)))
        backward = _count(losses[0].backward)
        self.backbone.zero_grad()
        self.controller.zero_grad()
        return {"forward": forward / self.positions, "backward": backward / self.positions}


def _count(work: Callable[[], None]) -> int:
    """The collectives that ``work`` starts: ours are all-reduces, torch's SyncBatchNorm gathers in forward."""
    with (
        patch.object(dist, "all_reduce", wraps=dist.all_reduce) as sums,
        patch.object(dist, "all_gather_into_tensor", wraps=dist.all_gather_into_tensor) as gathers,
    ):
        work()
    return int(sums.call_count + gathers.call_count)


def measure(settings: Settings, devices: int, device: torch.device) -> dict[str, Any]:
    """Seconds of every step of every arm, on its slowest rank, and its collectives."""
    arms = {
        "none (torch.nn.BatchNorm2d)": Network(settings, devices, local, False, device),
        "ours, norm_sync none": Network(settings, devices, NormPolicy(synchronise=False), False, device),
        "ours": Network(settings, devices, NormPolicy(), False, device),
    }
    if device.type == "cuda":
        arms["torch.nn.SyncBatchNorm"] = Network(settings, devices, local, True, device)
    steps = {name: arm.step for name, arm in arms.items()}
    seconds = harness.interleaved(steps, device, settings.warmup, settings.steps)
    return {name: {"seconds": seconds[name], "collectives": arm.collectives()} for name, arm in arms.items()}


def main() -> None:
    """Runs all arms with one and with two devices per rank; the argument, a json object, has the settings."""
    settings = Settings(**json.loads(sys.argv[1]))
    device = start_distributed(harness.COLLECTIVE_LIMIT)
    harness.hand_over({str(devices): measure(settings, devices, device) for devices in (1, 2)})
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
