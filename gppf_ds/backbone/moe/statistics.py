"""What the tokens of a step chose, over all devices of all ranks; and the losses on it.

The mutual-information loss of Mod-Squad (arXiv 2212.08066, equation 5) for heterogeneous data: tasks have other images
and other numbers of tokens, and run on other ranks, or not at all in a step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from gppf_ds.config import MoeConfig

TINY = 1e-12
"""Below this a probability is as good as 0."""


@dataclass
class Routing:
    """Of one group of devices that passed through the backbone together."""

    loss: Tensor
    """Weighted; a device's share of its gradient counts as many times as valid devices run its task."""
    users: dict[str, Tensor]
    """By MoE layer, how many valid devices of each task sent tokens to each expert: (tasks, experts), on the CPU."""


def routing_of(
    layers: Mapping[str, Any],
    tasks: Sequence[str],
    own: Sequence[tuple[str, Mapping[str, Tensor]]],
    config: MoeConfig,
) -> Routing:
    """Sums up the statistics of all devices and keeps the running ones. A collective call: one all-reduce.

    Args:
        layers: MoE layers by name.
        tasks: all that have routers, in the same order on every rank.
        own: of every valid device of this rank, its task and its statistics by layer, (3, experts) each; see
            :class:`gppf_ds.backbone.moe.call.Call`.
        config: weights of the losses.
    """
    row = {task: number for number, task in enumerate(tasks)}
    device = next(next(iter(layers.values())).buffers()).device
    local, users = {}, {}
    for name, layer in layers.items():
        sums = [torch.zeros(3, layer.count, device=device) for _ in tasks]
        used = torch.zeros(len(tasks), layer.count, device=device)
        for task, statistics in own:
            sums[row[task]] = sums[row[task]] + statistics[name]
            used[row[task]] += (statistics[name][1] > 0).float()
        local[name], users[name] = torch.stack(sums), used
    devices = torch.bincount(torch.tensor([row[task] for task, _ in own], dtype=torch.long), minlength=len(tasks))
    parts = [*(tensor.detach() for tensor in local.values()), *users.values(), devices.float().to(device)]
    flat = torch.cat([part.reshape(-1) for part in parts])
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(flat)
    groups = (local.values(), users.values(), [devices])
    sums, used, present = flat.split([sum(part.numel() for part in group) for group in groups])
    rows = _parted(sums, local)
    counts = _parted(used.cpu(), users)  # at once: a GPU is waited for at every copy
    # The task average will divide by how many devices ran the task.
    share = present[:, None, None]
    live = {name: rows[name] + share * (own - own.detach()) for name, own in local.items()}
    loss = torch.stack([losses(live[name], running_rows(layer, tasks), config) for name, layer in layers.items()]).sum()
    for name, layer in layers.items():
        keep_running(layer, tasks, rows[name], config.momentum)
    return Routing(loss, counts)


def _parted(flat: Tensor, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A flat tensor as tensors of these shapes."""
    parts = flat.split([tensor.numel() for tensor in like.values()])
    return {name: part.view_as(tensor) for part, (name, tensor) in zip(parts, like.items(), strict=True)}


def losses(sums: Tensor, running: Tensor, config: MoeConfig) -> Tensor:
    """The weighted losses of one MoE layer.

    Args:
        sums: (tasks, 3, experts), see :class:`gppf_ds.backbone.moe.call.Call`; zeros for a task that is absent.
        running: (tasks, experts), P(expert | task) of tasks that are absent; zeros for one that never ran.
        config: weights.
    """
    present = sums[:, 1].sum(-1) > 0
    tokens = sums[:, 0].detach().sum(-1, keepdim=True).clamp_min(TINY)
    rows = torch.where(present[:, None], sums[:, 0] / tokens, running)
    total = config.mutual_information * -mutual_information(rows)
    if config.token_mutual_information or config.concentration:
        share = present.float() / present.sum().clamp_min(1)
        spread = entropy(rows)
        each = -(sums[:, 2] / tokens).sum(-1)
        total = (
            total + (share * (config.concentration * spread - config.token_mutual_information * (spread - each))).sum()
        )
    return total


def mutual_information(rows: Tensor) -> Tensor:
    """I(task; expert) in nats, with P(task) equal for all tasks that have run.

    Between 0 (all tasks use experts alike) and log min(tasks, experts) (each has experts of its own).

    Args:
        rows: (tasks, experts), P(expert | task); rows of zeros do not count.
    """
    known = (rows.detach().sum(-1, keepdim=True) > 0).float()
    joint = rows * known / known.sum().clamp_min(1)
    return entropy(joint.sum(0)) - (known / known.sum().clamp_min(1)).squeeze(-1).to(rows.dtype) @ entropy(rows)


def entropy(probabilities: Tensor) -> Tensor:
    """-sum p log p over the last dimension, in nats."""
    return -(probabilities * probabilities.clamp_min(TINY).log()).sum(-1)


def running_rows(layer: Any, tasks: Sequence[str]) -> Tensor:
    """(tasks, experts): P(expert | task) of the steps so far; zeros for tasks that never ran."""
    rows = []
    for task in tasks:
        router = layer.routers[task]
        row = torch.zeros(layer.count, device=router.probability.device)
        row[router.slots] = router.probability / router.probability.sum().clamp_min(TINY)
        rows.append(row)
    return torch.stack(rows)


@torch.no_grad()
def keep_running(layer: Any, tasks: Sequence[str], sums: Tensor, momentum: float) -> None:
    """Moves the running rows of the tasks that ran: (tasks, 3, experts) as in :func:`losses`."""
    # No branch looks at a value, so that nothing waits for the device.
    for task, (probabilities, selected, _) in zip(tasks, sums, strict=True):
        router = layer.routers[task]
        ran = (selected.sum() > 0).float()
        # Of the first time it runs, a task's row is that row.
        keep = torch.where(router.updates > 0, momentum, 0.0)
        for kept, new in ((router.probability, probabilities), (router.usage, selected)):
            new = new[router.slots] / new.sum().clamp_min(TINY)
            kept.lerp_(new, ran * (1 - keep))
        router.updates += ran
