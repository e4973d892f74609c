"""Where the ranks of one machine meet: torch's key-value store, out of reach of other machines.

The store asks for no password. torch's own, for ``env://``, listens on all addresses of the machine even when the ranks
are told to meet at 127.0.0.1; here it listens there alone.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

LOOPBACK = "127.0.0.1"
SCHEME = "gppf-ds-loopback"


def rendezvous() -> str:
    """How this rank is to find the others, for ``init_method`` of the process group.

    Ranks that meet at another address, or in a store that torchrun holds, do it as torch does.
    """
    if os.environ.get("MASTER_ADDR") not in (LOOPBACK, "localhost"):
        return "env://"
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        return "env://"
    if Path("/sys/class/net/lo").exists():  # gloo would take the address that the machine's name stands for
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    return f"{SCHEME}://"


def free_port() -> int:
    """A port of this machine that nothing listens on."""
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        return int(probe.getsockname()[1])


def _meet(url: str, timeout: timedelta, **_: Any) -> Iterator[tuple[dist.Store, int, int]]:
    """As torch's handlers: the store, this rank and the number of ranks."""
    rank, world_size, port = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "MASTER_PORT"))
    server = _listener(port) if rank == 0 else None
    yield dist.TCPStore(LOOPBACK, port, world_size, rank == 0, timeout, master_listen_fd=server), rank, world_size


def _listener(port: int) -> int:
    """A socket for the store's server, which closes it."""
    with socket.socket() as made:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            made.bind((LOOPBACK, port))
        except OSError as error:
            error.add_note(f"MASTER_PORT is {port}: choose another one if it is another program that uses it.")
            raise
        made.listen(socket.SOMAXCONN)
        return made.detach()


dist.register_rendezvous_handler(SCHEME, _meet)
