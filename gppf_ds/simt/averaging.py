"""The task average: a parameter's gradient is the sum over the devices that used it, divided by how many did.

GPPF section 3.2. It is deliberately no sample average (batch sizes differ by task) and no world average (a task that
few devices run would learn that much slower).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from gppf_ds.simt.usage import Owner


def scale_for_average(
    parameters: Iterable[tuple[nn.Parameter, Owner]],
    counts: Mapping[Owner, int],
    loss_scale: float = 1.0,
    strict: bool = True,
) -> list[Tensor]:
    """Prepares this rank's gradients so that their sum over the ranks is the task average.

    Gradients are scaled in place by 1 / (N_p * loss_scale); a parameter that only other ranks used gets zeros; one
    that nobody used gets None.

    Args:
        parameters: with their owners, in the same order on every rank.
        counts: N_p of every owner.
        loss_scale: that backward started from.
        strict: a gradient of a parameter that nobody used is an error. Not so where a device was dropped: batch
            statistics carry gradients of other losses into units that only the dropped device ran.

    Returns:
        The gradients to reduce, in the order of ``parameters``: the same list of shapes on every rank.

    Raises:
        RuntimeError: a parameter has a gradient although the schedule says that no device uses it.
    """
    gradients: list[Tensor] = []
    by_count: dict[int, list[Tensor]] = defaultdict(list)
    for parameter, owner in parameters:
        count = counts[owner]
        if count == 0:
            if strict and parameter.grad is not None and parameter.grad.any():
                raise RuntimeError(f"a parameter of {owner} has a gradient although no device uses it in this step")
            parameter.grad = None
            continue
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        else:
            by_count[count].append(parameter.grad)
        gradients.append(parameter.grad)
    for count, group in by_count.items():
        factor = 1.0 / (count * loss_scale)
        if not math.isclose(factor, 1.0):
            torch._foreach_mul_(group, factor)
    return gradients
