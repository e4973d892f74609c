"""How a rank that fails ends the job with its own cause on screen, and not with what its peers saw of it."""

from __future__ import annotations

import hashlib
import os
import sys
import tempfile
import traceback
from pathlib import Path

from gppf_ds.errors import UserError


def first_of_launch(topic: str) -> bool:
    """Whether this process is the first of its launch, on this machine, to ask about the topic.

    Ranks that fail alike all have the same to say; this lets one of them say it, whichever it is. The claim is an
    empty file in the folder for temporary files, named after the launcher's process and the job's address.
    """
    if "RANK" not in os.environ:
        return True
    parent = os.getppid()
    try:
        started = Path(f"/proc/{parent}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        started = ""
    key = f"{os.getuid()} {parent} {started} {_launch()} {topic}"
    claim = Path(tempfile.gettempdir()) / f"gppf_ds-{hashlib.sha256(key.encode()).hexdigest()[:32]}"
    try:
        claim.touch(exist_ok=False)
    except FileExistsError:
        return False
    except OSError:
        pass  # better twice than never
    return True


def fail(error: BaseException, folder: Path | None = None) -> None:
    """Reports an error that ended this rank and exits: 2 for the user's to mend, 1 otherwise.

    The first rank to fail writes ``folder/cause.txt`` and prints the cause. A rank that fails later (its peer has gone
    in the middle of a collective) keeps its own traceback to one line. The launcher ends all ranks when one has ended;
    exiting without clean-up makes sure that this one does.

    Args:
        error: the cause.
        folder: of the run; None for a command that writes nothing.
    """
    rank = os.environ.get("RANK", "0")
    if isinstance(error, UserError):
        text = f"error: {error}"
    else:
        text = f"rank {rank} failed:\n" + "".join(traceback.format_exception(error))
    first = first_of_launch("fault")
    if folder is not None:
        first = first and _first(folder / "cause.txt", text)
    if first:
        print(text, file=sys.stderr)
    elif not isinstance(error, UserError):  # which all ranks have to say alike
        print(f"rank {rank} stops because another rank failed", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(2 if isinstance(error, UserError) else 1)


def forget(folder: Path) -> None:
    """Removes what an earlier launch left."""
    (folder / "cause.txt").unlink(missing_ok=True)


def _launch() -> str:
    return f"{os.environ.get('MASTER_ADDR', '')}:{os.environ.get('MASTER_PORT', '')}"


def _first(cause: Path, text: str) -> bool:
    """Whether this rank is the first of its launch, on all machines, to fail; records the cause if so."""
    try:
        if cause.exists() and cause.read_text().startswith(_launch() + "\n"):
            return False
        cause.parent.mkdir(parents=True, exist_ok=True)
        pending = cause.with_name(f"cause.{os.getpid()}")
        pending.write_text(f"{_launch()}\n{text}\n")
        pending.replace(cause)
    except OSError:
        pass  # a full or read-only disk must not hide the cause
    return True
