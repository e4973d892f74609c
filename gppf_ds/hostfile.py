"""The hostfile of a run, read as strictly as the launcher needs it: what it would take wrongly ends here.

``python -m gppf_ds.hostfile FILE`` prints the number of machines, or ends with 2 and one sentence.
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from pathlib import Path

from gppf_ds.errors import UserError

_NAME = re.compile(r"(?:[A-Za-z_][\w.-]*@)?[A-Za-z0-9][A-Za-z0-9._-]*", re.ASCII)
"""Neither an option of ssh nor anything that pdsh or a shell would read as its own."""
_LINE = re.compile(r"(\S+)\s+slots=(\d+)\s*(?:#.*)?", re.ASCII)


@dataclass(frozen=True)
class Host:
    """A machine of the run."""

    name: str
    slots: int
    """Ranks to start there."""
    line: int
    """Of the hostfile, from 1."""


def read(path: Path) -> list[Host]:
    """The machines of a hostfile, in its order.

    Raises:
        UserError: one sentence with the line that is not well-formed.
    """
    try:
        lines = path.read_text().splitlines()
    except FileNotFoundError as error:
        raise UserError(f"the hostfile {path} does not exist; copy hostfile.example and name your machines.") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"the hostfile {path} cannot be read: {error}.") from error
    hosts: list[Host] = []
    for number, line in enumerate(lines, start=1):
        text = line.strip()
        if text and not text.startswith("#"):
            hosts.append(_host(f"{path}, line {number}: {text!r}", text, number, hosts))
    if not hosts:
        raise UserError(f"the hostfile {path} names no machine; write one a line, as in 'node-1 slots=8'.")
    return hosts


def _host(place: str, text: str, line: int, before: list[Host]) -> Host:
    found = _LINE.fullmatch(text)
    if found is None:
        raise UserError(f"{place} is not of the form 'node-1 slots=8'.")
    host = Host(found[1], int(found[2]), line)
    if _NAME.fullmatch(host.name) is None:
        raise UserError(f"{place}: a machine's name has letters, digits, dots, dashes and underscores only.")
    if host.slots < 1:
        raise UserError(f"{place} starts no rank: give it slots, or remove the line.")
    for other in before:
        if other.name == host.name:
            raise UserError(f"{place} names the same machine as line {other.line}: write it once, with all its slots.")
        if other.slots != host.slots:
            raise UserError(
                f"{place} has another number of slots than line {other.line}: the launcher needs the same on all."
            )
    return host


if __name__ == "__main__":
    try:
        print(len(read(Path(sys.argv[1]))))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
