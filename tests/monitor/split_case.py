"""One rank of test_split.py: rank 1 comes late to its collectives."""

import json
import sys
import time

import torch
import torch.distributed as dist

from gppf_ds.monitor.metrics import Metrics
from gppf_ds.monitor.split import TimeSplit
from gppf_ds.simt.job import start_distributed

LATE = 0.2


def main() -> None:
    device = start_distributed(60)
    torch.set_num_threads(1)
    metrics = Metrics({})
    split = TimeSplit(metrics, device)
    dist.barrier()
    for _ in range(2):
        started = time.monotonic()
        with split.clock.step():
            if dist.get_rank() == 1:
                time.sleep(LATE)
            x = torch.ones(4)
            dist.all_reduce(x)
            flying = dist.all_reduce(x, async_op=True)
            if dist.get_rank() == 1:
                time.sleep(LATE)
            flying.wait()
        assert x.tolist() == [4.0] * 4
        split.step(["a"] if dist.get_rank() else ["a", "b"], time.monotonic() - started, 0.0)
    dist.all_reduce(x)  # outside of a step: nobody's
    assert type(dist.all_reduce(x, async_op=True)).__name__ != "_TimedWork"
    mean = split.settle()
    exported = metrics.registry.get_sample_value
    task = "a" if dist.get_rank() else "several"
    print("RESULT " + json.dumps([mean, exported("gppf_ds_straggler_wait_seconds_total", {"task": task})]))
    assert split.settle() == dict.fromkeys(mean, 0.0)
    dist.destroy_process_group()
    sys.stdout.flush()


if __name__ == "__main__":
    main()
