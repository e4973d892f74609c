"""One rank of plan_accuracy.py, which starts it."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import replace
from typing import Any, Literal

import harness
import torch
import torch.distributed as dist

from gppf_ds.config import ScheduleConfig
from gppf_ds.simt.engine import SimtEngine
from gppf_ds.simt.job import start_distributed
from gppf_ds.simt.schedule import Schedule
from gppf_ds.train import recipe
from gppf_ds.train.feed import Feed
from gppf_ds.train.measure import measure
from gppf_ds.train.simulation import Costs, Forecast, Layout, simulate
from gppf_ds.train.start import start

ARMS: dict[str, tuple[Literal["iid", "balanced"], int]] = {
    "independent draws": ("iid", 1),
    "independent draws, 2 devices per rank": ("iid", 2),
    "balanced, 2 devices per rank": ("balanced", 2),
}
"""Kind of schedule, and devices per rank."""
WARM_UP = 2


class Arm:
    """A recipe under one schedule, with an engine of its own."""

    def __init__(self, run: recipe.Recipe, kind: Literal["iid", "balanced"], per_rank: int, costs: Costs) -> None:
        told = {name: list(cost.seconds) for name, cost in costs.tasks.items()}
        engine = replace(run.config.engine, devices_per_rank=per_rank)
        schedule = ScheduleConfig(kind=kind, costs={**told} if kind == "balanced" else {})
        self.config = replace(run.config, engine=engine, schedule=schedule)
        begun = start(self.config, run.tasks)
        device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
        self.engine = SimtEngine(begun.model, begun.controller, self.config, device)
        self.feed = Feed(self.config, self.config.trained(run.tasks))
        self.cursors = dict.fromkeys(self.feed.sizes, 0)
        self.step = 0

    def run(self, steps: int) -> float:
        """Mean seconds of so many steps, on the slowest rank."""
        engine, first = self.engine, self.step
        own = [device for group in engine.devices() for device in group]
        batches = self.feed.batches(first, first + steps, self.cursors, own, engine.num_devices)
        dist.barrier()
        began = time.perf_counter()
        for step in range(first, first + steps):
            jobs = [[self.feed.job(next(batches), engine) for _ in group] for group in engine.devices()]
            engine.step(step, self.feed.tasks(step, engine.num_devices), jobs)
        if engine.device.type == "cuda":
            torch.cuda.synchronize()
        seconds = torch.tensor((time.perf_counter() - began) / steps, dtype=torch.float64, device=engine.device)
        dist.all_reduce(seconds, dist.ReduceOp.MAX)
        self.step += steps
        return float(seconds)

    def forecast(self, costs: Costs, steps: range) -> Forecast:
        """What the plan says of these steps."""
        schedule: Schedule = self.feed.schedule
        layout = Layout(dist.get_world_size(), self.config.engine.devices_per_rank, 1)
        return simulate(lambda step: schedule(step, layout.devices), costs, layout, steps)


def main() -> None:
    """Measures and runs in turn."""
    settings = json.loads(sys.argv[1])
    run = recipe.read(["--config", settings["recipe"]])
    device = start_distributed(run.config.engine.timeout)
    costs, _ = measure(run, device, settings["repeats"])
    arms = {name: Arm(run, kind, per_rank, costs) for name, (kind, per_rank) in ARMS.items()}
    for arm in arms.values():
        arm.run(WARM_UP)
    rounds: dict[str, list[tuple[float, Forecast]]] = {name: [] for name in arms}
    for _ in range(settings["rounds"]):
        before, _ = measure(run, device, settings["repeats"])
        for name, arm in arms.items():
            steps = range(arm.step, arm.step + settings["steps"])
            rounds[name].append((arm.run(settings["steps"]), arm.forecast(before, steps)))
    result: dict[str, Any] = {}
    for name, pairs in rounds.items():
        result[name] = {
            "real": harness.spread([real for real, _ in pairs]),
            "said": harness.spread([said.step_seconds for _, said in pairs]),
            "ratio": harness.spread([said.step_seconds / real for real, said in pairs]),
            "busy": harness.spread([said.busy for _, said in pairs]),
        }
    harness.hand_over({"schedules": result})
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
