"""``gppf-ds train --restarts N``: launches a run again, from its last checkpoint, when it has ended before its time.

The whole launch is started anew, through whatever launcher the user names. DeepSpeed 0.19 has no elastic agent any
more, and torch's restarts the ranks of one machine, with no regard to whether the run can be mended by a new start.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

from gppf_ds.errors import UserError
from gppf_ds.train import record
from gppf_ds.train.checkpoint import complete
from gppf_ds.train.stopping import FILE, SIGNALS

PAUSE = 3.0
"""Seconds before a new start, for ports and memory to come free."""


def supervise(arguments: Sequence[str], restarts: int, launch: str, folder: Path) -> int:
    """Launches a run until it is finished or stopped, and returns the exit code.

    SIGTERM and SIGUSR1 stop the run with a checkpoint, on all its machines, through the file ``stop`` in its folder.

    Args:
        arguments: of ``gppf-ds``, from the command on, without those of the supervision.
        restarts: how often a run that failed is started again without having got to a new checkpoint.
        launch: what starts ``gppf-ds`` on every rank.
        folder: of the run.

    Raises:
        UserError: this process is a rank itself, or the launch command does not exist.
    """
    if "RANK" in os.environ:
        raise UserError(
            "--restarts belongs outside of the launcher, which it starts: "
            "gppf-ds train --restarts 3 --launch 'deepspeed --hostfile hostfile --module gppf_ds' ..."
        )
    command = [*shlex.split(launch), *arguments]
    (folder / FILE).unlink(missing_ok=True)
    left, newest = restarts, _newest(folder)
    with _signals_told(folder) as told:
        while True:
            record.write_state(folder, "starting")
            code = _run(command)
            if record.read_state(folder).get("state") in ("finished", "stopped"):
                return 0
            if code == 2 or told:
                return code or 1
            now = _newest(folder)
            left, newest = (left if now == newest else restarts), now
            if left == 0:
                print(
                    f"given up: {restarts} restarts did not get to a new checkpoint (exit code {code})", file=sys.stderr
                )
                return code or 1
            left -= 1
            number = f"restart {restarts - left} of {restarts}"
            place = f"from {newest.name}" if newest else "from the beginning"
            record.decide(folder, None, "restart", f"the launch ended with code {code}; going on {place} ({number})")
            print(f"the launch ended with code {code}: going on {place} ({number})", flush=True)
            time.sleep(PAUSE)


def _newest(folder: Path) -> Path | None:
    return next(iter(complete(folder / "checkpoints")[-1:]), None)


def _run(command: Sequence[str]) -> int:
    """The exit code of a launch, of which nothing is left running on this machine."""
    try:
        process = subprocess.Popen(command, start_new_session=True)
    except OSError as error:
        raise UserError(f"--launch: {command[0]} cannot be started ({error.strerror}).") from error
    try:
        return process.wait()
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


@contextmanager
def _signals_told(folder: Path) -> Iterator[list[int]]:
    """Inside, a signal to stop is handed on to the ranks; yields the signals that came."""
    told: list[int] = []

    def tell(number: int, _: FrameType | None) -> None:
        told.append(number)
        with suppress(OSError):
            (folder / FILE).touch()

    before = {number: signal.signal(number, tell) for number in SIGNALS}
    try:
        yield told
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
