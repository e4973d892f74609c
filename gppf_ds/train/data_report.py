"""``gppf-ds check-data``: what of a recipe's data is there, what is missing or broken, and where to get it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from gppf_ds.data.catalogue import Finding, examine, find
from gppf_ds.errors import UserError
from gppf_ds.tasks.task import Task
from gppf_ds.train.recipe import Recipe


def report(recipe: Recipe, faults: int) -> tuple[str, bool]:
    """Lines to print, and whether the data of every task are there and in order.

    Args:
        faults: broken annotations to show per data set at most.
    """
    lines: list[str] = []
    well = True
    for name, task in recipe.tasks.items():
        if task.source is None:
            fine = _describe_own(name, task, lines)
        else:
            fine = _describe_source(name, task.source, task.data_folder(), faults, lines)
        well = well and fine
    return "\n".join(lines), well


def _describe_own(name: str, task: Task, lines: list[str]) -> bool:
    try:
        task.check()
    except UserError as error:
        lines.append(f"{name}: data of your own, not usable: {error}")
        return False
    lines.append(f"{name}: data of your own, fine")
    return True


def _describe_source(name: str, source_name: str, root: Path | None, faults: int, lines: list[str]) -> bool:
    source = find(source_name)
    title = f"{name}: {source.title} ({source_name})"
    if root is None:
        lines.append(f"{title}, place unknown: give the task data or data_root.")
        return False
    finding = examine(source, root, faults)
    state = "missing" if finding.missing else "complete" if finding.complete else "broken or incomplete"
    lines.append(f"{title}, {state}, looked in {root.absolute()}")
    lines += [f"  {line}" for line in _details(finding, source.home)]
    return finding.complete


def _details(finding: Finding, home: str) -> Iterator[str]:
    for place in finding.missing:
        yield f"missing: {place}"
    for what, (here, official) in finding.counts.items():
        there = "not counted" if here is None else f"{here:,}"
        yield f"{what}: {there}{f' of {official:,}' if official is not None else ''}"
    for fault in finding.faults:
        yield f"broken: {fault}"
    if finding.missing or finding.short:
        yield f"get it: {home}"
