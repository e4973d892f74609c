"""One rank of one arm of exactness.py, which starts it."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import arms
import harness
import torch
import torch.distributed as dist
from torch import Tensor

from gppf_ds.config import BackboneConfig, ControllerConfig, EngineConfig, OptimizerConfig, RunConfig
from gppf_ds.simt.job import start_distributed
from gppf_ds.simt.reference import Reference
from gppf_ds.tasks.classification import ClassificationHead
from gppf_ds.tasks.task import Batch, FeatureInfo, Head

CONFIG = RunConfig(
    output="unused",
    steps=10**6,  # over which learning rate and temperature fall: here they stand still
    backbone=BackboneConfig(options={"layers": [1, 1, 1, 1], "channels": [8, 8, 16, 16]}),
    controller=ControllerConfig(learning_rate=0.0),
    # Of so long a step, rounding of the parameters takes nothing away that could be seen.
    optimizer=OptimizerConfig(name="sgd", learning_rate=1e3, momentum=0.0, weight_decay=0.0),
    engine=EngineConfig(precision="fp32"),
)

ADAMW = OptimizerConfig(name="adamw", learning_rate=1e-2, weight_decay=0.1)

NEVER = 1e6
"""Seconds a collective may take: the parent decides when an arm hangs."""

Values = Mapping[str, Tensor]


def heads(classes: Sequence[int], features: FeatureInfo) -> dict[str, Head]:
    """Of tasks A, B and C."""
    return {n: ClassificationHead(features.channels[-1], c, 0.0) for n, c in zip("ABC", classes, strict=True)}


def batch(rank: int, device: torch.device) -> Batch:
    """Of a rank, the same in every step."""
    generator = torch.Generator().manual_seed(rank)
    images = torch.randn((8, 3, 64, 64), generator=generator)
    return Batch(images.to(device), torch.randint(5, (8,), generator=generator).to(device))


def make(arm: Mapping[str, Any], config: RunConfig, device: torch.device) -> arms.Arm:
    """The arm that a json object describes."""
    build = partial(heads, arm.get("classes", [5, 5, 5]))
    config = replace(config, engine=replace(config.engine, zero_stage=arm.get("stage", 0)))
    if arm["kind"] == "ddp":
        return arms.Ddp(config, build, device, arm.get("dummy", False))
    if arm["kind"] == "deepspeed":
        return arms.PlainDeepSpeed(config, build, device)
    return arms.Simt(config, build, device)


def mixed_step(arm: Mapping[str, Any], tasks: Sequence[str], device: torch.device) -> dict[str, Any]:
    """Ratio and relative error of every group that is used, and how far the idle head moved."""
    model, controller = arms.build(CONFIG, partial(heads, arm.get("classes", [5, 5, 5])))
    before = {name: p.detach().cpu().clone() for name, p in model.named_parameters()}
    reference = Reference(model.to(device), controller.to(device), CONFIG)
    reference.step(0, tasks, [batch(rank, device) for rank in range(len(tasks))])
    wanted = {name: p.detach().cpu() for name, p in model.named_parameters()}

    ours = make(arm, CONFIG, device)
    ours.step(0, tasks, batch(dist.get_rank(), device))
    got = ours.parameters()
    result: dict[str, Any] = {"idle": change(before, got, "heads.bank.C.")}
    for group, prefix in {"trunk": "backbone.", "A": "heads.bank.A.", "B": "heads.bank.B."}.items():
        result[group] = compare(update(before, got, prefix), update(before, wanted, prefix))
    return result


def idle_drift(arm: Mapping[str, Any], tasks: Sequence[str], steps: int, device: torch.device) -> dict[str, float]:
    """How far head A (used once before) and head C (never used) move while all ranks run B, relative to their size."""
    one = make(arm, replace(CONFIG, optimizer=ADAMW), device)
    own = batch(dist.get_rank(), device)
    one.step(0, tasks, own)
    before = one.parameters()
    for number in range(1, steps + 1):
        one.step(number, ["B"] * len(tasks), own)
    after = one.parameters()
    return {f"drift_{name.lower()}": change(before, after, f"heads.bank.{name}.") for name in "AC"}


def update(before: Values, after: Values, prefix: str) -> Tensor:
    """What one step subtracted from a group of parameters, flat."""
    return torch.cat([(before[n].double() - after[n].double()).flatten() for n in before if n.startswith(prefix)])


def compare(got: Tensor, wanted: Tensor) -> dict[str, float]:
    """The projection of one on the other, and the norm of their difference, both relative to what is wanted."""
    ratio = float(got @ wanted / (wanted @ wanted))
    return {"ratio": ratio, "error": float((got - wanted).norm() / wanted.norm())}


def change(before: Values, after: Values, prefix: str) -> float:
    """Relative to the values before; exactly 0 where every bit is the same."""
    values = torch.cat([before[n].double().flatten() for n in before if n.startswith(prefix)])
    return float(update(before, after, prefix).norm() / values.norm())


def main() -> None:
    """Runs the arm that the argument, a json object, describes."""
    arm = json.loads(sys.argv[1])
    device = start_distributed(NEVER)
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.deterministic = True
    tasks = ["A"] + ["B"] * (dist.get_world_size() - 1)
    found = mixed_step(arm, tasks, device) | idle_drift(arm, tasks, arm["drift_steps"], device)
    harness.hand_over(found)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
