"""How a rank that fails ends the job with its own cause on screen, and not with what its peers saw of it."""

from __future__ import annotations

import os
import sys
import traceback
from pathlib import Path

from gppf_ds.errors import UserError


def fail(error: BaseException, folder: Path) -> None:
    """Reports an error that ended this rank and exits: 2 for the user's to mend, 1 otherwise.

    The first rank to fail writes ``folder/cause.txt`` and prints the cause. A rank that fails later (its peer has gone
    in the middle of a collective) finds the file of the same launch and keeps its own traceback to one line. The
    launcher ends all ranks when one has ended; exiting without clean-up makes sure that this one does.
    """
    rank = os.environ.get("RANK", "0")
    launch = f"{os.environ.get('MASTER_ADDR', '')}:{os.environ.get('MASTER_PORT', '')}"
    cause = folder / "cause.txt"
    if isinstance(error, UserError):
        text = f"error: {error}"
    else:
        text = f"rank {rank} failed:\n" + "".join(traceback.format_exception(error))
    if _first(cause, launch, text):
        print(text, file=sys.stderr)
    else:
        print(f"rank {rank} stops because another rank failed (see {cause})", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(2 if isinstance(error, UserError) else 1)


def forget(folder: Path) -> None:
    """Removes what an earlier launch left."""
    (folder / "cause.txt").unlink(missing_ok=True)


def _first(cause: Path, launch: str, text: str) -> bool:
    """Whether this rank is the first of its launch to fail; records the cause if so."""
    try:
        if cause.exists() and cause.read_text().startswith(launch + "\n"):
            return False
        cause.parent.mkdir(parents=True, exist_ok=True)
        pending = cause.with_name(f"cause.{os.getpid()}")
        pending.write_text(f"{launch}\n{text}\n")
        pending.replace(cause)
    except OSError:
        pass  # a full or read-only disk must not hide the cause
    return True
