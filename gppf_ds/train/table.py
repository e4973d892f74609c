"""Tables of text."""

from __future__ import annotations

from collections.abc import Sequence


def aligned(rows: Sequence[Sequence[str]], gap: str = "  ") -> list[str]:
    """A line for each row, its cells as wide as the widest of their column."""
    widths = _widths(rows)
    return [gap.join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def ruled(rows: Sequence[Sequence[str]]) -> str:
    """With bars between the columns and a line below the first row."""
    head, *lines = aligned(rows, " | ")
    return "\n".join([head, "-+-".join("-" * width for width in _widths(rows)), *lines])


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """A table of Markdown, the first row its head, that is easy to read as text too."""
    rule = ["-" * max(3, width) for width in _widths(rows)]
    head, *lines = ([cell.ljust(len(dashes)) for cell, dashes in zip(row, rule, strict=True)] for row in rows)
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, rule, *lines))


def _widths(rows: Sequence[Sequence[str]]) -> list[int]:
    return [max(map(len, column)) for column in zip(*rows, strict=True)]
