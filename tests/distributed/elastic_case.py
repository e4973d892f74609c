"""A rank of a run that writes down what it holds and what it trains on, and may stop at a checkpoint.

Arguments: the recipe, a folder for the records, the steps before which to write down all state, and the step before
which to stop (0: run to the end). The rank goes through ``gppf-ds train``; only the engine's step is watched.
"""

from __future__ import annotations

import json
import os
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from dense_head import DenseHead
from safetensors.torch import save_file
from torch import Tensor, nn

from distributed.simt_case import leave_zero
from gppf_ds.backbone.controller import Controller
from gppf_ds.simt.engine import SimtEngine, StepReport
from gppf_ds.simt.model import Job, SimtModel
from gppf_ds.tasks.task import Batch, Dataset, FeatureInfo, Head, Metric, Split, Task
from gppf_ds.train.commands import train

CLASSES = 5


class Noise:
    """Images of noise that is drawn anew in every epoch, each with its index."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return torch.randn(3, 32, 32) + index / self.size, index


class Seen:
    """Counts images."""

    def __init__(self) -> None:
        self.count = 0

    def update(self, predictions: Sequence[Any], targets: Any) -> None:
        self.count += len(predictions)

    def state(self) -> int:
        return self.count

    def merge(self, states: Sequence[int]) -> None:
        self.count = sum(states)

    def compute(self) -> dict[str, float]:
        return {"seen": float(self.count)}


class NormedHead(Head):
    """With running statistics of its own."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(channels)
        self.linear = nn.Linear(channels, CLASSES)

    def logits(self, features: list[Tensor]) -> Tensor:
        return self.linear(self.norm(features[-1].mean((2, 3))))

    def loss(self, features: list[Tensor], targets: tuple[Tensor, float]) -> dict[str, Tensor]:
        return {"loss": nn.functional.cross_entropy(self.logits(features), targets[0] % CLASSES)}

    def predict(self, features: list[Tensor], targets: Any) -> list[Tensor]:
        return list(self.logits(features))


class Toy(Task):
    """A task whose targets are (indices of the samples, 1.0).

    Args:
        samples: size of the training set.
        batch_size: images per device and step.
        weight: sampling weight.
        dense: the head reads the fine maps.
    """

    headline = "seen"

    def __init__(self, samples: int, batch_size: int, weight: float = 1.0, dense: bool = False) -> None:
        super().__init__(batch_size, weight)
        self.samples = samples
        self.dense = dense

    def check(self) -> None:
        pass

    def dataset(self, split: Split) -> Dataset:
        return Noise(self.samples)

    def collate(self, samples: list[Any]) -> Any:
        images, indices = zip(*samples, strict=True)
        return torch.stack(images), torch.tensor(indices)

    def preprocess(self, batch: Any, device: torch.device, training: bool) -> Batch:
        return Batch(batch[0].to(device), (batch[1].to(device), 1.0))

    def build_head(self, features: FeatureInfo) -> Head:
        return DenseHead(features.channels[1]) if self.dense else NormedHead(features.channels[-1])

    def metric(self) -> Metric:
        return Seen()


def live_state(engine: SimtEngine) -> dict[str, Tensor]:
    """All that a run must carry, whole, from the objects that train; a collective call."""
    state = {f"parameter {name}": value for name, value in engine.full_parameters().items()}
    state |= {f"buffer {name}": value for name, value in engine.model.named_buffers()}
    for task, row in engine.controller.logits.items():
        state[f"controller {task}"] = row
        state |= {f"controller {task} {kind}": v for kind, v in engine.controller_optimizer.state[row].items()}
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, engine.fragments())
    slices: dict[str, dict[int, Tensor]] = defaultdict(dict)
    for fragment in (fragment for part in parts for fragment in part):
        for kind, value in {"master": fragment.master, **fragment.state}.items():
            slices[f"{kind} {fragment.name}"][fragment.start] = torch.as_tensor(value)
    for key, found in slices.items():
        values = [found[start] for start in sorted(found)]
        if values[0].dim() == 0:
            assert all(torch.equal(value, values[0]) for value in values), key
            state[key] = values[0]
        else:
            state[key] = torch.cat([value.reshape(-1) for value in values])
    return {key: value.detach().cpu().contiguous().clone() for key, value in state.items()}


def watch(folder: Path, marks: Sequence[int], stop: int) -> None:
    """From now on every engine of this process writes its state before the steps ``marks`` and a line for each job.

    It also starts away from zeros; a checkpoint, where there is one, is loaded after that.
    """
    honest_start, honest_step = SimtEngine.__init__, SimtEngine.step

    def start(self: SimtEngine, model: SimtModel, controller: Controller, *rest: Any) -> None:
        torch.manual_seed(1)
        leave_zero(model, controller)
        honest_start(self, model, controller, *rest)

    def step_watched(self: SimtEngine, step: int, tasks: Sequence[str], groups: Sequence[Sequence[Job]]) -> StepReport:
        if step in marks:
            save_file(live_state(self), folder / f"before-step-{step}-rank-{self.rank}.safetensors")
        if step == stop:
            dist.barrier()
            os._exit(0)  # as a kill does: nothing gets to tidy up
        report = honest_step(self, step, tasks, groups)
        with (folder / "jobs.jsonl").open("a") as file:  # lines this short are appended whole by several ranks
            for job in (job for group in groups for job in group):
                file.write(json.dumps([step, job.device, job.task, job.batch.targets[0].tolist()]) + "\n")
        return report

    SimtEngine.__init__ = start  # type: ignore[method-assign,assignment]
    SimtEngine.step = step_watched  # type: ignore[method-assign]


def main() -> None:
    torch.set_num_threads(1)
    recipe, folder, marks, stop = sys.argv[1:]
    watch(Path(folder), json.loads(marks), int(stop))
    sys.exit(train(["--config", recipe]))


if __name__ == "__main__":
    main()
