"""One step of three tasks, each on one device, on an MoE ViT, which has layer norms alone.

Run on every rank with the schedule's kind and a file: on one rank with three devices and kind accumulate, or on three
ranks with one device each and kind static. Rank 0 leaves the gradients there, and how many devices used each parameter.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist

from distributed.simt_case import PoolHead, leave_zero
from gppf_ds.backbone.controller import Controller
from gppf_ds.backbone.lego import LegoBackbone, Pass
from gppf_ds.config import BackboneConfig, EngineConfig, MoeConfig, OptimizerConfig, RunConfig, ScheduleConfig
from gppf_ds.simt.engine import SimtEngine
from gppf_ds.simt.job import start_distributed
from gppf_ds.simt.model import Job, SimtModel
from gppf_ds.simt.schedule import Schedule
from gppf_ds.tasks.task import Batch, Head

TASKS = ("a", "b", "c")
SHAPES = {"a": (4, 3, 32, 32), "b": (2, 3, 48, 32), "c": (3, 3, 32, 64)}
RATE = 1.0


def configuration(kind: str, devices: int) -> RunConfig:
    static = list(TASKS) if kind == "static" else []
    # No mutual information: its gradient depends on which rows are live, and is shared out in another way.
    moe = MoeConfig(mlp_experts=6, mlp_top_k=2, attention_experts=6, mlp_blocks="every", mutual_information=0.0)
    options = {"embed_dim": 24, "depth": 2, "num_heads": 3, "patch_size": 8, "img_size": 32}
    return RunConfig(
        output="unused",
        steps=10,
        seed=3,
        backbone=BackboneConfig(name="vit_tiny_patch16_224", options=options, units=1, moe=moe),
        schedule=ScheduleConfig(kind=kind, static=static),  # type: ignore[arg-type]
        optimizer=OptimizerConfig(name="sgd", learning_rate=RATE, momentum=0.0, weight_decay=0.0),
        engine=EngineConfig(precision="fp32", devices_per_rank=devices, timeout=60),
    )


def build(config: RunConfig) -> tuple[SimtModel, Controller]:
    torch.manual_seed(1)
    backbone = LegoBackbone(config.backbone, config.seed, tasks=TASKS)
    heads: dict[str, Head] = {task: PoolHead(backbone.channels[-1], 5) for task in TASKS}
    model = SimtModel(backbone, heads, {"a": 1.0, "b": 0.5, "c": 2.0})
    controller = Controller(list(heads), backbone.units)
    leave_zero(model, controller)
    return model, controller


def batch(task: str) -> Batch:
    generator = torch.Generator().manual_seed(TASKS.index(task))
    images = torch.randn(SHAPES[task], generator=generator)
    labels = torch.randint(5, SHAPES[task][:1], generator=generator)
    return Batch(images, (labels, 1.0))


def main() -> None:
    torch.set_num_threads(1)
    kind, file = sys.argv[1], Path(sys.argv[2])
    device = start_distributed(60.0)
    config = configuration(kind, 3 if kind == "accumulate" else 1)
    model, controller = build(config)
    engine = SimtEngine(model, controller, config, device)
    schedule = Schedule.from_weights(
        dict.fromkeys(TASKS, 1.0), config.schedule, config.seed, config.engine.devices_per_rank
    )
    tasks = [schedule.tasks[t] for t in schedule(0, engine.num_devices)]
    assert tasks == list(TASKS)
    jobs = []
    for d in engine.devices()[0]:
        data = batch(tasks[d])
        passing = Pass(data.images, engine.route(tasks[d], 0, d), (config.seed, 0, 0))
        jobs.append(Job(d, tasks[d], data, passing))
    before = engine.full_parameters()
    report = engine.step(0, tasks, [jobs])
    after = engine.full_parameters()
    if engine.rank == 0:
        gradients = {name: (before[name] - after[name]) / RATE for name in before}
        users = {name: report.counts[engine.owners[name]] for name in before}
        torch.save({"gradients": gradients, "users": users}, file)
    dist.barrier()


if __name__ == "__main__":
    main()
