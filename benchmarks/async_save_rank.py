"""One rank of async_save.py, which starts it."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import harness
import timm
import torch
import torch.distributed as dist

from gppf_ds.simt.job import start_distributed
from gppf_ds.simt.masked import Fragment
from gppf_ds.train.checkpoint import TrainState
from gppf_ds.train.saving import Saved, Saver

PARTS = 64
"""Tensors of the checkpoint, for each rank."""
ROW = 15
"""Steps that are timed together without a checkpoint beside them."""


class Bench:
    """Steps of a small network, and a checkpoint of any size beside them."""

    def __init__(self, settings: dict[str, Any], device: torch.device) -> None:
        self.device = device
        size = settings["mib"] * 2**20 // 4 // PARTS
        self.fragments = [Fragment(f"part-{i}", 0, torch.randn(size, device=device), {}) for i in range(PARTS)]
        folder = Path(settings["folder"])
        self.beside = Saver(folder / "beside", 1)
        self.alone = Saver(folder / "alone", 1, background=False)
        self.network = timm.create_model("resnet10t", num_classes=10).to(device)
        self.optimizer = torch.optim.SGD(self.network.parameters(), lr=0.01)
        self.images = torch.randn(settings["batch_size"], 3, 96, 96, device=device)
        self.saves = 0

    def step(self) -> None:
        """One optimizer step, with the all-reduce that all ranks of a job meet in."""
        self.network(self.images).square().mean().backward()
        if dist.get_world_size() > 1:
            for parameter in self.network.parameters():
                dist.all_reduce(parameter.grad)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def steps(self, count: int) -> None:
        """A row of steps."""
        for _ in range(count):
            self.step()
        harness.synchronise(self.device)

    def until_written(self) -> tuple[int, Saved]:
        """Steps until every rank's part of the checkpoint on its way is on disk; how many, and what was written."""
        count, saved = 0, None
        waiting = torch.ones(1, device=self.device)
        while waiting.item():
            self.step()
            count += 1
            saved = saved or self.beside.check()
            waiting.fill_(saved is None)
            dist.all_reduce(waiting)
        assert saved is not None
        return count, saved

    def save(self, saver: Saver) -> None:
        """Every checkpoint of another step."""
        self.saves += 1
        saver.save(TrainState(self.saves, {}, 0), self.fragments, {})


def seconds(work: Callable[[], None]) -> float:
    """That the work takes, begun by all ranks together."""
    dist.barrier()
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def main() -> None:
    """Measures with the settings in the argument, a json object."""
    settings = json.loads(sys.argv[1])
    device = start_distributed(600.0)
    bench = Bench(settings, device)
    for saver in (bench.beside, bench.alone):  # memory for the copies comes with the first
        bench.save(saver)
        saver.finish()
    bench.steps(3)
    found: dict[str, list[float]] = {}

    def note(name: str, value: float) -> None:
        found.setdefault(name, []).append(value)

    for _ in range(settings["repeats"]):
        before = seconds(lambda: bench.steps(ROW)) / ROW
        stall = seconds(lambda: bench.save(bench.beside))
        dist.barrier()
        started = time.perf_counter()
        steps, saved = bench.until_written()
        beside = time.perf_counter() - started
        writing = seconds(lambda: bench.save(bench.alone))
        after = seconds(lambda: bench.steps(ROW)) / ROW
        reference = (before + after) / 2
        note("a step", reference)
        note("a step beside a checkpoint", beside / steps)
        note("copying to host memory", stall)
        note("writing beside the steps", saved.writing)
        note("writing alone", writing)
        note("share of writing that copying took", stall / writing)
        note("share of writing that training lost", (stall + beside - steps * reference) / writing)
    harness.hand_over({name: harness.spread(values) for name, values in found.items()})
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
