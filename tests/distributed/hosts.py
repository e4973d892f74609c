"""Several machines in one: each has its network, its process table, its host name, its view of the files and its sshd.

They are namespaces of the Linux kernel, joined by a switch whose cables can be pulled. Needs root.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from distributed.ranks import ROOT

NEEDED = ("ip", "unshare", "nsenter", "ssh", "ssh-keygen", "pdsh", "hostname")
SSHD = Path("/usr/sbin/sshd")
SSHD_CONFIG = """\
ListenAddress {address}
HostKey /run/ssh/host_key
AuthorizedKeysFile /run/ssh/authorized_keys
StrictModes no
UsePAM no
PidFile none
"""
SSH_CONFIG = """\
IdentityFile /run/ssh/id_ed25519
UserKnownHostsFile /run/ssh/known_hosts
"""
INIT = r"""
set -e
mount --make-rprivate /
for folder in /run /mnt; do mount -t tmpfs none "$folder"; done
mkdir -p /run/sshd /mnt/shared /mnt/data
mount --bind "$1/shared" /mnt/shared
mount --bind "$1/hosts" /etc/hosts
mkdir -m 700 /run/ssh
cp "$1/ssh/"* "$2/"* /run/ssh/
chmod 600 /run/ssh/*
mount --bind /run/ssh/ssh_config /etc/ssh/ssh_config
hostname "$3"
ip link set lo up
[ "$4" = keep ] || mount -t tmpfs none /tmp
touch /run/ready
while :; do sleep 1000 & wait; done
"""


def why_not() -> str | None:
    """What is missing here to have hosts, if anything is."""
    if os.geteuid():
        return "network namespaces need root"
    missing = [name for name in NEEDED if shutil.which(name) is None] + ([] if SSHD.exists() else ["sshd"])
    if missing:
        return f"{', '.join(missing)} not installed"
    tried = subprocess.run(["unshare", "--net", "--mount", "--uts", "--pid", "--fork", "true"], capture_output=True)
    return f"namespaces are not allowed here: {tried.stderr.decode().strip()}" if tried.returncode else None


class Hosts:
    """Machines node-1, node-2, ... with addresses 10.77.0.1, ...; ``/mnt/shared`` is one folder on all of them.

    Args:
        folder: for their files; ``folder / "shared"`` is what they share.
        count: how many.
    """

    def __init__(self, folder: Path, count: int) -> None:
        self.folder = folder
        self.names = [f"node-{number + 1}" for number in range(count)]
        self.address = {name: f"10.77.0.{number + 1}" for number, name in enumerate(self.names)}
        self._holders: list[subprocess.Popen[bytes]] = []
        self._inside: dict[str, int] = {}
        self._keys()
        try:
            self._switch = self._hold("--net", "--fork", "sleep", "infinity")
            self._at_switch("ip", "link", "add", "switch", "type", "bridge")
            self._at_switch("ip", "link", "set", "switch", "up")
            for name in self.names:
                self._start(name)
        except BaseException:
            self.close()
            raise

    def _keys(self) -> None:
        for made in ("ssh", "shared", *self.names):
            (self.folder / made).mkdir()
        (self.folder / "hosts").write_text(
            "127.0.0.1 localhost\n" + "".join(f"{address} {name}\n" for name, address in self.address.items())
        )
        known = ""
        for owner in ("ssh/id_ed25519", *(f"{name}/host_key" for name in self.names)):
            _run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self.folder / owner))
            public = " ".join((self.folder / f"{owner}.pub").read_text().split()[:2])
            if owner.startswith("ssh/"):
                (self.folder / "ssh/authorized_keys").write_text(public + "\n")
            else:
                name = owner.partition("/")[0]
                known += f"{name},{self.address[name]} {public}\n"
        (self.folder / "ssh/known_hosts").write_text(known)
        (self.folder / "ssh/ssh_config").write_text(SSH_CONFIG)

    def _hold(self, *arguments: str) -> int:
        """Starts a process in namespaces of its own, which end with it; returns its id."""
        holder = subprocess.Popen(["unshare", "--kill-child", *arguments])
        self._holders.append(holder)
        children = Path(f"/proc/{holder.pid}/task/{holder.pid}/children")
        deadline = time.monotonic() + 20
        while not (found := children.read_text().split()):
            assert time.monotonic() < deadline, "unshare started nothing"
            time.sleep(0.01)
        return int(found[0])

    def _start(self, name: str) -> None:
        (self.folder / name / "sshd_config").write_text(SSHD_CONFIG.format(address=self.address[name]))
        keep = "keep" if any(Path(needed).is_relative_to("/tmp") for needed in (sys.prefix, ROOT)) else "hide"
        words = ["bash", "-c", INIT, "init", str(self.folder), str(self.folder / name), name, keep]
        kinds = ("--net", "--mount", "--uts", "--pid", "--ipc", "--fork", "--mount-proc")
        inside = self._inside[name] = self._hold(*kinds, *words)
        deadline = time.monotonic() + 20
        while self.run(name, ["test", "-e", "/run/ready"]).returncode:
            assert time.monotonic() < deadline, f"{name} did not start"
            time.sleep(0.05)
        cable = f"to-{name}"
        self._at_switch("ip", "link", "add", cable, "type", "veth", "peer", "name", "eth0", "netns", str(inside))
        self._at_switch("ip", "link", "set", cable, "master", "switch", "up")
        for command in (["addr", "add", f"{self.address[name]}/24", "dev", "eth0"], ["link", "set", "eth0", "up"]):
            _check(self.run(name, ["ip", *command]))
        self.sshd(name)

    def sshd(self, name: str) -> None:
        """Starts the server of a machine."""
        _check(self.run(name, [str(SSHD), "-f", "/run/ssh/sshd_config"]))

    def _at_switch(self, *command: str) -> None:
        _run("nsenter", "-t", str(self._switch), "-n", *command)

    def command(self, name: str, words: Sequence[str], folder: str = "/mnt/shared") -> list[str]:
        """What runs these words on a machine, in a folder of its own view."""
        enter = ["nsenter", "-t", str(self._inside[name]), "-m", "-n", "-u", "-p", "-i"]
        return [*enter, "bash", "-c", 'cd "$0" && exec "$@"', folder, *words]

    def run(
        self, name: str, words: Sequence[str], timeout: float = 60.0, environment: Mapping[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Runs a command on a machine; its stderr comes with its stdout."""
        return subprocess.run(
            self.command(name, words),
            env={**os.environ, **(environment or {})},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout,
            check=False,
        )

    def mount(self, name: str, source: Path, target: str) -> None:
        """Lets one machine alone see a folder or file of ours in the place of another, until :meth:`unmount`."""
        # From outside: the machine cannot see our folders in /tmp.
        found = Path(f"/proc/{self._inside[name]}/root/mnt/view")
        found.mkdir(exist_ok=True)
        copy = found / str(len(list(found.iterdir())))
        if source.is_dir():
            shutil.copytree(source, copy)
        else:
            shutil.copy(source, copy)
        _check(self.run(name, ["mount", "--bind", f"/mnt/view/{copy.name}", target]))

    def unmount(self, name: str, target: str) -> None:
        """Undoes :meth:`mount`."""
        _check(self.run(name, ["umount", target]))

    def processes(self, name: str) -> str:
        """The command lines of everything that runs on a machine."""
        return self.run(name, ["ps", "-eo", "args"]).stdout

    def cut(self, name: str) -> None:
        """Pulls the cable: whatever is sent to or from the machine is lost from now on."""
        self._at_switch("ip", "link", "set", f"to-{name}", "down")

    def join(self, name: str) -> None:
        """Plugs the cable in again."""
        self._at_switch("ip", "link", "set", f"to-{name}", "up")

    def close(self) -> None:
        """Ends the machines with all that runs on them."""
        for holder in self._holders:
            holder.kill()
            holder.wait()


def require_hosts() -> None:
    """Skips the test, saying why, where there cannot be any."""
    reason = why_not()
    if reason is not None:
        pytest.skip(reason)


def _run(*command: str) -> None:
    subprocess.run(command, check=True, timeout=30)


def _check(done: subprocess.CompletedProcess[str]) -> None:
    assert done.returncode == 0, done.stdout
