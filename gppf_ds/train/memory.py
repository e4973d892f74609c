"""How much memory a piece of work needs beyond what was held before it."""

from __future__ import annotations

import os
from collections.abc import Callable

import numpy as np
import torch

Run = Callable[[], object]


def peak(run: Run, device: torch.device) -> int:
    """The most bytes that torch held on a device at once in a run, beyond those that it held before."""
    if device.type != "cuda":
        return peak_on_cpu(run)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def peak_on_cpu(run: Run) -> int:
    """The most bytes that torch's CPU allocator held at once in a run, beyond those that it held before."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it reports a missing GPU driver as an error
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        run()
    assert profiler.profiler is not None
    events = profiler.profiler.kineto_results.events()
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    held = np.cumsum([0, *(change for _, change in changes)])
    return int(held.max())
