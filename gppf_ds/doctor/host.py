"""What ``gppf-ds doctor --hostfile`` runs on every machine, started over ssh by :mod:`gppf_ds.doctor.hosts`.

It answers two questions, each a line of json on stdin: what is here, and whether its ranks and its view of the shared
folder agree with the others'. It leaves nothing behind, and ends when its input does.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from hashlib import sha256
from pathlib import Path
from typing import Any

import gppf_ds
from gppf_ds.errors import UserError

MARK = "gppf-ds doctor: "
"""Starts the lines that are answers; libraries and login scripts may print others."""
PATIENCE = 10.0
"""Seconds that another machine's file may take to appear: network file systems remember what a folder held."""


def main(job: dict[str, Any]) -> None:
    """Answers, and removes its file in the shared folder however it ends.

    Args:
        job: what to look at, see :class:`gppf_ds.doctor.hosts.Job`.
    """
    facts = _facts(job)
    token = None
    try:
        if facts["folder"]:
            try:
                token = Path(tempfile.mkstemp(prefix=f".{job['token']}-", dir=facts["folder"])[1])
            except OSError as error:
                facts["unwritable"] = f"{facts['folder']} cannot be written to ({error.strerror})"
        _answer(facts)
        line = sys.stdin.readline()
        if line:
            _answer(_together(json.loads(line), job, token))
            sys.stdin.readline()  # the others may still be looking
    finally:
        if token is not None:
            token.unlink(missing_ok=True)


def _answer(facts: dict[str, Any]) -> None:
    print(MARK + json.dumps(facts), flush=True)


def _facts(job: dict[str, Any]) -> dict[str, Any]:
    import torch

    from gppf_ds.train.record import versions

    cuda = torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu"
    facts: dict[str, Any] = {
        "addresses": _addresses(),
        "package": {
            "Python": ".".join(platform.python_version_tuple()[:2]),
            "gppf-ds": gppf_ds.__version__,
            "source": _digest(Path(gppf_ds.__file__).parent),
            **versions(),
        },
        "gpus": torch.cuda.device_count() if cuda else 0,
        "cpu_wanted": os.environ.get("DS_ACCELERATOR") == "cpu",
        "busy": [port for port in job["ports"] if _is_busy("", port)],
        "recipe": {},
        "data": None,
        "folder": None,
        "unwritable": None,
    }
    if job["recipe"] is not None:
        facts.update(_recipe(job["recipe"], job["slots"]))
    return facts


def _recipe(path: str, slots: int) -> dict[str, Any]:
    """What the recipe is here, whether its data is, and where its output would go."""
    from gppf_ds.train import recipe
    from gppf_ds.train.record import fingerprint

    try:
        run = recipe.read(["--config", path])
    except UserError as error:
        return {"data": str(error)}
    output = Path(run.config.output)
    folder = next(parent for parent in (output, *output.absolute().parents) if parent.is_dir())
    found: dict[str, Any] = {
        "recipe": fingerprint(run.text),
        "folder": str(folder.resolve()),
        "free": shutil.disk_usage(folder).free,
    }
    if run.config.metrics_port:
        ports = [run.config.metrics_port + rank for rank in range(slots)]
        found["busy"] = [port for port in ports if _is_busy(run.config.metrics_address, port)]
    try:
        recipe.check(run)
    except UserError as error:
        found["data"] = str(error)
    return found


def _digest(package: Path) -> str:
    """Of the package's own text, which a version number does not tell apart in a checkout."""
    total = sha256()
    for file in sorted(package.rglob("*.py")):
        total.update(f"{file.relative_to(package)}\0".encode() + file.read_bytes())
    return total.hexdigest()[:12]


def _addresses() -> list[str]:
    """As the deepspeed launcher asks for them, to make the first one of the first machine the job's."""
    try:
        return subprocess.run(["hostname", "-I"], capture_output=True, text=True, timeout=10).stdout.split()
    except (OSError, subprocess.TimeoutExpired):
        return []


def _is_busy(address: str, port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((address, port))
        except OSError:
            return True
    return False


def _together(meeting: dict[str, Any], job: dict[str, Any], token: Path | None) -> dict[str, Any]:
    """Runs this machine's ranks of the all-reduce, and counts the machines whose files are in the shared folder.

    Args:
        meeting: address, port, world size and first rank of the all-reduce, and the number of machines.
    """
    seconds, why = _all_reduce(meeting, job["slots"], job["timeout"])
    seen, deadline = 0, time.monotonic() + PATIENCE
    while token is not None:
        seen = len(list(token.parent.glob(f".{job['token']}-*")))
        if seen >= meeting["machines"] or time.monotonic() > deadline:
            break
        time.sleep(0.2)
    return {"seen": seen, "seconds": seconds, "why": why}


def _all_reduce(meeting: dict[str, Any], slots: int, timeout: float) -> tuple[float | None, str]:
    """The slowest rank's seconds, or why there are none."""
    ranks = []
    for slot in range(slots):
        environment = {
            "MASTER_ADDR": meeting["address"],
            "MASTER_PORT": str(meeting["port"]),
            "WORLD_SIZE": str(meeting["world_size"]),
            "RANK": str(meeting["first_rank"] + slot),
            "LOCAL_RANK": str(slot),
            "OMP_NUM_THREADS": "1",
            "GPPF_DS_DOCTOR_TIMEOUT": str(timeout),
            "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        }
        command = [sys.executable, "-m", "gppf_ds.doctor.collective"]
        ranks.append(
            subprocess.Popen(
                command,
                env={**os.environ, **environment},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    deadline = time.monotonic() + 2 * timeout
    seconds: list[float] = []
    why = ""
    for rank in ranks:
        try:
            out, errors = rank.communicate(timeout=max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            rank.kill()
            rank.communicate()
            why = why or f"a rank did not end within {2 * timeout:.0f} s"
            continue
        if rank.returncode:
            said = [line for line in errors.splitlines() if line.strip()]
            why = why or next((line for line in reversed(said) if "Error" in line), (said or ["a rank failed"])[-1])
        else:
            seconds.append(float(json.loads(out.splitlines()[-1])))
    return (max(seconds), "") if len(seconds) == slots else (None, why.strip())
