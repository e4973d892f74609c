"""Where the ranks of one machine listen: nowhere that another machine can reach."""

from __future__ import annotations

import os
import socket

import pytest
from distributed.ranks import end_ranks

from gppf_ds.simt import rendezvous

LISTENING = """
import os
from pathlib import Path
import torch.distributed as dist
from gppf_ds.simt.job import start_distributed
start_distributed(30)
dist.barrier()
own = {os.readlink(link) for link in Path("/proc/self/fd").iterdir() if link.is_symlink()}
for table in ("tcp", "tcp6"):
    for line in Path("/proc/net", table).read_text().splitlines()[1:]:
        _, local, _, state, *rest = line.split()
        address, port = local.split(":")
        if state == "0A" and f"socket:[{rest[5]}]" in own:
            print("listens", address, int(port, 16) == int(os.environ["MASTER_PORT"]))
dist.barrier()
"""


def test_ranks_of_one_machine_listen_there_alone() -> None:
    codes, outputs = end_ranks([["-c", LISTENING]] * 2)
    assert codes == [0, 0], outputs
    found = [line.split()[1:] for text in outputs for line in text.splitlines() if line.startswith("listens")]
    assert ["0100007F", "True"] in found  # the store
    assert {address for address, _ in found} == {"0100007F"}  # 127.0.0.1


@pytest.mark.parametrize(("address", "agent"), [("node-1", "False"), ("192.0.2.7", "False"), ("127.0.0.1", "True")])
def test_ranks_of_several_machines_meet_as_torch_does(
    address: str, agent: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MASTER_ADDR", address)
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", agent)
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    assert rendezvous.rendezvous() == "env://"
    assert "GLOO_SOCKET_IFNAME" not in os.environ


def test_a_port_in_use_is_named() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(OSError, match="in use") as error:
            rendezvous._listener(port)
    assert f"MASTER_PORT is {port}" in error.value.__notes__[0]
