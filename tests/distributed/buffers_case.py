"""Every rank moves the buffers of its heads by its own batches; then all ranks must hold their weighted mean.

It does not leave the process group itself: up to a third of such pairs aborted before `start_distributed` saw to that.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn

from gppf_ds.simt.buffers import average_head_buffers
from gppf_ds.simt.job import start_distributed


def main() -> None:
    start_distributed(60.0)
    rank = dist.get_rank()
    bank = nn.ModuleDict({task: nn.BatchNorm1d(3) for task in ("both", "second", "nobody")})
    bank["both"].running_mean.fill_(10.0 * rank)
    bank["both"].num_batches_tracked.fill_(5 + rank)
    bank["second"].running_var.fill_(2.0 + rank)
    bank["nobody"].running_mean.fill_(7.0)
    average_head_buffers(bank, {"both": 1 + 2 * rank, "second": 4 * rank})  # 1 and 3 batches; 0 and 4
    assert torch.equal(bank["both"].running_mean, torch.full((3,), 7.5))
    assert bank["both"].num_batches_tracked == 6
    assert torch.equal(bank["second"].running_var, torch.full((3,), 3.0))
    assert torch.equal(bank["nobody"].running_mean, torch.full((3,), 7.0))


if __name__ == "__main__":
    main()
