"""One rank of usual_ways.py, which starts it."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import arms
import harness
import torch
import torch.distributed as dist
from step_overhead_rank import Settings, batches, heads, mixed
from usual_ways import STEPS

from gppf_ds.config import BackboneConfig, EngineConfig, OptimizerConfig, RunConfig, ScheduleConfig
from gppf_ds.simt.job import start_distributed

Step = Callable[[int], None]
"""One optimizer step, given its number."""


class Bench:
    """The arms of one rank."""

    def __init__(self, settings: Settings, device: torch.device) -> None:
        self.ranks = settings.ranks
        self.device = device
        self.data = batches(settings, device)
        self.halves = batches(replace(settings, batch_size=settings.batch_size // 2), device)
        self.config = RunConfig(
            output="unused",
            steps=10**6,
            backbone=BackboneConfig(options=settings.options),
            optimizer=OptimizerConfig(learning_rate=1e-3),
            engine=EngineConfig(precision="fp32"),
        )

    def builders(self) -> dict[str, Callable[[], tuple[torch.nn.Module, Step]]]:
        """What builds each arm."""
        return {
            "DDP, find_unused_parameters=True": partial(self._mixed, arms.Ddp),
            "DDP, dummy loss": partial(self._mixed, partial(arms.Ddp, dummy=True)),
            "DDP, one task per iteration": self._alternating,
            "DDP, every task in every step": self._every_task,
            "ours": partial(self._mixed, arms.Simt),
            "ours, 2 devices per rank, batches / 2": self._balanced,
            "ours, every task in every step": self._accumulate,
        }

    def _mixed(self, kind: Callable[..., arms.Arm]) -> tuple[torch.nn.Module, Step]:
        """Neighbouring ranks run different tasks, and change them in every step."""
        arm = kind(self.config, heads, self.device)

        def step(number: int) -> None:
            tasks = mixed(number, self.ranks)
            arm.step(number, tasks, self.data[tasks[dist.get_rank()]])

        return arm.module, step

    def _alternating(self) -> tuple[torch.nn.Module, Step]:
        arm = arms.OneTaskDdp(self.config, heads, self.device)

        def step(number: int) -> None:
            task = list(self.data)[number % len(self.data)]
            arm.step(number, [task] * self.ranks, self.data[task])

        return arm.module, step

    def _every_task(self) -> tuple[torch.nn.Module, Step]:
        arm = arms.EveryTaskDdp(self.config, heads, self.device)
        return arm.module, lambda number: arm.step_tasks(number, self.data)

    def _balanced(self) -> tuple[torch.nn.Module, Step]:
        """What a balanced schedule comes to: every rank has both tasks, and as many images in a step as before."""
        config = replace(self.config, engine=replace(self.config.engine, devices_per_rank=2))
        arm = arms.Simt(config, heads, self.device)
        return arm.module, lambda number: arm.step_devices(number, [*self.halves] * self.ranks, [*self.halves.values()])

    def _accumulate(self) -> tuple[torch.nn.Module, Step]:
        engine, schedule = replace(self.config.engine, devices_per_rank=2), ScheduleConfig(kind="accumulate")
        arm = arms.Simt(replace(self.config, engine=engine, schedule=schedule), heads, self.device)
        return arm.module, lambda number: arm.step_devices(number, [*self.data] * self.ranks, [*self.data.values()])


def measure(bench: Bench, warmup: int, rounds: int) -> dict[str, Any]:
    """Seconds of every round of every arm, on its slowest rank, and the memory of each arm."""
    steps: dict[str, Step] = {}
    memory: dict[str, float] = {}
    for name, build in bench.builders().items():
        before = harness.allocated(bench.device)
        module, step = build()
        steps[name] = partial(_round, step, STEPS[name])
        for number in range(2):  # optimizer state and gradient buckets appear in the first steps
            steps[name](number)
        memory[name] = harness.most_memory(module, partial(steps[name], 2), bench.device, before)
    seconds = harness.interleaved(steps, bench.device, warmup, rounds)
    return {name: {"seconds": seconds[name], "memory": memory[name]} for name in steps}


def _round(step: Step, count: int, number: int) -> None:
    """The optimizer steps after which every rank has had its batch of both tasks once."""
    for one in range(count):
        step(count * number + one)


def main() -> None:
    """Runs all arms with the settings in the argument, a json object."""
    settings = Settings(**json.loads(sys.argv[1]))
    device = start_distributed(harness.COLLECTIVE_LIMIT)
    found = measure(Bench(settings, device), settings.warmup, settings.steps)
    harness.hand_over({"arms": found, "memory": harness.MEMORY[device.type]})
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
