"""Experts spread over ranks, in DeepSpeed's expert groups.

DeepSpeed lays consecutive ranks into a group that holds every expert once (``ep_size``); ranks with the same place in
their groups hold the same experts, and sum up and partition their gradients among each other (DeepSpeed-MoE, arXiv
2201.05596). It recognises such parameters by two attributes, and such models by a module of its class MoE. Its own
layer has one gate for all tasks and buffers of equal capacity, so that class serves as a mark here and nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gppf_ds.backbone.moe.exchange import ExpertGroup
from gppf_ds.backbone.moe.mlp import MoeMlp
from gppf_ds.errors import UserError
from gppf_ds.simt.model import SimtModel
from gppf_ds.simt.usage import Owner


class ExpertParallel:
    """Takes the experts of other ranks out of a model.

    The experts of MoE-MLPs are spread, which hold nearly all parameters; those of attention, which are small, stay on
    every rank.

    Args:
        model: whole, equal on every rank, not yet with DeepSpeed; changed in place.
        size: ranks that hold every expert once.

    Attributes:
        peers: the process group of the ranks that hold the same experts as this one.

    Raises:
        UserError: the ranks do not divide into such groups, or a layer has fewer experts than a group has ranks.
    """

    def __init__(self, model: SimtModel, size: int) -> None:
        if dist.get_world_size() % size:
            raise UserError(
                f"engine.expert_parallel is {size}, which does not divide the {dist.get_world_size()} ranks: set it to "
                "a divisor."
            )
        from deepspeed.utils import groups

        name = f"ep_size_{size}"
        groups._create_expert_and_data_parallel(size)
        self.model = model
        self.group = ExpertGroup(groups._get_expert_parallel_group(name), size, dist.get_rank() % size)
        self.peers = groups._get_expert_data_parallel_group(name)
        self.layers = {n: layer for n, layer in model.backbone.moe_layers().items() if isinstance(layer, MoeMlp)}
        if not self.layers:
            raise UserError("engine.expert_parallel needs MoE-MLPs: set backbone.moe.mlp_experts, or remove it.")
        self.experts = {n: list(layer.experts) for n, layer in self.layers.items()}
        for own, layer in self.layers.items():
            self._spread(own, layer, name)
        model.expert_groups = _mark(sum(map(len, self.experts.values())))

    def _spread(self, name: str, layer: MoeMlp, group: str) -> None:
        experts = self.experts[name]
        if len(experts) < self.group.size:
            raise UserError(
                f"engine.expert_parallel is {self.group.size}, but layer {name} has {len(experts)} experts: set it to "
                "at most that."
            )
        held = {experts[slot] for slot in self.group.held(len(experts))}
        for expert in experts:
            if expert not in held:
                del layer.experts[expert]
        for parameter in layer.experts.parameters():
            parameter.allreduce, parameter.group_name = False, group  # type: ignore[attr-defined]
        layer.group = self.group

    def is_spread(self, parameter: nn.Parameter) -> bool:
        """Whether only :attr:`peers` hold it."""
        return not getattr(parameter, "allreduce", True)

    def split_groups(self, optimizer: torch.optim.Optimizer) -> None:
        """Gives spread parameters groups of their own, marked as DeepSpeed wants them."""
        from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer

        named = [{**group, "name": f"group {number}"} for number, group in enumerate(optimizer.param_groups)]
        split = split_params_into_different_moe_groups_for_optimizer(named)
        optimizer.param_groups = [group for group in split if group["params"]]

    def total_norm(self, norms: Sequence[tuple[Owner, Tensor]]) -> Tensor:
        """The norm of the whole gradient, those of other ranks' experts included: a collective call.

        DeepSpeed's is a mean over expert groups, no norm.

        Args:
            norms: of the gradients of this rank's parameters, by owner.
        """
        spread = [owner[0] == "expert" and owner[1] in self.experts for owner, _ in norms]
        squares = torch.stack([norm for _, norm in norms]).float().square()
        mask = torch.tensor(spread, device=squares.device)
        experts = squares[mask].sum()
        dist.all_reduce(experts, group=self.group.ranks)
        return (squares[~mask].sum() + experts).sqrt()

    def gathered(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """A state of this rank's parameters with those of the other ranks of its expert group; a collective call."""
        whole = dict(state)
        for name, experts in self.experts.items():
            index, part = name.split(".")
            prefix = f"backbone.layers.{index}.units.0.block.{part}.experts."
            own = [key.removeprefix(prefix).split(".", 1) for key in state if key.startswith(prefix)]
            kinds = [kind for expert, kind in own if expert == own[0][0]]
            for rank in range(self.group.size):
                source = dist.get_global_rank(self.group.ranks, rank)
                for slot in self.group.held(len(experts), rank):
                    for kind in kinds:
                        like = state[f"{prefix}{own[0][0]}.{kind}"]
                        value = state.get(f"{prefix}{experts[slot]}.{kind}", torch.empty_like(like)).clone()
                        on_device = value.to(next(self.model.parameters()).device)
                        dist.broadcast(on_device, source, group=self.group.ranks)
                        whole[f"{prefix}{experts[slot]}.{kind}"] = on_device.cpu()
        return whole


def _mark(experts: int) -> nn.Module:
    """A module by which DeepSpeed sees that there are spread experts."""
    from deepspeed.moe.layer import MoE

    class Mark(MoE):
        def __init__(self) -> None:
            nn.Module.__init__(self)
            self.num_experts = experts

        def set_deepspeed_parallelism(self, *_: Any, **__: Any) -> None:
            """The groups exist already."""

    return Mark()
