"""The audit: every rank's list of collectives in a step, compared over the ranks (engine.audit).

The lists are compared through the job's key-value store and not by a collective, so that ranks whose collectives no
longer match can still tell each other.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch import Tensor

from gppf_ds.errors import UserError

OPERATIONS = (
    "allreduce",
    "allreduce_coalesced",
    "reduce",
    "reduce_scatter",
    "_reduce_scatter_base",
    "reduce_scatter_tensor_coalesced",
    "allgather",
    "allgather_coalesced",
    "_allgather_base",
    "allgather_into_tensor_coalesced",
    "broadcast",
    "gather",
    "scatter",
    "alltoall",
    "alltoall_base",
    "barrier",
)
"""Methods of a process group. Whoever starts a collective from Python, torch.distributed or DeepSpeed, ends in one."""

GRACE = timedelta(seconds=10)
"""How long a rank whose step has failed waits for the lists of the others."""

Describe = Callable[[str], None]


class Audit:
    """Of one rank.

    Args:
        timeout: seconds after which a rank that does not end a step is taken to be stuck in it.
    """

    def __init__(self, timeout: float) -> None:
        self.timeout = timedelta(seconds=timeout)
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        assert dist.group.WORLD is not None
        self.store = dist.group.WORLD.get_group_store()

    @contextmanager
    def step(self, step: int) -> Iterator[None]:
        """Records what happens inside and compares it; a collective call.

        Raises:
            UserError: on every rank, with the step, the ranks and the first collective that differs. If the step
                itself failed for another reason, its own error.
        """
        lines: list[str] = []

        def note(line: str) -> None:
            # Published before it starts: a collective that never returns is the one to know of.
            self.store.append(self._key(step, self.rank), line + "\n")
            lines.append(line)

        patience = self.timeout
        try:
            with _recorded(note):
                yield
        except Exception as error:
            patience = GRACE
            self._compare(step, lines, patience, error)
            raise
        self._compare(step, lines, patience, None)

    def _compare(self, step: int, lines: list[str], patience: timedelta, cause: Exception | None) -> None:
        digest = hashlib.sha256("\n".join(lines).encode()).hexdigest()
        end = f"{digest} {'failed' if cause else 'done'}"
        self.store.set(self._key(step, self.rank) + "/end", end)
        ends = [self._end(step, rank, patience) for rank in range(self.world_size)]
        if any(other is None or other.split()[0] != digest for other in ends):
            difference = first_difference([self._lines(step, rank) for rank in range(self.world_size)], ends)
            if difference is not None:
                raise UserError(
                    f"audit of step {step}: {difference}. All ranks must call the same collectives in the same order: "
                    "a task must not call torch.distributed on its own."
                ) from cause
        if step > 0:  # everybody has ended this step, so nobody looks at the one before any more
            self.store.delete_key(self._key(step - 1, self.rank))
            self.store.delete_key(self._key(step - 1, self.rank) + "/end")

    def _end(self, step: int, rank: int, patience: timedelta) -> str | None:
        """How a rank ended the step; None if it has not."""
        try:
            self.store.wait([self._key(step, rank) + "/end"], patience)
        except (RuntimeError, ValueError):
            return None
        return bytes(self.store.get(self._key(step, rank) + "/end")).decode()

    def _lines(self, step: int, rank: int) -> list[str]:
        key = self._key(step, rank)
        return bytes(self.store.get(key)).decode().splitlines() if self.store.check([key]) else []

    @staticmethod
    def _key(step: int, rank: int) -> str:
        return f"gppf_ds/audit/{step}/{rank}"


def first_difference(lists: list[list[str]], ends: list[str | None]) -> str | None:
    """The first collective in which a rank differs from rank 0, in words; None where no rank does.

    Args:
        lists: of every rank.
        ends: how every rank ended the step; None where it has not.
    """
    for number in range(max(map(len, lists))):
        lines = [own[number] if number < len(own) else None for own in lists]
        for rank, line in enumerate(lines):
            if line != lines[0]:
                first, other = (_say(r, lines[r], ends[r]) for r in (0, rank))
                return f"collective {number + 1} is {other}, but {first}"
    return None


def _say(rank: int, line: str | None, end: str | None) -> str:
    if line is not None:
        return f"{line} on rank {rank}"
    return f"missing on rank {rank}" + ("" if end else ", which is still waiting for the one before")


@contextmanager
def _recorded(note: Describe) -> Iterator[None]:
    """Tells ``note`` about every collective that this process starts inside."""
    originals = {name: getattr(dist.ProcessGroup, name) for name in OPERATIONS}
    try:
        for name, original in originals.items():
            setattr(dist.ProcessGroup, name, _noting(name, original, note))
        yield
    finally:
        for name, original in originals.items():
            setattr(dist.ProcessGroup, name, original)


def _noting(name: str, original: Callable[..., Any], note: Describe) -> Callable[..., Any]:
    def call(group: dist.ProcessGroup, *args: Any, **kwargs: Any) -> Any:
        tensors = list(_tensors([*args, *kwargs.values()]))
        numbers = "+".join(str(tensor.numel()) for tensor in tensors) or "nothing"
        kinds = "/".join(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors}))
        note(f"{name.strip('_')} of {numbers} {kinds}".rstrip() + f" ({group.size()} ranks)")
        return original(group, *args, **kwargs)

    return call


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)
