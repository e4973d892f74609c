"""Engines with engine.audit on real ranks, one after another.

Arguments: a json list of cases of :mod:`distributed.simt_case`, and optionally the word ``plant``: rank 1 calls a
collective that no other rank joins.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace

import torch
import torch.distributed as dist

from distributed import simt_case
from gppf_ds.errors import UserError
from gppf_ds.simt.engine import SimtEngine
from gppf_ds.simt.job import start_distributed

TIMEOUT = 40.0


def plant() -> None:
    honest = simt_case.PoolHead.loss

    def loss(self, features, targets):
        if dist.get_rank() == 1:
            dist.all_reduce(torch.ones(7))
        return honest(self, features, targets)

    simt_case.PoolHead.loss = loss


def main() -> None:
    torch.set_num_threads(1)
    device = start_distributed(TIMEOUT)
    if "plant" in sys.argv:
        plant()
    for case in json.loads(sys.argv[1]):
        config = simt_case.configuration(case)
        config = replace(config, engine=replace(config.engine, audit=True, timeout=TIMEOUT))
        model, controller, schedule = simt_case.build(config)
        try:
            simt_case.engine_run(SimtEngine(model, controller, config, device), schedule, [])
        except UserError as error:
            print("FOUND", error, flush=True)
            os._exit(2)  # as a failing rank of a run does; its peers wait for it in a collective
        print("PASSED", flush=True)


if __name__ == "__main__":
    main()
