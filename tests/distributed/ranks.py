"""Starts real ranks on gloo, each a process of its own, and never waits for them longer than it says."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
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
    port = str(free_port())
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            env=environment(
                RANK=str(rank),
                LOCAL_RANK=str(rank),
                WORLD_SIZE=str(world_size),
                LOCAL_SIZE=str(world_size),
                MASTER_ADDR="127.0.0.1",
                MASTER_PORT=port,
            ),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(world_size)
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
    codes = [process.returncode for process in ranks]
    report = "\n".join(f"--- rank {rank}: exit code {codes[rank]}\n{text}" for rank, text in enumerate(outputs))
    assert not timed_out, f"timed out after {timeout} s\n{report}"
    assert codes == [0] * world_size, report
    return outputs
