"""One rank of memory.py, which starts it."""

from __future__ import annotations

import gc
import json
import sys
import weakref
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, Self

import arms
import harness
import torch
import torch.distributed as dist
from communication_rank import batches, heads, mine
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gppf_ds.config import BackboneConfig, EngineConfig, OptimizerConfig, RunConfig
from gppf_ds.simt.engine import SimtEngine
from gppf_ds.simt.job import start_distributed
from gppf_ds.simt.partitions import partitions
from gppf_ds.tasks.task import FeatureInfo, Head

TASKS = ("coarse", "depth")
"""Two, so that 2 devices use all parameters in every step."""

WARM = 2
"""Steps before the measured one, in which optimizer state and buffers appear."""

DEEPSPEED_GRADIENTS = ("averaged_gradients", "all_grad_tensors", "grads_in_partition", "grad_partitions_flat_buffer")
"""Attributes of its ZeRO optimizers that hold gradients or parts of them."""


@dataclass(frozen=True)
class Settings:
    """What the command line of memory.py decides."""

    ranks: int
    stages: list[arms.Stage]
    checkpoint: list[bool]
    devices_per_rank: list[int]
    batch_size: int
    image_size: int
    options: dict[str, Any]


class Live(TorchDispatchMode):
    """Bytes of all storages made inside that are still there, and their peak: a CPU has no account of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0
        self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        answer = func(*args, **(kwargs or {}))
        for value in tree_leaves(answer):
            if isinstance(value, Tensor):
                self._meet(value.untyped_storage())
        return answer

    def _meet(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self._known:
            self._known.add(key)
            self.bytes += size
            self.peak = max(self.peak, self.bytes)
            weakref.finalize(storage, self._leave, key, size)

    def restart(self) -> None:
        """The peak is that from now on."""
        self.peak = self.bytes

    def _leave(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.bytes -= size


class Allocated:
    """The same on a GPU, by torch's own account."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.before = torch.cuda.memory_allocated(device)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    @property
    def bytes(self) -> int:
        """What is held now."""
        return torch.cuda.memory_allocated(self.device) - self.before

    @property
    def peak(self) -> int:
        """The most that was."""
        return torch.cuda.max_memory_allocated(self.device) - self.before

    def restart(self) -> None:
        """The peak is that from now on."""
        torch.cuda.reset_peak_memory_stats(self.device)


def two_heads(features: FeatureInfo) -> dict[str, Head]:
    """Of :data:`TASKS`."""
    return {name: head for name, head in heads(features).items() if name in TASKS}


def size(tensors: Iterable[Tensor]) -> int:
    """Bytes of the storages that hold these, each once."""
    storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


class Books:
    """What an engine holds, and notes of its gradients, which come and go in a step."""

    def __init__(self, engine: SimtEngine) -> None:
        self.engine = engine
        self.most: dict[str, int] = {}
        self._notes(engine.reduction, "_launch", "gradients, summed", after=True)
        if hasattr(engine.engine.optimizer, "setup_buckets"):
            self._notes(engine.engine.optimizer, "setup_buckets", "gradients, summed", after=True)
        self._notes(engine.engine, "step", "gradients, stepped", after=False)

    def at_rest(self) -> dict[str, int]:
        """Between two steps. DeepSpeed steps fp32 copies of its parts of the parameters, which are fp32 themselves."""
        engine = self.engine
        parameters = [getattr(p, "ds_tensor", p).data for p in engine.model.parameters()]
        flats = [part.flat for part in partitions(engine.engine, engine.stage)] if engine.stage else []
        states: list[Any] = [engine.engine.optimizer.state]
        if engine.masked is not None:
            states = [engine.masked.base.state, *([engine.masked.optimizer.state] if engine.masked.optimizer else [])]
        held = size(parameters)
        return {
            "parameters": held,
            "fp32 copies": size([*parameters, *flats]) - held,
            "optimizer state": size(_tensors(states)),
        }

    def _note(self, moment: str) -> None:
        engine, optimizer = self.engine, self.engine.engine.optimizer
        flats = [part.flat for part in partitions(engine.engine, engine.stage)] if engine.stage else []
        gradients = [p.grad for p in [*engine.model.parameters(), *flats] if p.grad is not None]
        gradients += _tensors([getattr(optimizer, name, None) for name in DEEPSPEED_GRADIENTS])
        buckets = [bucket.buffer for bucket in getattr(optimizer, "ipg_buckets", {}).values()]
        now = {
            moment: size(gradients),
            "DeepSpeed's bucket": size(_tensors(buckets)),
        }
        for key, value in now.items():
            self.most[key] = max(value, self.most.get(key, 0))

    def _notes(self, owner: Any, method: str, moment: str, after: bool) -> None:
        """Makes a method take notes, before it does its work or after."""
        original = getattr(owner, method)

        def call(*args: Any, **kwargs: Any) -> Any:
            if not after:
                self._note(moment)
            answer = original(*args, **kwargs)
            if after:
                self._note(moment)
            return answer

        setattr(owner, method, call)


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        value = list(value.values())
    return [found for item in value for found in _tensors(item)] if isinstance(value, list | tuple) else []


class Bench:
    """The arms of one rank."""

    def __init__(self, settings: Settings, device: torch.device) -> None:
        self.device = device
        self.data = batches(settings.batch_size, settings.image_size, device)
        self.config = RunConfig(
            output="unused",
            steps=10**6,
            backbone=BackboneConfig(options=settings.options),
            optimizer=OptimizerConfig(name="adamw", learning_rate=1e-3),
            engine=EngineConfig(precision="fp32"),
        )

    def arm(self, stage: arms.Stage, checkpoint: bool, devices: int) -> dict[str, int]:
        """Bytes by what they are for, on the rank that has most of each."""
        config = replace(
            self.config,
            backbone=replace(self.config.backbone, checkpoint=checkpoint),
            engine=replace(self.config.engine, zero_stage=stage, devices_per_rank=devices),
        )
        gc.collect()
        account = Live() if self.device.type == "cpu" else Allocated(self.device)
        with account:
            arm = arms.Simt(config, two_heads, self.device)
            for number in range(WARM):
                self._step(arm, number)
            books = Books(arm.engine)
            account.restart()
            self._step(arm, WARM)
            held = {**books.at_rest(), **books.most, "peak": account.peak, "at rest": account.bytes}
        if stage < 3:  # there autograd holds gathered parameters too
            saved = harness.SavedActivations(arm.module)
            with saved.counting():
                self._step(arm, WARM + 1)
            held["activations"] = saved.peak
        arm.engine.close()
        most = torch.tensor(list(held.values()), device=self.device)
        dist.all_reduce(most, dist.ReduceOp.MAX)
        return dict(zip(held, most.tolist(), strict=True))

    def _step(self, arm: arms.Simt, number: int) -> None:
        tasks = [TASKS[(device + number) % len(TASKS)] for device in range(arm.engine.num_devices)]
        arm.step_devices(number, tasks, mine(tasks, self.data, arm.engine.devices()[0]))


def main() -> None:
    """Runs all arms with the settings in the argument, a json object."""
    settings = Settings(**json.loads(sys.argv[1]))
    bench = Bench(settings, start_distributed(harness.COLLECTIVE_LIMIT))
    kinds = product(settings.devices_per_rank, settings.checkpoint, settings.stages)
    result = [{"stage": s, "checkpoint": c, "devices per rank": d, "bytes": bench.arm(s, c, d)} for d, c, s in kinds]
    harness.hand_over(result)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
