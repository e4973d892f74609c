"""What the benchmarks share: ranks as processes that cannot outlive their limit, interleaved timing, memory, tables."""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

HERE = Path(__file__).parent

RESULTS = HERE / "results"

MARK = "RESULT "
"""Starts the line with which rank 0 hands over its result."""

STEADY_MALLOC = {"MALLOC_TRIM_THRESHOLD_": str(10**12), "MALLOC_MMAP_THRESHOLD_": str(10**12)}
"""Environment in which glibc keeps freed memory. Otherwise it hands every large tensor's pages back and gets them anew,
zeroed, at the next step: up to 10 % of a step on a CPU, and the more the more memory an arm needs. torch's allocator
for GPUs keeps its memory in any case."""

MEMORY = {
    "cuda": "peak that torch allocated for the arm, its parameters and optimizer state included",
    "cpu": "peak of what autograd saved for backward; the CPU has no account of the rest",
}
"""What :func:`most_memory` tells."""

COLLECTIVE_LIMIT = 600.0
"""Seconds a collective may take."""

GRACE = 5.0
"""Seconds that the other ranks have to end after one of them has failed."""


def hand_over(result: Any) -> None:
    """Gives a rank's result (json) to the process that started it; that of rank 0 counts."""
    print(MARK + json.dumps(result), flush=True)


@dataclass(frozen=True)
class Outcome:
    """How a group of ranks ended."""

    verdict: Literal["ends", "aborts", "hangs"]
    result: Any = None
    """What rank 0 handed over."""
    reason: str = ""
    """The last words of the rank that failed first."""


