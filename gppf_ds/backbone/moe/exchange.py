"""Rows to the ranks that hold their experts, and back: expert parallelism."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from gppf_ds.backbone.moe.dispatch import Dispatch


@dataclass(frozen=True)
class ExpertGroup:
    """The ranks that hold the experts of a layer together, each a contiguous part of them."""

    ranks: Any
    """Their process group."""
    size: int
    rank: int
    """This one's place among them."""

    def held(self, experts: int, rank: int | None = None) -> range:
        """The slots of a layer with this many experts that a rank (by default this one) holds."""
        place = self.rank if rank is None else rank
        return range(place * experts // self.size, (place + 1) * experts // self.size)

    def through(self, rows: Tensor, dispatch: Dispatch, run: Callable[[Tensor, Dispatch], Tensor]) -> Tensor:
        """Every row through its expert, wherever that is.

        Collective calls: one exchange of counts (the host waits for it), one of rows there and one back, each once more
        in backward. The ranks may bring different numbers of rows, of different tasks.

        Args:
            rows: (n k, C), sorted by expert.
            dispatch: of the rows.
            run: rows of this rank's experts, sorted by expert, and their dispatch -> rows (., C').

        Returns:
            (n k, C'), zeros for padding.
        """
        counts = dispatch.counts.long()
        gathered = [torch.empty_like(counts) for _ in range(self.size)]
        dist.all_gather(gathered, counts, group=self.ranks)
        table = torch.stack(gathered).cpu()  # (ranks, experts): how many rows come from where
        sent = [int(table[self.rank, list(self.held(dispatch.experts, other))].sum()) for other in range(self.size)]
        own = table[:, list(self.held(dispatch.experts))]
        received = own.sum(1).tolist()
        arrived = _AllToAll.apply(rows[: sum(sent)], sent, received, self.ranks)
        slots = torch.arange(own.shape[1]).repeat(self.size).repeat_interleave(own.flatten())
        here = Dispatch(slots[:, None].to(rows.device), own.shape[1], False)
        done = here.unsort(run(here.sort(arrived[:, None]), here)).squeeze(1)
        back = _AllToAll.apply(done, received, sent, self.ranks)
        return F.pad(back, (0, 0, 0, len(rows) - len(back)))


class _AllToAll(torch.autograd.Function):
    """The first ``sent[0]`` rows to rank 0, the next to rank 1, ...; and what they sent, in order."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, sent: Sequence[int], received: Sequence[int], ranks: Any) -> Tensor:
        ctx.arguments = (received, sent, ranks)
        return _all_to_all(rows, sent, received, ranks)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        return _all_to_all(grads[0], *ctx.arguments), None, None, None


def _all_to_all(rows: Tensor, sent: Sequence[int], received: Sequence[int], ranks: Any) -> Tensor:
    out = rows.new_empty(sum(received), rows.shape[1])
    dist.all_to_all_single(out, rows.contiguous(), list(received), list(sent), group=ranks)
    return out
