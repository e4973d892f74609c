"""The audit: every collective of a step, compared over the ranks before it starts (engine.audit).

The ranks keep one list of the step's collectives, and its end, in the job's key-value store. The first rank to come to
an entry writes it; a rank that comes with something else stops there, in one sentence. So a difference shows where it
arises, and not as a hang or as mixed-up numbers later: nothing is ever waited for.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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

END = "the end of the step"

_numbers = itertools.count()


class Audit:
    """Of one rank; all ranks make theirs in the same order."""

    def __init__(self) -> None:
        assert dist.group.WORLD is not None
        self.store = dist.PrefixStore(f"gppf_ds/audit/{next(_numbers)}", dist.group.WORLD.get_group_store())
        self.rank = dist.get_rank()
        self._keys: list[str] = []

    @contextmanager
    def step(self, step: int) -> Iterator[None]:
        """Compares what is called inside.

        Raises:
            UserError: with the step, the ranks and the first collective that differs, on the rank that comes to it
                second.
        """
        past, self._keys = self._keys, []
        with _observed(lambda line: self._compare(step, line)):
            yield
        self._compare(step, END)
        if self.rank == 0:
            # All ranks have met in a collective of this step, so that nobody looks at the one before any more.
            for key in past:
                self.store.delete_key(key)

    def _compare(self, step: int, line: str) -> None:
        key = f"{step}/{len(self._keys)}"
        self._keys.append(key)
        entry = bytes(self.store.compare_set(key, "", f"{self.rank} {line}")).decode()
        rank, _, written = entry.partition(" ")
        if written != line:
            raise UserError(
                f"audit of step {step}: its collective {len(self._keys)} is {line} on rank {self.rank} and {written} "
                f"on rank {rank}. All ranks must call the same collectives in the same order: a task must not call "
                "torch.distributed on its own."
            )


@contextmanager
def _observed(note: Callable[[str], None]) -> Iterator[None]:
    """Calls ``note`` with a description of every collective that this process is about to start inside."""
    originals = {name: getattr(dist.ProcessGroup, name) for name in OPERATIONS}
    try:
        for name, original in originals.items():
            setattr(dist.ProcessGroup, name, _noting(name, original, note))
        yield
    finally:
        for name, original in originals.items():
            setattr(dist.ProcessGroup, name, original)


def _noting(name: str, original: Callable[..., Any], note: Callable[[str], None]) -> Callable[..., Any]:
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
