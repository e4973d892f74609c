"""How a rank that fails ends the job with its own cause on screen, and not with what its peers saw of it."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import sys
import tempfile
import time
import traceback
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from gppf_ds.errors import UserError
from gppf_ds.train import record

_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG}
"""Errors of a disk that is written; others may come from a file that is read."""
_CAUSE = "cause.txt"
"""In the run's folder: the first line names the launch."""


def first_of_launch(topic: str) -> bool:
    """Whether this process is the first of its launch, on this machine, to ask about the topic.

    Ranks that fail alike all have the same to say; this lets one of them say it, whichever it is. The claim is a file
    in the folder for temporary files, named after the launcher's process and the job's address. One from before this
    process is of an earlier launch: a shell may start ranks twice with the same address.
    """
    if "RANK" not in os.environ:
        return True
    parent = os.getppid()
    key = f"{os.getuid()} {parent} {_started(parent)} {_launch()} {topic}"
    claim = Path(tempfile.gettempdir()) / f"gppf_ds-{hashlib.sha256(key.encode()).hexdigest()[:32]}"
    try:
        descriptor = os.open(claim, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        with os.fdopen(descriptor, "r+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            claimed = float(file.read() or "-inf")
            if claimed >= _started(os.getpid()):
                return False
            file.seek(0)
            file.truncate()
            file.write(str(time.clock_gettime(time.CLOCK_BOOTTIME)))
    except (OSError, ValueError):
        pass  # better twice than never
    return True


def _started(process: int) -> float:
    """Seconds from the machine's start to the process's, rounded up; 0 where nobody may know."""
    try:
        ticks = int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[19])
    except OSError:
        return 0.0
    return (ticks + 1) / os.sysconf("SC_CLK_TCK")


def fail(error: BaseException, folder: Path | None = None) -> None:
    """Reports an error that ended this rank and exits: 2 for the user's to mend, 1 otherwise.

    The first rank to fail writes ``folder/cause.txt`` and prints the cause. A rank that fails later (its peer has gone
    in the middle of a collective) keeps its own traceback to one line. The launcher ends all ranks when one has ended;
    exiting without clean-up makes sure that this one does.

    Args:
        error: the cause.
        folder: of the run; None for a command that writes nothing.
    """
    error = _of_the_folder(error, folder) or error
    code = 2 if isinstance(error, UserError) else 1
    try:
        _report(error, folder)
        sys.stdout.flush()
        sys.stderr.flush()
    finally:  # where the log's own disk is full, too
        os._exit(code)


def _report(error: BaseException, folder: Path | None) -> None:
    rank = os.environ.get("RANK", "0")
    if isinstance(error, UserError):
        text = f"error: {error}"
    else:
        text = f"rank {rank} failed:\n" + "".join(traceback.format_exception(error))
        if "by peer" in str(error):  # as gloo and NCCL say it
            text += (
                "The rank at the other end has ended without a word: it was killed, memory ran out, or its machine is "
                "gone. The launcher's lines tell its exit code, the system's log who killed it."
            )
    first = first_of_launch("fault")
    if folder is not None:
        first = first and _first(folder / _CAUSE, text)
    if first:
        if folder is not None and record.read_state(folder).get("state") in ("starting", "running"):
            record.write_state(folder, "failed")
            with suppress(OSError):
                record.decide(folder, None, "failure", str(error) or type(error).__name__)
        print(text, file=sys.stderr)
    elif not isinstance(error, UserError):  # which all ranks have to say alike
        print(f"rank {rank} stops because another rank failed{_told_in(folder)}", file=sys.stderr)


def _told_in(folder: Path | None) -> str:
    """Where the cause is to be read, for the end of a sentence; nothing where no rank could write it down."""
    if folder is None:
        return ""
    deadline = time.monotonic() + 1.0  # a rank that failed at the same moment may be about to write it
    while not recorded(folder):
        if time.monotonic() > deadline:
            return ""
        time.sleep(0.05)
    return f"; the cause is in {folder / _CAUSE}"


def recorded(folder: Path) -> bool:
    """Whether a rank of this launch, on any machine, has failed and left its cause."""
    try:
        return (folder / _CAUSE).read_text().startswith(_launch() + "\n")
    except OSError:
        return False


def leave(folder: Path, sentence: str) -> NoReturn:
    """Ends this rank, healthy or hung, after another one has failed; the sentence is added to the cause."""
    print(sentence + _told_in(folder), file=sys.stderr, flush=True)
    if recorded(folder):
        with suppress(OSError), (folder / _CAUSE).open("a") as file:
            file.write(f"{sentence}\n")
    os._exit(1)


def forget(folder: Path) -> None:
    """Removes what an earlier launch left."""
    (folder / _CAUSE).unlink(missing_ok=True)


def _launch() -> str:
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return f"{os.environ.get('MASTER_ADDR', '')}:{os.environ.get('MASTER_PORT', '')}" + f"#{attempt}" * (attempt != "0")


def _of_the_folder(error: BaseException, folder: Path | None) -> UserError | None:
    """The sentence for a disk that is full, or a run folder that cannot be written."""
    if folder is None or not isinstance(error, OSError) or error.errno is None:
        return None
    if error.errno not in _NO_ROOM and not str(error.filename).startswith(str(folder)):
        return None
    return UserError(
        f"{error.filename or folder} cannot be written ({os.strerror(error.errno)}); complete checkpoints stay as they "
        "are: make room or make the folder writable, then start again to go on from the last one."
    )


def _first(cause: Path, text: str) -> bool:
    """Whether this rank is the first of its launch, on all machines, to fail; records the cause if so."""
    try:
        if recorded(cause.parent):
            return False
        cause.parent.mkdir(parents=True, exist_ok=True)
        pending = cause.with_name(f"cause.{os.getpid()}")
        pending.write_text(f"{_launch()}\n{text}\n")
        pending.replace(cause)
    except OSError:
        pass  # a full or read-only disk must not hide the cause
    return True
