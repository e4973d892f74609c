"""``gppf-ds`` with a fault planted at a rank, a step and a phase: ``python -m distributed.planted train --config ...``.

The environment's ``PLANTED`` holds a json object with the fields of :class:`Fault`. Nothing in the product knows of it.
"""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from gppf_ds import cli
from gppf_ds.errors import SampleError
from gppf_ds.simt.engine import SimtEngine
from gppf_ds.simt.loader import RequestDataset
from gppf_ds.simt.model import Job
from gppf_ds.simt.sampler import Request
from gppf_ds.train import saving, trainer

Kind = Literal["kill", "hang", "freeze", "slow", "exception", "nan", "corrupt", "full"]
STEP_PHASES = ("read", "forward", "backward", "update", "updated")
SAVE_PHASES = ("staging", "writing", "written")
RENAME_PHASES = ("renaming", "renamed", "discarding")
"""Of rank 0 alone."""
PHASES = (*STEP_PHASES, "evaluate", *SAVE_PHASES, *RENAME_PHASES)


@dataclass
class Fault:
    """What goes wrong, and where.

    The step is the number of steps done before it; in an evaluation or a save, the number done until then.
    """

    kind: Kind
    rank: int
    step: int
    phase: str
    once: str = ""
    """A file that keeps the fault from striking in later launches too."""
    struck: bool = False
    now: int = 0

    def strike(self, step: int, phase: str) -> bool:
        """Does what the fault does, the first time that this is its place; whether it was."""
        here = int(os.environ["RANK"]), step, phase
        if self.struck or here != (self.rank, self.step, self.phase) or (self.once and Path(self.once).exists()):
            return False
        self.struck = True
        if self.once:
            Path(self.once).touch()
        print(f"planted {self.kind} on rank {self.rank}, step {step}, {phase}", flush=True)
        match self.kind:
            case "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            case "freeze":
                os.kill(os.getpid(), signal.SIGSTOP)
            case "hang":
                time.sleep(10**6)
            case "slow":
                time.sleep(3.0)
            case "exception":
                raise ArithmeticError(f"planted in {phase}")
            case "full":
                # A disk on which nothing fits any more: the signal for it is ignored by Python, an error remains.
                resource.setrlimit(resource.RLIMIT_FSIZE, (16, resource.RLIM_INFINITY))
        return True


def plant(fault: Fault) -> None:
    """Puts the fault in its place in this process and those that it forks."""
    _plant_in_steps(fault)
    _plant_in_saves(fault)
    honest_evaluate = trainer.evaluate

    def evaluate(*arguments: Any) -> Any:
        fault.strike(fault.now, "evaluate")
        return honest_evaluate(*arguments)

    trainer.evaluate = evaluate  # type: ignore[assignment]


def _plant_in_steps(fault: Fault) -> None:
    engine: Any = SimtEngine
    honest_read, honest_step = RequestDataset.__getitem__, engine.step
    honest_check, honest_update = engine._agree, engine._update

    def read(self: RequestDataset, request: Request) -> Any:
        if fault.kind == "corrupt" and fault.phase == "read" and request.step == fault.step:
            dataset = self.readers[request.task].dataset
            self.readers[request.task].dataset = _Corrupt(dataset, request.indices[0])
        fault.strike(request.step, "read")
        return honest_read(self, request)

    def step(self: SimtEngine, number: int, tasks: Sequence[str], groups: Sequence[Sequence[Job]]) -> Any:
        fault.now = number
        if fault.strike(number, "forward") and fault.kind == "nan":
            for job in (job for group in groups for job in group):
                job.passing.images.fill_(float("nan"))
        report = honest_step(self, number, tasks, groups)
        fault.strike(number, "updated")
        fault.now = number + 1
        return report

    def check(self: SimtEngine, *arguments: Any) -> Any:
        valid = honest_check(self, *arguments)
        fault.strike(fault.now, "backward")
        return valid

    def update(self: SimtEngine, *arguments: Any) -> Any:
        fault.strike(fault.now, "update")
        return honest_update(self, *arguments)

    RequestDataset.__getitem__ = read  # type: ignore[method-assign]
    engine.step, engine._agree, engine._update = step, check, update


class _Corrupt:
    """A data set one of whose samples cannot be read."""

    def __init__(self, dataset: Any, index: int) -> None:
        self.dataset = dataset
        self.index = index

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        if index == self.index:
            raise SampleError(f"planted in sample {index}")
        return self.dataset[index]


def _plant_in_saves(fault: Fault) -> None:
    saver: Any = saving.Saver
    honest_copy, honest_write, honest_rename = saver._copy, saving._write, saving.rename

    def copy(self: saving.Saver, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        copies = honest_copy(self, tensors)
        fault.strike(fault.now, "staging")
        return copies

    def write(path: Path, *arguments: Any) -> Any:
        if fault.kind == "kill" and fault.phase == "writing":  # with half of the file on disk
            honest_write(path, *arguments)
            os.truncate(path, path.stat().st_size // 2)
        fault.strike(_step_of(path), "writing")
        entry = honest_write(path, *arguments)
        fault.strike(_step_of(path), "written")
        return entry

    def rename(source: Path, target: Path) -> None:
        hidden = target.name.startswith(".")
        if not hidden:
            fault.strike(_step_of(target), "renaming")
        honest_rename(source, target)
        fault.strike(fault.step if hidden else _step_of(target), "discarding" if hidden else "renamed")

    saver._copy, saving._write, saving.rename = copy, write, rename  # type: ignore[assignment]


def _step_of(path: Path) -> int:
    found = re.search(r"step-(\d+)", str(path))
    assert found is not None
    return int(found[1])


def main() -> None:
    torch.set_num_threads(1)
    if planted := os.environ.get("PLANTED"):
        plant(Fault(**json.loads(planted)))
    sys.exit(cli.main())


if __name__ == "__main__":
    main()
