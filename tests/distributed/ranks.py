"""Starts real ranks on gloo, each a process of its own, and never waits for them longer than it says."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def environment(**extra: str) -> dict[str, str]:
    """For a process that is to find the checkout's package and use one thread on the CPU."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    fixed = {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    return {**os.environ, **fixed, **extra}


def run_ranks(module: str, world_size: int, *arguments: str, timeout: float = 240.0) -> list[str]:
    """Runs ``python -m module arguments`` on every rank and returns their outputs.

    Raises:
        AssertionError: a rank failed or took longer than ``timeout`` seconds; the message holds all outputs.
    """
    codes, outputs = end_ranks([["-m", module, *arguments]] * world_size, timeout)
    report = "\n".join(f"--- rank {rank}: exit code {codes[rank]}\n{text}" for rank, text in enumerate(outputs))
    assert codes == [0] * world_size, report
    return outputs


def end_ranks(commands: Sequence[Sequence[str]], timeout: float = 240.0, **extra: str) -> tuple[list[int], list[str]]:
    """Runs Python with one command line for each rank, and returns the exit codes and the outputs.

    Raises:
        AssertionError: a rank took longer than ``timeout`` seconds; the message holds all outputs.
    """
    port, world_size = str(free_port()), len(commands)
    ranks = [
        subprocess.Popen(
            [sys.executable, *command],
            env=environment(
                RANK=str(rank),
                LOCAL_RANK=str(rank),
                WORLD_SIZE=str(world_size),
                LOCAL_SIZE=str(world_size),
                MASTER_ADDR="127.0.0.1",
                MASTER_PORT=port,
                **extra,
            ),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank, command in enumerate(commands)
    ]
    deadline = time.monotonic() + timeout
    outputs, timed_out = [], False
    for process in ranks:
        try:
            outputs.append(process.communicate(timeout=max(1.0, deadline - time.monotonic()))[0])
        except subprocess.TimeoutExpired:
            process.kill()
            outputs.append(process.communicate()[0])
            timed_out = True
    assert not timed_out, f"timed out after {timeout} s\n" + "\n--- next rank\n".join(outputs)
    return [process.returncode for process in ranks], outputs
