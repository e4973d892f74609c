"""Stopping early with a checkpoint, at one step for all ranks: when the machine is wanted back, or by hand.

A request is a SIGTERM or SIGUSR1 to any rank, or a file ``stop`` in the run's folder, which reaches a run on any
number of machines. A launcher also sends SIGTERM when one of its ranks has died: the others then cannot go on to the
end of the step, and must not be waited for.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import torch.distributed as dist

from gppf_ds.train import faults

FILE = "stop"
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
LOOK_EVERY = 1.0
"""Seconds between two looks for the file; by rank 0 alone."""

_numbers = count()
"""All ranks make theirs in the same order, and so give them the same names in the store."""


class Stop:
    """Whether and where the run stops early; made by every rank at the same time.

    The ranks agree through the job's key-value store. One that hears a request when ``s`` steps are done writes down
    ``s + 1`` before it takes part in the next step, which no rank can end without it: so all have read it by then.

    Args:
        folder: of the run.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.rank = dist.get_rank()
        group: Any = dist.group.WORLD
        self._store = dist.PrefixStore(f"gppf_ds/stop/{next(_numbers)}", group.get_group_store())
        self._store.set(f"rank/{self.rank}", json.dumps([socket.gethostname(), os.getpid()]))
        self._heard: str | None = None
        self._agreed: tuple[int, str] | None = None
        self._looked = 0.0

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Inside, signals are requests; elsewhere they do what they always do."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        before = {number: signal.signal(number, self._hear) for number in SIGNALS}
        wakeup = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        threading.Thread(target=self._watch, args=(reader,), name="signals", daemon=True).start()
        try:
            yield
        finally:
            signal.set_wakeup_fd(wakeup)
            for number, handler in before.items():
                signal.signal(number, handler)
            os.close(writer)

    def asked(self, step: int) -> str | None:
        """Why all ranks stop now that ``step`` steps are done, if so: the same answer on every rank."""
        if self._heard is None and self.rank == 0 and time.monotonic() > self._looked + LOOK_EVERY:
            self._looked = time.monotonic()
            if (self.folder / FILE).exists():
                self._heard = f"the file {self.folder / FILE}"
        if self._agreed is None:
            if self._heard is not None:
                self._store.compare_set("at", "", json.dumps([step + 1, self._heard]))
            if self._store.check(["at"]):
                self._agreed = tuple(json.loads(self._store.get("at")))
        return self._agreed[1] if self._agreed is not None and step >= self._agreed[0] else None

    def done(self) -> None:
        """Forgets the request: the checkpoint is there, and the next launch is to go on."""
        if self.rank == 0:
            (self.folder / FILE).unlink(missing_ok=True)

    def _hear(self, number: int, _: object) -> None:
        self._heard = signal.Signals(number).name

    def _watch(self, reader: int) -> None:
        """Ends this rank after SIGTERM if the job has failed: nobody else can, while it waits in a collective."""
        while True:
            told = os.read(reader, 64)
            if not told:
                os.close(reader)
                return
            while signal.SIGTERM in told and self._agreed is None:
                if faults.recorded(self.folder) or self._peer_is_gone():
                    sentence = f"rank {self.rank} ends because another rank failed; it was in {_place()}"
                    faults.leave(self.folder, sentence)
                time.sleep(0.2)

    def _peer_is_gone(self) -> bool:
        """Whether a rank of this machine has ended, or the store, which outlives all ranks of a healthy job."""
        try:
            ranks = [json.loads(self._store.get(f"rank/{rank}")) for rank in range(dist.get_world_size())]
            for host, process in ranks:
                if host == socket.gethostname():
                    os.kill(process, 0)
        except (RuntimeError, ProcessLookupError):
            return True
        return False


def _place() -> str:
    """Where the main thread is, from the inside out."""
    frame = sys._current_frames()[threading.main_thread().ident or 0]
    stack = traceback.extract_stack(frame)[-4:]
    return ", called from ".join(f"{entry.name} ({entry.filename}:{entry.lineno})" for entry in reversed(stack))
