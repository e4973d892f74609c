"""``gppf-ds doctor --hostfile``: are the machines of a job ready for it, each alone and all together?"""

from __future__ import annotations

import asyncio
import os
import secrets
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gppf_ds import hostfile
from gppf_ds.doctor.connection import Connection, NoAnswerError
from gppf_ds.doctor.table import Row, verdict
from gppf_ds.errors import UserError
from gppf_ds.hostfile import Host

COLUMNS = ("ssh", "clock", "package", "accelerators", "ports", "recipe", "data", "output", "all-reduce")
LIMIT = 180.0
"""Seconds for a machine to say what it has: Python's packages may lie on a slow shared disk."""
TIMEOUT = 60.0
"""Seconds that the ranks of the all-reduce wait for each other."""
CLOCK = 1.0
"""Seconds that clocks may differ before it is worth a note."""


@dataclass
class Report:
    """What was found out about one machine: a row for each column."""

    host: Host
    facts: dict[str, Any] = field(default_factory=dict)
    rows: dict[str, Row] = field(default_factory=dict)

    def add(self, column: str, value: str, state: Any = "ok", why: str = "") -> None:
        """A finding."""
        self.rows[column] = Row(f"{self.host.name}: {column}", value, state, why)

    @property
    def sound(self) -> bool:
        """Whether nothing keeps training from running there."""
        return all(row.state != "problem" for row in self.rows.values())


def examine(path: Path, recipe: Path | None) -> int:
    """Prints a table with a line for every machine; 0 if the job can run, 1 if not.

    Raises:
        UserError: the hostfile is not well-formed, or there is no ssh here.
    """
    hosts = hostfile.read(path)
    if shutil.which("ssh") is None:
        raise UserError("ssh, by which the machines are reached, is not installed here.")
    reports = asyncio.run(_ask(hosts, recipe))
    widths = {column: max(len(column), *(len(_value(report, column)) for report in reports)) for column in COLUMNS}
    name = max(len("host"), *(len(host.name) for host in hosts))
    print("  " + "  ".join([f"{'host':<{name}}", *(f"{column:<{width}}" for column, width in widths.items())]).rstrip())
    for report in reports:
        mark = max((row.mark for row in report.rows.values()), key=" *!".index)
        cells = [f"{_value(report, column):<{width}}" for column, width in widths.items()]
        print(f"{mark} " + "  ".join([f"{report.host.name:<{name}}", *cells]).rstrip())
    return verdict([row for report in reports for row in report.rows.values()])


def _value(report: Report, column: str) -> str:
    return report.rows[column].value if column in report.rows else "-"


async def _ask(hosts: Sequence[Host], recipe: Path | None) -> list[Report]:
    reports = [Report(host) for host in hosts]
    connections = [Connection(host.name, LIMIT) for host in hosts]
    token = f"gppf-ds-doctor-{secrets.token_hex(6)}"
    try:
        pairs = list(zip(reports, connections, strict=True))
        await asyncio.gather(*(_one(report, connection, recipe, token) for report, connection in pairs))
        for report in reports:
            if report.facts:
                _judge(report, reports, recipe is not None)
        await _all_together(pairs)
    finally:
        await asyncio.gather(*(connection.close() for connection in connections))
    return reports


async def _one(report: Report, connection: Connection, recipe: Path | None, token: str) -> None:
    job = {
        "folder": os.getcwd(),
        "environment": dict(_environment()),
        "recipe": str(recipe) if recipe else None,
        "slots": report.host.slots,
        "ports": [_master_port()],
        "token": token,
        "timeout": TIMEOUT,
    }
    try:
        ahead = await connection.open(job)
        report.add("ssh", "ok")
        why = f"Its clock is {ahead:+.1f} s off ours: times in logs and the ages in alarms will not fit together."
        report.add("clock", f"{ahead:+.2f} s", "note" if abs(ahead) > CLOCK else "ok", why)
        report.facts = await connection.answer()
    except NoAnswerError as error:
        column = "package" if "ssh" in report.rows else "ssh"
        report.add(column, "fails", "problem", f"{error}.")


def _master_port() -> int:
    return int(os.environ.get("MASTER_PORT", "29500"))


