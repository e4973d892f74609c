"""The findings of ``gppf-ds doctor`` and how they end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Row:
    """One finding. ``note``: something is limited; ``problem``: training cannot run; ``why`` explains either."""

    name: str
    value: str
    state: Literal["ok", "note", "problem"] = "ok"
    why: str = ""

    @property
    def mark(self) -> str:
        """What stands before it in a table."""
        return {"ok": " ", "note": "*", "problem": "!"}[self.state]


def verdict(rows: Sequence[Row]) -> int:
    """Prints what the marks mean, and returns 0 if training can run and 1 if not."""
    for state, title in (("note", "* Good to know"), ("problem", "! What keeps training from running")):
        sentences = [f"  {row.name}: {row.why}" for row in rows if row.state == state]
        if sentences:
            print("", title, *sentences, sep="\n")
    return int(any(row.state == "problem" for row in rows))