def arguments_of_models(
    about: str | None, models: Sequence[str], steps: int, warmup: int, batch_size: int
) -> tuple[argparse.Namespace, dict[str, Any]]:
    """The command line of a benchmark of timm's models, and the settings for its json; ends where they do not fit.

    Args:
        about: the benchmark's documentation.
        models: that it knows narrow ones of.
        steps, warmup, batch_size: defaults.
    """
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(models), help="names of timm (default: %(default)s)")
    parser.add_argument("--full", action="store_true", help="the models as timm has them, not narrow ones")
    parser.add_argument("--steps", type=int, default=steps, help="measured steps of every arm (default: %(default)s)")
    parser.add_argument("--warmup", type=int, default=warmup, help="steps before them (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=batch_size, help="images (default: %(default)s)")
    parser.add_argument("--image-size", type=int, default=224, help="pixels (default: %(default)s)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for the json")
    args = parser.parse_args()
    unknown = [name for name in args.models if name not in models and not args.full]
    if unknown or min(args.steps, args.batch_size) < 1:
        sys.exit(f"{unknown} need --full" if unknown else "--steps and --batch-size start at 1")
    settings = {key: getattr(args, key) for key in ("models", "full", "steps", "warmup", "batch_size", "image_size")}
    return args, {**settings, "ranks": 1}


def run_ranks(script: Path, argument: str, ranks: int, limit: float) -> Outcome:
    """Runs a script on every rank: on NCCL where each finds a GPU of its own, else on gloo.

    Args:
        script: gives its result to :func:`hand_over`.
        argument: its only one.
        ranks: how many processes.
        limit: seconds after which ranks that have not ended hang, and are killed.
    """
    common = _environment(ranks)
    with tempfile.TemporaryDirectory() as folder:
        logs = [Path(folder) / f"{rank}.log" for rank in range(ranks)]
        processes: list[subprocess.Popen[bytes]] = []
        try:
            for rank, log in enumerate(logs):
                environment = {**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}
                with log.open("wb") as out:
                    command = [sys.executable, str(script), argument]
                    processes.append(subprocess.Popen(command, env=environment, stdout=out, stderr=subprocess.STDOUT))
            verdict, failed = _wait(processes, limit)
        finally:
            for process in processes:
                process.kill()
                process.wait()
        lines = [log.read_text(errors="replace").splitlines() for log in logs]
    results = [json.loads(line.removeprefix(MARK)) for line in lines[0] if line.startswith(MARK)]
    if verdict == "ends":
        return Outcome("ends", results[-1])
    return Outcome(verdict, reason=_last_words(lines[failed]))


def result_of_ranks(script: Path, argument: str, ranks: int, limit: float) -> Any:
    """What :func:`run_ranks` gives where the ranks end well; else the benchmark ends with their last words."""
    outcome = run_ranks(script, argument, ranks, limit)
    if outcome.verdict != "ends":
        sys.exit(f"The ranks did not end well ({outcome.verdict}): {outcome.reason}")
    return outcome.result


def _environment(ranks: int) -> dict[str, str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {"WORLD_SIZE": str(ranks), "LOCAL_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    # The package of this checkout, installed or not.
    common["PYTHONPATH"] = os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")])
    if torch.cuda.device_count() < ranks:
        threads = max(1, (os.cpu_count() or 1) // ranks)
        common |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": str(threads)}
        common |= STEADY_MALLOC
    return {**os.environ, **common}


def _wait(processes: Sequence[subprocess.Popen[bytes]], limit: float) -> tuple[Literal["ends", "aborts", "hangs"], int]:
    """The verdict, and the rank that failed first."""
    deadline = time.monotonic() + limit
    failed: int | None = None
    while time.monotonic() < deadline:
        codes = [process.poll() for process in processes]
        if failed is None:
            failed = next((rank for rank, code in enumerate(codes) if code), None)
            if failed is not None:
                deadline = time.monotonic() + GRACE
        if failed is None and all(code == 0 for code in codes):
            return "ends", 0
        if all(code is not None for code in codes):
            break
        time.sleep(0.05)
    return ("hangs", 0) if failed is None else ("aborts", failed)


def _last_words(lines: Sequence[str]) -> str:
    errors = [line for line in lines if "Error" in line]
    return (errors or [line for line in lines if line.strip()] or ["(nothing)"])[-1].strip()


def restart_with_steady_malloc() -> None:
    """Replaces this process by one with :data:`STEADY_MALLOC`, unless it has that already or there is a GPU."""
    if not torch.cuda.is_available() and "MALLOC_TRIM_THRESHOLD_" not in os.environ:
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **STEADY_MALLOC})


def synchronise(device: torch.device) -> None:
    """Waits for everything that this rank has given its GPU to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def interleaved(
    arms: Mapping[str, Callable[[int], None]],
    device: torch.device,
    warmup: int,
    rounds: int,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Times A B A B ... in this process group, so that whatever disturbs the machine disturbs every arm alike.

    Args:
        arms: a step of each arm, given its number.
        device: of this rank.
        warmup: rounds that do not count.
        rounds: that count.
        clock: seconds, from any start.

    Returns:
        Seconds of every step on the slowest rank.
    """
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for number in range(warmup + rounds):
        for name, step in arms.items():
            dist.barrier()
            synchronise(device)
            start = clock()
            step(number)
            synchronise(device)
            seconds[name].append(clock() - start)
    slowest = torch.tensor([values[warmup:] for values in seconds.values()], dtype=torch.float64, device=device)
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    return dict(zip(seconds, slowest.tolist(), strict=True))


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, smallest and largest."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


@dataclass
class SavedActivations:
    """Bytes that autograd holds for backward, and their peak; each storage once, those of ``module`` not at all."""

    module: nn.Module
    live: dict[int, int] = field(default_factory=dict)
    bytes: int = 0
    peak: int = 0

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Counts what is saved inside."""
        parameters = {p.untyped_storage().data_ptr() for p in self.module.parameters()}

        def pack(tensor: Tensor) -> Tensor | _Held:
            own = tensor.untyped_storage().data_ptr() in parameters
            return tensor if own else _Held(tensor, self)

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x.tensor if isinstance(x, _Held) else x):
            yield

    def add(self, storage: torch.UntypedStorage, count: int) -> None:
        """Autograd takes (1) or lets go of (-1) a tensor in this storage."""
        key = storage.data_ptr()
        before = self.live.get(key, 0)
        self.live[key] = before + count
        self.bytes += storage.nbytes() * (bool(before + count) - bool(before))
        self.peak = max(self.peak, self.bytes)


def allocated(device: torch.device) -> int:
    """Bytes on a GPU, garbage collected; 0 on a CPU, which has no account of them."""
    if device.type != "cuda":
        return 0
    gc.collect()
    return torch.cuda.memory_allocated(device)


def most_memory(module: nn.Module, work: Callable[[], None], device: torch.device, before: int) -> float:
    """Bytes on the rank that has most while ``work`` runs; see :data:`MEMORY`. A collective call.

    Args:
        module: whose own parameters are not activations.
        work: during which to look.
        device: of this rank.
        before: what was :func:`allocated` before the arm was built.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        work()
        peak = torch.cuda.max_memory_allocated(device) - before
    else:
        saved = SavedActivations(module)
        with saved.counting():
            work()
        peak = saved.peak
    most = torch.tensor(float(peak), device=device)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    return most.item()


class _Held:
    """A saved tensor; gone when autograd lets go of it."""

    def __init__(self, tensor: Tensor, meter: SavedActivations) -> None:
        self.tensor, self.meter = tensor, meter
        meter.add(tensor.untyped_storage(), 1)

    def __del__(self) -> None:
        self.meter.add(self.tensor.untyped_storage(), -1)


def table(rows: Sequence[Sequence[str]]) -> str:
    """Aligned columns; the first row is the header."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [" | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([lines[0], "-+-".join("-" * width for width in widths), *lines[1:]])


def save(name: str, settings: Mapping[str, Any], result: Any, folder: Path = RESULTS) -> None:
    """Writes ``folder/name.json``: settings, versions, hardware and the result."""
    on_gpu = torch.cuda.device_count() >= settings["ranks"]
    facts = {
        "settings": dict(settings),
        "hardware": torch.cuda.get_device_name() if on_gpu else f"{os.cpu_count()} CPU cores ({platform.machine()})",
        "backend": "nccl" if on_gpu else "gloo",
        "versions": {package: version(package) for package in ("torch", "deepspeed", "timm")},
        "result": result,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(facts, indent=2) + "\n")
