"""What all mixture-of-experts layers share: the routers of the tasks, the choice of experts, the statistics."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from gppf_ds.backbone.moe.call import Call
from gppf_ds.backbone.moe.dispatch import Dispatch
from gppf_ds.backbone.moe.exchange import ExpertGroup
from gppf_ds.backbone.moe.router import Router
from gppf_ds.errors import UserError

GateNorm = Literal["topk", "full"]
"""Gates are probabilities, renormalised over the chosen k, or as the softmax over all experts left them."""

MiSource = Literal["probs", "gates"]
"""What row 0 of the statistics sums: the probabilities of all experts, or the gates of the chosen ones."""


class MoeLayer(nn.Module):
    """Experts, and for every task a router over those that it sees.

    Args:
        width: C of the tokens.
        make: an expert.
        experts: their ids, in the order of the statistics.
        routers: for every task the ids of the experts that it sees.
        top_k: for every task how many experts a token chooses; may be changed at run time.
        gate_norm: see :data:`GateNorm`. With ``topk`` removing experts that nobody chooses changes no output. At k = 1
            it makes every gate 1, so that only the mutual-information loss trains the router.
        mi_source: see :data:`MiSource`.
        detach_statistics: the gradient of the statistics reaches the router's weights only, not the tokens.

    Raises:
        UserError: a router sees an expert that is not there, or a task chooses more experts than it sees.
    """

    def __init__(
        self,
        width: int,
        make: Callable[[], nn.Module],
        experts: Sequence[int],
        routers: Mapping[str, Sequence[int]],
        top_k: Mapping[str, int],
        gate_norm: GateNorm = "topk",
        mi_source: MiSource = "probs",
        detach_statistics: bool = True,
    ) -> None:
        super().__init__()
        self.width = width
        self.top_k = dict(top_k)
        self.gate_norm = gate_norm
        self.mi_source = mi_source
        self.detach_statistics = detach_statistics
        self.count = len(experts)
        self.group: ExpertGroup | None = None
        """Where ranks share out the experts, and :attr:`experts` are this rank's."""
        self.experts = nn.ModuleDict({str(expert): make() for expert in experts})
        slots = {expert: slot for slot, expert in enumerate(experts)}
        self.routers = nn.ModuleDict()
        for task, visible in routers.items():
            if missing := sorted(set(visible) - set(slots)):
                raise UserError(f"task {task!r}: its router sees experts {missing}, which the layer does not have.")
            self.routers[task] = Router(width, visible, [slots[expert] for expert in visible])
            self._chosen(task)

    def _chosen(self, task: str) -> int:
        """k of the task, judged."""
        k, visible = self.top_k[task], len(self.routers[task].experts)  # type: ignore[arg-type]
        if not 1 <= k <= visible:
            raise UserError(f"task {task!r}: top_k is {k}, but its router sees {visible} experts: set 1 to {visible}.")
        return k

    def route(self, tokens: Tensor, call: Call) -> tuple[Dispatch, Tensor]:
        """Chooses experts and leaves the statistics.

        Args:
            tokens: (n, C), zeros where padding.
            call: of the pass.

        Returns:
            Where the tokens go, and their gates (n, k) in fp32.
        """
        k, router = self._chosen(call.task), self.routers[call.task]
        padding = None if call.padding is None else call.padding.flatten()
        logs = router(tokens)
        best, chosen = logs.topk(k)
        slots = router.slots[chosen]  # type: ignore[index]
        if padding is not None:
            slots = slots.masked_fill(padding[:, None], self.count)
        dispatch = Dispatch(slots, self.count, padding is not None)
        own = router(tokens.detach()) if self.detach_statistics and torch.is_grad_enabled() else logs
        call.statistics.append(self._statistics(router, own, chosen, dispatch.counts, padding))
        return dispatch, self._gates(best)

    def _gates(self, best: Tensor) -> Tensor:
        return best.softmax(-1) if self.gate_norm == "topk" else best.exp()

    def _statistics(
        self, router: nn.Module, logs: Tensor, chosen: Tensor, counts: Tensor, padding: Tensor | None
    ) -> Tensor:
        """(3, E), see :class:`Call`; ``logs`` (n, E_visible), ``chosen`` (n, k)."""
        probs = logs.exp()
        source = probs
        if self.mi_source == "gates":
            source = torch.zeros_like(probs).scatter(1, chosen, self._gates(logs.gather(1, chosen)))
        both = torch.stack([source, probs * logs])
        if padding is not None:
            both = both.masked_fill(padding[:, None], 0)
        rows = both.new_zeros(3, self.count)
        rows = rows.index_copy(1, router.slots, torch.cat([both.sum(1), both.new_zeros(1, both.shape[-1])]))  # type: ignore[arg-type]
        return torch.stack([rows[0], counts.to(rows.dtype), rows[1]])


def without_padding(x: Tensor, call: Call) -> Tensor:
    """x (..., C) with zeros where padding; its gradient is zero there too."""
    return x if call.padding is None else x.masked_fill(call.padding.unsqueeze(-1), 0)
