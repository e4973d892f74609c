"""One rank of communication.py, which starts it."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import arms
import harness
import torch
import torch.distributed as dist
from communication import ARMS
from torch import Tensor
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

from gppf_ds.config import BackboneConfig, EngineConfig, OptimizerConfig, RunConfig
from gppf_ds.simt.audit import OPERATIONS
from gppf_ds.simt.engine import SimtEngine, StepReport
from gppf_ds.simt.job import start_distributed
from gppf_ds.tasks.bts import BTSDecoder
from gppf_ds.tasks.classification import ClassificationHead
from gppf_ds.tasks.depth import DepthHead, DepthTargets
from gppf_ds.tasks.task import Batch, FeatureInfo, Head

CLASSES = {"coarse": 10, "fine": 1000}
DEPTH, MAX_DEPTH = "depth", 20.0
TASKS = (*CLASSES, DEPTH)

UNITS = 4
"""In every lego layer: as many as a step has devices by default, so that with hard routes some are left over."""

CASES = {"all heads used": 3, "one head unused": 2, "two heads unused": 1}
"""How many of the tasks the devices of a step run."""

PLACES = (
    ("gppf_ds/simt/reduction.py", "gradients"),
    ("ddp_comm_hooks/default_hooks.py", "gradients"),
    ("gppf_ds/backbone/norm.py", "batch norm"),
    ("gppf_ds/simt/engine.py", "agreement"),
    ("/deepspeed/", "DeepSpeed"),
)
"""In whose code (a part of the file's name) which kind of collective starts."""


@dataclass(frozen=True)
class Settings:
    """What the command line of communication.py decides."""

    ranks: int
    devices_per_rank: int
    steps: int
    batch_size: int
    image_size: int
    options: dict[str, Any]
    arms: list[str]


def heads(features: FeatureInfo) -> dict[str, Head]:
    """The product's own: two light ones of different size, one dense."""
    light = {name: ClassificationHead(features.channels[-1], classes, 0.0) for name, classes in CLASSES.items()}
    return {**light, DEPTH: DepthHead(BTSDecoder(features, 32, MAX_DEPTH), 1e-3, MAX_DEPTH, 0.85)}


def batches(count: int, side: int, device: torch.device) -> dict[str, Batch]:
    """This rank's batch of each task, the same in every step."""
    torch.manual_seed(dist.get_rank())
    images = torch.randn(count, 3, side, side, device=device)
    labels = {name: torch.randint(classes, (count,), device=device) for name, classes in CLASSES.items()}
    depth = DepthTargets(0.5 + (MAX_DEPTH - 1) * torch.rand(count, side, side, device=device), [(side, side)] * count)
    return {name: Batch(images, targets) for name, targets in {**labels, DEPTH: depth}.items()}


def mine(tasks: Sequence[str], data: Mapping[str, Batch], devices: Sequence[int]) -> list[Batch]:
    """For every device of this rank the batch of its task, with images of its own, as they come from a loader."""
    return [replace(data[tasks[device]], images=data[tasks[device]].images.clone()) for device in devices]


@contextmanager
def counted(into: Counter[str]) -> Iterator[None]:
    """Adds what is handed to the collectives that this process starts inside: bytes by kind, and "KIND, calls"."""
    originals = {name: getattr(dist.ProcessGroup, name) for name in OPERATIONS}
    try:
        for name, original in originals.items():
            setattr(dist.ProcessGroup, name, _counting(original, into))
        yield
    finally:
        for name, original in originals.items():
            setattr(dist.ProcessGroup, name, original)


def _counting(original: Callable[..., Any], into: Counter[str]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        kind = _kind()
        # Of a gather the whole that arrives, of a reduction the whole that is reduced: never input and output together.
        into[kind] += max(map(_bytes, [*args, *kwargs.values()]), default=0)
        into[f"{kind}, calls"] += 1
        return original(*args, **kwargs)

    return call


def _bytes(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.nbytes
    return sum(map(_bytes, value)) if isinstance(value, list | tuple) else 0


def _kind() -> str:
    """The kind of the innermost caller that is in :data:`PLACES`."""
    frame = sys._getframe(2)
    while frame is not None:
        for file, kind in PLACES:
            if file in frame.f_code.co_filename:
                return kind
        frame = frame.f_back  # type: ignore[assignment]
    return "other"


class Bench:
    """The arms of one rank."""

    def __init__(self, settings: Settings, device: torch.device) -> None:
        self.settings = settings
        self.device = device
        self.data = batches(settings.batch_size, settings.image_size, device)
        self.config = RunConfig(
            output="unused",
            steps=10**6,
            backbone=BackboneConfig(options=settings.options, units=UNITS),
            optimizer=OptimizerConfig(name="adamw", learning_rate=1e-3),
            engine=EngineConfig(precision="fp32", devices_per_rank=settings.devices_per_rank),
        )

    def ours(self, routing: Literal["soft", "hard"], stage: arms.Stage) -> dict[str, list[dict[str, int]]]:
        """See :meth:`cases`."""
        backbone = replace(self.config.backbone, routing=routing)
        config = replace(self.config, backbone=backbone, engine=replace(self.config.engine, zero_stage=stage))
        arm = arms.Simt(config, heads, self.device)
        engine = arm.engine

        def step(number: int, tasks: Sequence[str]) -> int:
            return _used(engine, arm.step_devices(number, tasks, mine(tasks, self.data, engine.devices()[0])))

        found = self.cases(engine.num_devices, step)
        engine.close()
        return found

    def ddp(self) -> dict[str, list[dict[str, int]]]:
        """See :meth:`cases`. One device per rank; its buckets go through a hook in Python, where they are counted."""
        arm = arms.Ddp(self.config, heads, self.device)
        arm.wrapped.register_comm_hook(None, allreduce_hook)
        network, rows = arm.module.network, arm.module.controller.logits

        def step(number: int, tasks: Sequence[str]) -> int:
            arm.step(number, tasks, self.data[tasks[dist.get_rank()]])
            own = (_size(network.heads.bank[task]) + rows[task].nbytes for task in set(tasks))
            return _size(network.backbone) + sum(own)

        return self.cases(self.settings.ranks, step)

    def cases(self, devices: int, step: Callable[[int, Sequence[str]], int]) -> dict[str, list[dict[str, int]]]:
        """What every step of every case hands over, and under "used" the bytes of what somebody used.

        Neighbours run different tasks, and all change from step to step.

        Args:
            devices: in a step; cases with more tasks are left out.
            step: makes one, given its number and every device's task, and returns the bytes of what was used.
        """
        found: dict[str, list[dict[str, int]]] = {}
        for case, used in CASES.items():
            if devices < used:
                continue
            step(0, [TASKS[device % used] for device in range(devices)])  # what is sent once is not a step's
            found[case] = []
            for number in range(1, 1 + self.settings.steps):
                sent: Counter[str] = Counter()
                with counted(sent):
                    in_use = step(number, [TASKS[(device + number) % used] for device in range(devices)])
                found[case].append({"used": in_use, **sent})
        return found


def _size(module: torch.nn.Module) -> int:
    return sum(p.nbytes for p in module.parameters())


def _used(engine: SimtEngine, report: StepReport) -> int:
    """Bytes of the gradients of all parameters that a device of this step used."""
    numbers = {name: torch.Size(shape).numel() for name, shape in engine.shapes.items()}
    learning = [(name, p) for name, p in engine.model.named_parameters() if p.requires_grad]
    network = sum(numbers[name] * p.element_size() for name, p in learning if report.counts[engine.owners[name]])
    return network + sum(row.nbytes for name, row in engine.controller.logits.items() if report.counts["task", name])


def main() -> None:
    """Runs all arms with the settings in the argument, a json object."""
    settings = Settings(**json.loads(sys.argv[1]))
    bench = Bench(settings, start_distributed(harness.COLLECTIVE_LIMIT))
    result = {name: bench.ours(*ARMS[name]) if ARMS[name] else bench.ddp() for name in settings.arms}
    harness.hand_over(result)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
