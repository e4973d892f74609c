"""Runs shared by workers on any number of machines: each takes what no other has, and what a dead one left behind."""

from __future__ import annotations

import fcntl
import json
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from gppf_ds.errors import UserError

Outcome = Literal["done", "failed", "taken"]


def work(folder: Path, missing: Callable[[], Sequence[Sequence[str]]]) -> Outcome:
    """Does what a run lacks, unless it is another worker's ("taken"); what failed is left for the next start.

    Args:
        folder: of the run.
        missing: the commands still to run, in order; asked once the run is this worker's.
    """
    with _claimed(folder) as descriptor:
        if descriptor is None:
            return "taken"
        for command in missing():
            print(shlex.join(command), flush=True)
            # The run holds the claim too: it outlives a worker that is killed.
            code = subprocess.run(command, pass_fds=(descriptor,), check=False).returncode
            if code:
                print(f"{folder}: the run ended with code {code}, see above.", file=sys.stderr, flush=True)
                return "failed"
        return "done"


@contextmanager
def _claimed(folder: Path) -> Iterator[int | None]:
    """A lock on the folder's claim file, or None where another worker has it; the system lets go of a dead worker's."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "claim").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield None
            return
        except OSError as error:
            raise UserError(f"{folder} is on a file system without locks ({error.strerror}): move output.") from error
        yield file.fileno()


def result(folder: Path, steps: int) -> dict[str, dict[str, float]] | None:
    """The metrics by task of a run that has come to its end, else None."""
    path = folder / "results.json"
    entries = json.loads(path.read_text()) if path.is_file() else []
    done = [entry["metrics"] for entry in entries if entry["step"] >= steps]
    return done[-1] if done else None
