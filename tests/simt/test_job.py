"""Joining the job, and leaving it."""

from __future__ import annotations

from distributed.ranks import end_ranks

FORGETFUL = """
import torch, torch.distributed as dist
from gppf_ds.simt.job import start_distributed
start_distributed(60.0)
dist.all_reduce(torch.ones(3))
"""


def test_ranks_that_do_not_leave_the_group_end_well_all_the_same() -> None:
    """Without help about a third of such pairs aborts."""
    for _ in range(4):
        assert end_ranks([["-c", FORGETFUL]] * 2, 60) == ([0, 0], ["", ""])
