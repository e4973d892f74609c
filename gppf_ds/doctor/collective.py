"""One rank of the small all-reduce with which ``gppf-ds doctor --hostfile`` tries the network."""

from __future__ import annotations

import datetime
import json
import os
import statistics
import time

MEBIBYTE = 2**20
ROUNDS = 5


def main() -> None:
    """Prints the seconds of an all-reduce of 1 MiB, by NCCL or gloo; the environment says which rank this is."""
    import torch
    import torch.distributed as dist

    cuda = torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu"
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    timeout = datetime.timedelta(seconds=float(os.environ["GPPF_DS_DOCTOR_TIMEOUT"]))
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if cuda else "gloo", timeout=timeout)
    seconds = []
    for _ in range(1 + ROUNDS):
        ones = torch.ones(MEBIBYTE // 4, device=device)
        dist.barrier()
        started = time.perf_counter()
        dist.all_reduce(ones)
        total = float(ones[-1])
        seconds.append(time.perf_counter() - started)
    if total != dist.get_world_size():
        raise SystemExit(f"an all-reduce of ones over {dist.get_world_size()} ranks gave {total}")
    print(json.dumps(statistics.median(seconds[1:])), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
