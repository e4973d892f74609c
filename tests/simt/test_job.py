"""How a rank ends."""

from __future__ import annotations

from distributed.ranks import end_ranks

LATE_IMPORT = """
import atexit
from pathlib import Path
import torch.distributed as dist
from gppf_ds.simt.job import start_distributed

def tell():
    print("threads", *sorted(path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")), sep=",")

atexit.register(tell)  # runs after what start_distributed registers
start_distributed(30)
dist.barrier()
import torch.distributed.nn
import torch.distributed.optim
assert torch.distributed.nn.all_reduce.__defaults__[-1] is dist.group.WORLD
tell()
"""


def test_no_thread_of_gloo_outlives_the_program() -> None:
    codes, outputs = end_ranks([["-c", LATE_IMPORT]] * 2)
    assert codes == [0, 0], outputs
    for text in outputs:
        during, after = (line for line in text.splitlines() if line.startswith("threads"))
        assert "gloo" in during
        assert "gloo" not in after
