"""A rank's place in the job: its process group, its device, its precision, and the DeepSpeed that it runs."""

from __future__ import annotations

import atexit
import datetime
import gc
import logging
import os
from types import FunctionType
from typing import Any

import torch
import torch.distributed as dist

from gppf_ds.errors import UserError
from gppf_ds.simt.rendezvous import LOOPBACK, free_port, rendezvous

VERIFIED = ("0.19",)
"""DeepSpeed releases whose internals were checked against ``simt/engine.py``."""


def start_distributed(timeout: float) -> torch.device:
    """Joins the job's process group (a group of one without a launcher) and returns this rank's device.

    Args:
        timeout: seconds after which a collective that some rank never joined raises.
    """
    if "RANK" not in os.environ:
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", LOCAL_SIZE="1")
        os.environ.update(MASTER_ADDR=LOOPBACK, MASTER_PORT=str(free_port()))
    deepspeed = import_deepspeed()
    # On CPU DeepSpeed would compile a shared-memory all-reduce here, for minutes; gloo serves as well.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    cuda = torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu"
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    patience = datetime.timedelta(seconds=timeout)
    deepspeed.init_distributed("nccl" if cuda else "gloo", timeout=patience, verbose=False, init_method=rendezvous())
    atexit.register(_leave)
    return device


def _leave() -> None:
    """gloo's threads abort a process that ends while they still run (pytorch issue 190489).

    They run for as long as anything holds their group. Modules imported after the start do, as a default argument of
    functions: torch.distributed.nn, .optim and .fsdp, which mmengine imports.
    """
    if dist.is_initialized():
        dist.destroy_process_group()
    functions = [x for x in gc.get_objects() if type(x) is FunctionType and x.__defaults__]
    for function in functions:
        if any(isinstance(default, dist.ProcessGroup) for default in function.__defaults__ or ()):
            function.__defaults__ = None  # nobody calls it any more


def import_deepspeed() -> Any:
    """The library, told to be quiet; raises :class:`UserError` for a release that was not checked."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    if not deepspeed.__version__.startswith(VERIFIED):
        raise UserError(
            f"DeepSpeed {deepspeed.__version__} is installed, but the task average reaches into internals that were "
            f"verified with {', '.join(v + '.x' for v in VERIFIED)} only: pip install 'deepspeed>=0.19.8,<0.20'."
        )
    return deepspeed


def resolve_precision(wanted: str, device: torch.device) -> str:
    """fp32, bf16 or fp16 for this device."""
    if wanted == "auto":
        return "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    return wanted
