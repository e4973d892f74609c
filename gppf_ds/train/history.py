"""Files of json lines that grow while a run trains, each line with the step that it belongs to."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_TAIL = 2**16
"""Bytes at the end of a file that hold its last line."""


def append(path: Path, line: Mapping[str, Any]) -> None:
    """Adds a line at the end, on a line of its own also where a kill left half a line."""
    with path.open("ab+") as file:
        if file.seek(0, os.SEEK_END):
            file.seek(-1, os.SEEK_END)
            torn = file.read() != b"\n"
            file.write(b"\n" * torn)
        file.write(json.dumps(line).encode() + b"\n")


def read(path: Path) -> list[dict[str, Any]]:
    """All lines in the order of writing; no line for a missing file.

    What is no json was torn by a kill, and is left out.
    """
    entries = []
    for line in path.read_text().splitlines() if path.is_file() else ():
        try:
            entries.append(json.loads(line))
        except ValueError:
            continue
    return entries


def last(path: Path) -> dict[str, Any]:
    """The last whole line of a file of json lines; empty where there is none."""
    if not path.is_file():
        return {}
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - _TAIL))
        lines = file.read().decode(errors="replace").splitlines()
    for line in reversed(lines):
        try:
            found = json.loads(line)
        except ValueError:
            continue
        if isinstance(found, dict):
            return found
    return {}


def latest(entries: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The lines by rising ``step``: of the steps that a resumed run did twice, only what it wrote later."""
    kept: list[Mapping[str, Any]] = []
    for entry in reversed(entries):
        if not kept or entry["step"] < kept[-1]["step"]:
            kept.append(entry)
    return kept[::-1]
