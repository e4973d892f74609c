"""One rank of step_overhead.py, which starts it."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import arms
import harness
import torch
import torch.distributed as dist

from gppf_ds.config import BackboneConfig, EngineConfig, OptimizerConfig, RunConfig
from gppf_ds.simt.job import start_distributed
from gppf_ds.tasks.bts import BTSDecoder
from gppf_ds.tasks.classification import ClassificationHead
from gppf_ds.tasks.depth import DepthHead, DepthTargets
from gppf_ds.tasks.task import Batch, FeatureInfo, Head

Tasks = Callable[[int, int], list[str]]
"""(number of the step, ranks) -> the task of every rank."""

CLASSES, MAX_DEPTH = 100, 20.0


@dataclass(frozen=True)
class Settings:
    """What the command line of step_overhead.py decides."""

    ranks: int
    steps: int
    warmup: int
    batch_size: int
    image_size: int
    options: dict[str, Any]


def heads(features: FeatureInfo) -> dict[str, Head]:
    """The product's own: one light, one dense."""
    decoder = BTSDecoder(features, 32, MAX_DEPTH)
    return {
        "classification": ClassificationHead(features.channels[-1], CLASSES, 0.0),
        "depth": DepthHead(decoder, 1e-3, MAX_DEPTH, 0.85),
    }


def batches(settings: Settings, device: torch.device) -> dict[str, Batch]:
    """This rank's batch of each task, the same in every step."""
    torch.manual_seed(dist.get_rank())
    count, side = settings.batch_size, settings.image_size
    images = torch.randn(count, 3, side, side, device=device)
    depth = 0.5 + (MAX_DEPTH - 1) * torch.rand(count, side, side, device=device)
    return {
        "classification": Batch(images, torch.randint(CLASSES, (count,), device=device)),
        "depth": Batch(images, DepthTargets(depth, [(side, side)] * count)),
    }


def mixed(number: int, ranks: int) -> list[str]:
    """Neighbours run different tasks, and every rank changes its task from step to step."""
    return [("classification", "depth")[(rank + number) % 2] for rank in range(ranks)]


def single(number: int, ranks: int) -> list[str]:
    """The light task, beside which an overhead shows most."""
    return ["classification"] * ranks


class Bench:
    """The comparisons of one rank."""

    def __init__(self, settings: Settings, device: torch.device) -> None:
        self.settings = settings
        self.device = device
        self.data = batches(settings, device)
        self.config = RunConfig(
            output="unused",
            steps=10**6,
            backbone=BackboneConfig(options=settings.options),
            optimizer=OptimizerConfig(learning_rate=1e-3),
            engine=EngineConfig(precision="fp32"),
        )

    def compare(
        self, theirs: Callable[..., arms.Arm], tasks: Tasks, stage: arms.Stage, only: str | None, clip: float = 0.0
    ) -> dict[str, Any]:
        """Ours against theirs: step times, their ratio, memory.

        Args:
            theirs: the class of the other arm.
            tasks: what the ranks run.
            stage: of ZeRO, in both arms.
            only: the one task that the network has a head for; None for both.
            clip: the largest norm of the gradient; 0 for any.
        """
        optimizer = replace(self.config.optimizer, clip_norm=clip)
        config = replace(self.config, optimizer=optimizer, engine=replace(self.config.engine, zero_stage=stage))

        def own_heads(features: FeatureInfo) -> Mapping[str, Head]:
            return {name: head for name, head in heads(features).items() if only in (None, name)}

        steps: dict[str, Callable[[int], None]] = {}
        memory: dict[str, float] = {}
        for name, kind in {"ours": arms.Simt, "theirs": theirs}.items():
            before = harness.allocated(self.device)
            arm: arms.Arm = kind(config, own_heads, self.device)
            steps[name] = self._stepper(arm, tasks)
            for number in range(2):  # optimizer state and gradient buckets appear in the first steps
                steps[name](number)
            memory[name] = harness.most_memory(arm.module, partial(_two_more, steps[name]), self.device, before)
        seconds = harness.interleaved(steps, self.device, self.settings.warmup, self.settings.steps)
        ratios = [a / b for a, b in zip(seconds["ours"], seconds["theirs"], strict=True)]
        result: dict[str, Any] = {"ratio": harness.spread(ratios)}
        for name in steps:
            result[name] = {"seconds": harness.spread(seconds[name]), "memory": memory[name]}
        return result

    def _stepper(self, arm: arms.Arm, tasks: Tasks) -> Callable[[int], None]:
        def step(number: int) -> None:
            everyone = tasks(number, self.settings.ranks)
            arm.step(number, everyone, self.data[everyone[dist.get_rank()]])

        return step


def _two_more(step: Callable[[int], None]) -> None:
    """Steps in which every rank runs both tasks."""
    for number in (2, 3):
        step(number)


def main() -> None:
    """Runs all comparisons with the settings in the argument, a json object."""
    settings = Settings(**json.loads(sys.argv[1]))
    device = start_distributed(harness.COLLECTIVE_LIMIT)
    bench = Bench(settings, device)
    one = "classification"
    comparisons = {
        "mixed tasks, DDP": bench.compare(arms.Ddp, mixed, 0, None),
        "mixed tasks, clipped, DDP": bench.compare(arms.Ddp, mixed, 0, None, clip=1.0),
        "one task, DeepSpeed ZeRO-0": bench.compare(arms.PlainDeepSpeed, single, 0, one),
        "one task, DeepSpeed ZeRO-1": bench.compare(arms.PlainDeepSpeed, single, 1, one),
    }
    harness.hand_over({"comparisons": comparisons, "memory": harness.MEMORY[device.type]})
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
