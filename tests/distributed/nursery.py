"""Launch after launch of real ranks, forked from one process that has imported everything already.

It ends a job as the deepspeed launcher does: when a rank has failed, the others get SIGTERM, and SIGKILL much later.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from distributed.ranks import environment, free_port

LAUNCHER_LOOKS = 1.0
"""Seconds between two looks of the launcher at its ranks."""


@dataclass
class End:
    """How a launch ended."""

    codes: list[int]
    """By rank; a negative signal for a rank that one ended."""
    lasted: float
    """Seconds from the start to the end of the first rank that failed (or of all)."""
    lingered: float
    """Seconds from then to the end of the last one."""
    killed: list[int]
    """Ranks that did not end by themselves."""
    outputs: list[str] = field(default_factory=list)

    @property
    def text(self) -> str:
        return "\n".join(f"--- rank {rank}\n{text}" for rank, text in enumerate(self.outputs))


class Nursery:
    """Starts ``gppf-ds`` on several ranks, again and again."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.process = subprocess.Popen(
            [sys.executable, "-m", "distributed.nursery"],
            env=environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def launch(
        self, *arguments: str, ranks: int = 2, fault: dict[str, Any] | None = None, patience: float = 60, **signals: Any
    ) -> End:
        """Runs to the end.

        Args:
            arguments: of ``gppf-ds``.
            ranks: how many.
            fault: to plant; see :mod:`distributed.planted`.
            patience: seconds for a failed job's ranks to end by themselves, SIGTERM included.
            signals: ``number``, ``rank`` and ``line``: a signal to a rank once it has printed this.
        """
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        order = {"arguments": arguments, "ranks": ranks, "fault": fault, "patience": patience, "signal": signals}
        self.process.stdin.write(json.dumps({**order, "folder": str(self.folder)}) + "\n")
        self.process.stdin.flush()
        end = End(**json.loads(self.process.stdout.readline()))
        end.outputs = [(self.folder / f"rank-{rank}.txt").read_text() for rank in range(ranks)]
        return end

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            self.process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self.process.kill()


@contextlib.contextmanager
def nursery(folder: Path) -> Iterator[Nursery]:
    folder.mkdir(parents=True, exist_ok=True)
    made = Nursery(folder)
    try:
        yield made
    finally:
        made.close()


def _start(order: dict[str, Any], rank: int, port: int, output: int) -> int:
    child = os.fork()
    if child:
        os.close(output)
        return child
    try:
        from distributed import planted

        os.dup2(output, 1)
        os.dup2(output, 2)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        world = {"WORLD_SIZE": order["ranks"], "LOCAL_SIZE": order["ranks"], "RANK": rank, "LOCAL_RANK": rank}
        os.environ.update({key: str(value) for key, value in world.items()}, MASTER_ADDR="127.0.0.1")
        os.environ.update(MASTER_PORT=str(port), PLANTED=json.dumps(order["fault"]) if order["fault"] else "")
        sys.argv = ["gppf-ds", *order["arguments"]]
        planted.main()
    except SystemExit as end:
        sys.stdout.flush()
        os._exit(int(end.code or 0))
    except BaseException:
        traceback.print_exc()
    os._exit(1)


class _Log:
    """What a rank prints, through a pipe: a planted limit to the size of files must not silence it."""

    def __init__(self, path: Path) -> None:
        self.file = path.open("wb", buffering=0)
        self.reader, self.writer = os.pipe()
        os.set_blocking(self.reader, False)

    def drain(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while read := os.read(self.reader, 65536):
                self.file.write(read)

    def close(self) -> None:
        self.drain()
        os.close(self.reader)
        self.file.close()


def _run(order: dict[str, Any]) -> End:
    started, port = time.monotonic(), free_port()
    logs = [_Log(Path(order["folder"]) / f"rank-{rank}.txt") for rank in range(order["ranks"])]
    alive = {_start(order, rank, port, log.writer): rank for rank, log in enumerate(logs)}
    codes, killed = [0] * order["ranks"], []
    failed, told, limit = None, False, 300.0
    while alive:
        done, status = os.waitpid(-1, os.WNOHANG)
        now = time.monotonic() - started
        if done:
            rank = alive.pop(done)
            codes[rank] = os.waitstatus_to_exitcode(status)
            failed = now if failed is None and codes[rank] else failed
            continue
        if failed is not None and not told and now > failed + LAUNCHER_LOOKS:
            told = True
            for process in alive:
                os.kill(process, signal.SIGTERM)
        if now > (limit if failed is None else failed + order["patience"]):
            for process, rank in alive.items():
                killed.append(rank)
                os.kill(process, signal.SIGKILL)
            limit = order["patience"] = 10**6
        for log in logs:
            log.drain()
        _signal(order, alive)
        time.sleep(0.02)
    for log in logs:
        log.close()
    now = time.monotonic() - started
    return End(codes, failed or now, now - (failed or now), killed)


def _signal(order: dict[str, Any], alive: dict[int, int]) -> None:
    wanted = order["signal"]
    if wanted and wanted["line"] in (Path(order["folder"]) / f"rank-{wanted.get('rank', 0)}.txt").read_text():
        for process, rank in alive.items():
            if rank == wanted.get("rank", 0):
                os.kill(process, wanted["number"])
        wanted.clear()


def main() -> None:
    import deepspeed  # noqa: F401
    import timm  # noqa: F401

    from distributed import planted  # noqa: F401
    from gppf_ds.train import commands  # noqa: F401

    for line in sys.stdin:
        end = asdict(_run(json.loads(line)))
        print(json.dumps(end), flush=True)


if __name__ == "__main__":
    main()
