"""One rank of data_start.py, which starts it."""

from __future__ import annotations

import json
import random
import resource
import sys
import time
from pathlib import Path
from typing import Any

import harness
import torch.distributed as dist

from gppf_ds.simt.job import start_distributed
from gppf_ds.tasks import openmm_index
from gppf_ds.tasks.openmm import scope

COLLECTIVE_LIMIT = 1800.0
"""Seconds a rank may wait for another that parses."""

RECORDS = 1000
"""Read at random places after the start."""


def memory(kind: str) -> int:
    """Bytes of this process: all that are resident ("Rss"), or those it shares with none ("Private_Dirty")."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{kind}:"))


def main() -> None:
    """Opens the data set of the argument, a json object, and tells what it took on each rank."""
    settings: dict[str, Any] = json.loads(sys.argv[1])
    start_distributed(COLLECTIVE_LIMIT)
    openmm_index.WORTH_KEEPING = 0 if settings["cached"] else sys.maxsize
    place = Path(settings["annotations"])
    config = {
        "type": "CocoDataset",
        "data_root": str(place.parent),
        "ann_file": place.name,
        "data_prefix": {"img": "images"},
        "metainfo": {"classes": tuple(f"class {number}" for number in range(80))},
        "filter_cfg": {"filter_empty_gt": True, "min_size": 32},
    }
    with scope("mmdet"):  # its import is not counted
        before, own = memory("Rss"), memory("Private_Dirty")
        dist.barrier()
        started = time.perf_counter()
        dataset = openmm_index.build_dataset(config)
        seconds = time.perf_counter() - started
    places = random.Random(0).choices(range(len(dataset)), k=RECORDS)
    started = time.perf_counter()
    for index in places:
        dataset.get_data_info(index)
    mine = {
        "seconds": seconds,
        "record": (time.perf_counter() - started) / RECORDS,
        "own": memory("Private_Dirty") - own,
        "peak": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before,
    }
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    harness.hand_over(everyone)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
