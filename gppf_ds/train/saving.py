"""Writing checkpoints beside the training, which stands still only while the values are copied to host memory.

Every rank copies its part and goes on; a thread of its own writes and hashes the copy. No thread takes part in a
collective: ranks report their files through the job's key-value store, and the thread of rank 0, once all have,
writes the manifest and renames the folder. At most one checkpoint is on its way at any time.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import threading
import time
import uuid
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from gppf_ds.errors import UserError
from gppf_ds.simt.masked import Fragment
from gppf_ds.train.checkpoint import FORMAT, TrainState, complete, describe, slices_of

_NICENESS = 10
"""Of threads that write: a tenth of a core's time that training wants too."""
POLL = 0.05
"""Seconds between two looks at what the other ranks have reported."""

_numbers = count()
"""All ranks make their savers in the same order, and so give them the same names in the store."""


@dataclass(frozen=True)
class Saved:
    """A checkpoint that this rank has written; rank 0's is complete."""

    path: Path
    step: int
    stall: float
    """Seconds for which the training stood still, waiting for the checkpoint before included."""
    writing: float
    """Seconds from then on until this rank's part was on disk (rank 0: until the checkpoint was complete)."""


class Saver:
    """Writes the checkpoints of a run; made by every rank at the same time.

    Args:
        folder: of all checkpoints of the run.
        keep: how many of them to leave there.
        timeout: seconds that rank 0, done with its own part, waits for those of the others.
        background: write beside the training; otherwise :meth:`save` returns when the checkpoint is complete.

    Attributes:
        newest: the last complete checkpoint before this launch, as rank 0 sees it; a shared folder may lag elsewhere.
    """

    def __init__(self, folder: Path, keep: int, timeout: float = 600.0, background: bool = True) -> None:
        self.folder = folder
        self.keep = keep
        self.timeout = timeout
        self.background = background
        self._rank, self._world_size = dist.get_rank(), dist.get_world_size()
        group: Any = dist.group.WORLD
        self._store = dist.PrefixStore(f"gppf_ds/saver/{next(_numbers)}", group.get_group_store())
        if self._rank == 0:
            for leftover in folder.glob(".step-*.incomplete"):
                shutil.rmtree(leftover, ignore_errors=True)
            newest = [path.name for path in complete(folder)[-1:]]
            self._store.set("launch", json.dumps([uuid.uuid4().hex[:8], *newest]))
        self._launch, *found = json.loads(self._store.get("launch"))
        self.newest = folder / found[0] if found else None
        self._count = 0
        self._copies: dict[str, Tensor] = {}
        self._thread: _Thread | None = None

    def save(self, state: TrainState, fragments: Iterable[Fragment], shared: dict[str, Tensor]) -> Path:
        """Starts to write ``folder/step-N`` and returns its path, where it will be once it is complete.

        Every rank calls it at the same step.

        Args:
            state: step and cursors.
            fragments: what this rank owns.
            shared: tensors that every rank holds alike (buffers, controllers); rank 0 writes them.

        Raises:
            UserError: this rank could not write the checkpoint before (or, without ``background``, this one).
        """
        started = time.perf_counter()
        self.wait()
        fragments = list(fragments)
        own = {f"{f.name}@{f.start}@{kind}": tensor for f in fragments for kind, tensor in slices_of(f)}
        own = self._copy(own | (shared if self._rank == 0 else {}))
        common = {key: own.pop(key) for key in (shared if self._rank == 0 else ())}
        shapes = {f.name: json.dumps(f.shape) for f in fragments}
        text = json.dumps({"format": FORMAT, **asdict(state)}, indent=1)
        final = self.folder / f"step-{state.step:08d}"
        building = self.folder / f".{final.name}.{self._launch}-{self._count}.incomplete"
        number, self._count = self._count, self._count + 1
        stall = time.perf_counter() - started

        def write() -> Saved:
            begun = time.perf_counter()
            building.mkdir(parents=True, exist_ok=True)
            name = f"rank-{self._rank:05d}.safetensors"
            entries = {name: _write(building / name, own, shapes)}
            if self._rank == 0:
                entries["shared.safetensors"] = _write(building / "shared.safetensors", common)
                entries["state.json"] = _write_text(building / "state.json", text)
                self._complete(building, final, {**entries, **self._reports(number)})
            else:
                self._store.set(f"{number}/{self._rank}", json.dumps(entries))
            return Saved(final, state.step, stall, time.perf_counter() - begun)

        self._thread = _Thread(write, state.step)
        self._thread.start()
        if not self.background:
            self.finish()
        return final

    def check(self) -> Saved | None:
        """What has been written since the last call, if anything; costs nothing.

        Raises:
            UserError: this rank could not write its part.
        """
        thread = self._thread
        if thread is None or thread.is_alive():
            return None
        self._thread = None
        if thread.error is not None:
            raise self._explained(thread.error, thread.step) from thread.error
        return thread.saved

    def wait(self) -> Saved | None:
        """As :meth:`check`, after this rank's part of the checkpoint on its way is on disk."""
        if self._thread is not None:
            self._thread.join()
        return self.check()

    def finish(self) -> Saved | None:
        """As :meth:`check`, after the checkpoint on its way is complete; a collective call."""
        saved = self.wait()
        dist.barrier()
        return saved

    def _copy(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Copies in host memory, which serves all checkpoints: the pages of fresh memory would take longest."""
        held, self._copies = self._copies, {}
        for key, tensor in tensors.items():
            copy = held.get(key)
            if copy is None or copy.shape != tensor.shape or copy.dtype != tensor.dtype:
                copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            self._copies[key] = copy.copy_(tensor.detach(), non_blocking=True)
        if any(tensor.is_cuda for tensor in tensors.values()):
            torch.cuda.synchronize()
        return dict(self._copies)

    def _reports(self, number: int) -> dict[str, Any]:
        """What the other ranks have written, from all of them."""
        deadline = time.monotonic() + self.timeout
        missing = set(range(1, self._world_size))
        entries: dict[str, Any] = {}
        while missing:
            for rank in sorted(missing):
                key = f"{number}/{rank}"
                if self._store.check([key]):
                    entries |= json.loads(self._store.get(key))
                    self._store.delete_key(key)
                    missing.remove(rank)
            if missing and time.monotonic() > deadline:
                ranks = ", ".join(map(str, sorted(missing)))
                raise RuntimeError(f"rank 0 waited {self.timeout:g} s for the checkpoint files of the ranks {ranks}")
            time.sleep(POLL if missing else 0)
        return entries

    def _complete(self, building: Path, final: Path, files: dict[str, Any]) -> None:
        for name, entry in files.items():
            if not (building / name).is_file() or (building / name).stat().st_size != entry["bytes"]:
                raise UserError(
                    f"rank 0 does not see {building / name}, which another rank has written: the output folder must "
                    "be one that all machines share."
                )
        _write_text(building / "manifest.json", json.dumps({"format": FORMAT, "files": files}, indent=1))
        _sync(building)
        if final.exists():
            self._discard(final)
        rename(building, final)
        _sync(self.folder)
        for old in complete(self.folder)[: -self.keep]:
            self._discard(old)

    def _discard(self, path: Path) -> None:
        """Under another name first, so that a kill in between leaves no half of a checkpoint behind."""
        hidden = path.with_name(f".{path.name}.{self._launch}-{self._count}.discarded.incomplete")
        rename(path, hidden)
        shutil.rmtree(hidden)

    def _explained(self, error: BaseException, step: int) -> BaseException:
        if not isinstance(error, OSError):
            return error
        found = complete(self.folder)
        left = f"{found[-1]} is whole" if found else "no other is there yet"
        return UserError(
            f"the checkpoint of step {step} could not be written to {self.folder} ({error.strerror or error}); {left}: "
            "make room or make the folder writable, then start again to go on from there."
        )


def save(folder: Path, state: TrainState, fragments: Iterable[Fragment], shared: dict[str, Tensor], keep: int) -> Path:
    """Writes one checkpoint, ``folder/step-N``, and returns when it is complete; a collective call.

    The arguments are those of :class:`Saver` and :meth:`Saver.save`.
    """
    return Saver(folder, keep, background=False).save(state, fragments, shared)


rename = os.replace
"""What makes a checkpoint appear: a step that tests of faults interrupt."""


class _Thread(threading.Thread):
    """Its work's result or error; the process ends without waiting for it."""

    def __init__(self, work: Callable[[], Saved], step: int) -> None:
        super().__init__(name=f"checkpoint of step {step}", daemon=True)
        self.work = work
        self.step = step
        self.saved: Saved | None = None
        self.error: BaseException | None = None

    def run(self) -> None:
        with suppress(OSError):
            # Of this thread alone (Linux): hashing takes a core, and where none is idle the training goes first.
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)
        try:
            self.saved = self.work()
        except BaseException as error:
            self.error = error


def _write(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> dict[str, Any]:
    try:
        # safetensors 0.8 writes a broken header for no tensors with an empty metadata mapping.
        save_file(tensors, path, metadata or None)
    except SafetensorError as error:
        code = re.search(r"os error (\d+)", str(error))
        raise OSError(int(code[1]), os.strerror(int(code[1])), str(path)) if code else error from error
    _sync(path)
    return describe(path)


def _write_text(path: Path, text: str) -> dict[str, Any]:
    path.write_text(text)
    _sync(path)
    return describe(path)


def _sync(path: Path) -> None:
    """To disk, with its name if it is a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
