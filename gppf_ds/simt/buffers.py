"""Buffers of the heads (running statistics of their own batch norms), which every rank moves by its own batches only.

A head's norms do not communicate in a step, for which ranks run a head depends on the schedule. So their running
statistics part ways, until evaluation or a checkpoint needs one answer.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import nn


@torch.no_grad()
def average_head_buffers(bank: nn.ModuleDict, batches: Mapping[str, int]) -> None:
    """Gives all ranks the same buffers: the mean, weighted by the batches that each rank has run. A collective call.

    A head that nobody has run keeps its buffers. Integer buffers (counters) take the largest value.

    Args:
        bank: the heads by task.
        batches: how many batches of each task this rank has run since the last call.
    """
    if dist.get_world_size() == 1:
        return
    heads = [(batches.get(task, 0), list(head.buffers())) for task, head in bank.items()]
    moving = [(count, buffer) for count, buffers in heads for buffer in buffers if buffer.is_floating_point()]
    counters = [buffer for _, buffers in heads for buffer in buffers if not buffer.is_floating_point()]
    if moving:
        device = moving[0][1].device
        weights = torch.tensor([float(count) for count, _ in moving], dtype=torch.float64, device=device)
        parts = [count * buffer.double().flatten() for count, buffer in moving]
        flat = torch.cat([weights, *parts])
        dist.all_reduce(flat)
        totals, start = flat[: len(moving)].tolist(), len(moving)
        for total, (_, buffer) in zip(totals, moving, strict=True):
            if total > 0:
                buffer.copy_((flat[start : start + buffer.numel()] / total).view_as(buffer))
            start += buffer.numel()
    for buffer in counters:
        dist.all_reduce(buffer, op=dist.ReduceOp.MAX)