def _environment() -> Iterator[tuple[str, str]]:
    """What the deepspeed launcher hands to the other machines: variables by prefix, and those of .deepspeed_env."""
    prefixes: tuple[str, ...] = ("MLFLOW", "PYTHON", "MV2", "UCX")
    if os.environ.get("DS_ACCELERATOR") != "cpu":
        prefixes += ("NCCL", "LD_LIBRARY", "PATH")
    yield from ((key, value) for key, value in os.environ.items() if key.startswith(prefixes))
    name = os.environ.get("DS_ENV_FILE", ".deepspeed_env")
    for file in (Path.home() / name, Path(name)):
        if file.is_file():
            for line in file.read_text().splitlines():
                key, found, value = line.partition("=")
                if found:
                    yield key.strip(), value.strip()


def _judge(report: Report, reports: Sequence[Report], with_recipe: bool) -> None:
    facts, host = report.facts, report.host
    first = next(other for other in reports if other.facts)
    _compare(report, first, "package", facts["package"]["gppf-ds"])
    if facts["gpus"]:
        value, enough = f"{host.slots} of {facts['gpus']} GPUs", host.slots <= facts["gpus"]
        why = f"The hostfile starts {host.slots} ranks, one per GPU, and it has {facts['gpus']}: lower slots."
    else:
        value, enough = "CPU", facts["cpu_wanted"]
        why = "torch finds no GPU: run gppf-ds doctor there, or put DS_ACCELERATOR=cpu into .deepspeed_env for the CPU."
    report.add("accelerators", value, "ok" if enough else "problem", why)
    busy = [port for port in facts["busy"] if port != _master_port() or report is reports[0]]
    why = f"In use: {', '.join(map(str, busy))}; choose another MASTER_PORT or metrics_port."
    report.add("ports", "busy" if busy else "free", "problem" if busy else "ok", why)
    if not with_recipe:
        return
    if facts["recipe"]:
        _compare(report, first, "recipe", "same" if report is not first else "read")
    wrong = facts["data"]
    report.add("data", "fails" if wrong else "ok", "problem" if wrong else "ok", wrong or "")
    if facts["unwritable"]:
        report.add("output", "fails", "problem", f"{facts['unwritable']}.")


def _compare(report: Report, first: Report, column: str, value: str) -> None:
    """Where it differs from the first machine that has answered."""
    own, other = report.facts[column], first.facts[column]
    for key in dict.fromkeys([*other, *own]):
        if own.get(key) != other.get(key):
            why = f"It has {key} {own.get(key, 'missing')} where {first.host.name} has {other.get(key, 'none')}."
            report.add(column, "differs", "problem", why)
            return
    report.add(column, value)


async def _all_together(pairs: Sequence[tuple[Report, Connection]]) -> None:
    """The small all-reduce and the look into the shared folder, once every machine is sound on its own."""
    reports = [report for report, _ in pairs]
    if not all(report.sound for report in reports):
        for report in reports:
            report.add("all-reduce", "not tried")
        return
    meeting = {
        "address": (reports[0].facts["addresses"] or [reports[0].host.name])[0],
        "port": _master_port(),
        "world_size": sum(report.host.slots for report in reports),
        "first_rank": 0,
        "machines": len(reports),
    }
    for report, connection in pairs:
        await connection.send(meeting)
        meeting["first_rank"] += report.host.slots
    await asyncio.gather(*(_meet(report, connection, meeting) for report, connection in pairs))


async def _meet(report: Report, connection: Connection, meeting: dict[str, Any]) -> None:
    try:
        found = await connection.answer()
    except NoAnswerError as error:
        report.add("all-reduce", "fails", "problem", f"{error}.")
        return
    if found["seconds"] is None:
        why = (
            f"{found['why']} (meeting at {meeting['address']}:{meeting['port']}; where machines have several networks, "
            "name one in .deepspeed_env: NCCL_SOCKET_IFNAME, or GLOO_SOCKET_IFNAME on CPUs)."
        )
        report.add("all-reduce", "fails", "problem", why)
    else:
        report.add("all-reduce", f"1 MiB in {1000 * found['seconds']:.1f} ms, {meeting['world_size']} ranks")
    if report.facts["folder"]:
        folder, seen, machines = report.facts["folder"], found["seen"], meeting["machines"]
        why = f"{folder} shows the files of {seen} of {machines} machines: all need one and the same folder."
        free = f"shared, {report.facts['free'] / 2**30:.0f} GiB free"
        report.add("output", free if seen == machines else "not shared", "ok" if seen == machines else "problem", why)
