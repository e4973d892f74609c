"""What all ranks must have in common before they compute together, compared while a difference can still be named."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.distributed as dist
from torch import nn

from gppf_ds.errors import UserError


def agree(facts: Mapping[str, str], remedy: str = "start every rank with the same recipe and the same data") -> None:
    """A collective call that does nothing where every rank holds the same facts.

    Args:
        facts: what to compare, in the order in which to look for a difference; keys read as in "rank 1 has KEY VALUE".
        remedy: what to do about a difference.

    Raises:
        UserError: on every rank alike, with the first difference and its ranks.
    """
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, dict(facts))
    difference = first_difference(gathered)
    if difference is not None:
        raise UserError(f"{difference}: {remedy}.")


def first_difference(by_rank: list[dict[str, str]]) -> str | None:
    """For example "rank 1 has seed 4 where rank 0 has seed 3"; None where there is none."""
    for key in dict.fromkeys(key for facts in by_rank for key in facts):
        values = [facts.get(key) for facts in by_rank]
        other = next((value for value in values if value != values[0]), values[0])
        if other != values[0]:
            ranks = [str(rank) for rank, value in enumerate(values) if value == other]
            who = f"ranks {', '.join(ranks)} have" if len(ranks) > 1 else f"rank {ranks[0]} has"
            return f"{who} {_say(key, other)} where rank 0 has {_say(key, values[0])}"
    return None


def _say(key: str, value: str | None) -> str:
    return f"no {key}" if value is None else f"{key} {value}"


def describe(model: nn.Module, sizes: Mapping[str, int]) -> dict[str, str]:
    """The facts about data and model.

    Args:
        model: before any of it is partitioned.
        sizes: of the training sets, by task.
    """
    samples = {f"training samples of tasks.{name}:": str(size) for name, size in sizes.items()}
    parameters = {
        f"parameter {name}": f"of shape {tuple(p.shape)}, {str(p.dtype).removeprefix('torch.')}"
        for name, p in model.named_parameters()
    }
    return samples | parameters
