"""Every public data set that the recipes name, and what a copy on disk has against the official one."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

from gppf_ds.data.licences import LICENCES
from gppf_ds.data.sets import classification, detection, kitti_depth, segmentation, uodb
from gppf_ds.data.source import Source
from gppf_ds.errors import UserError

_SETS = (classification, detection, uodb, segmentation, kitti_depth)

SOURCES: dict[str, Source] = {
    name: replace(source, licence=LICENCES.get(name, "")) for sets in _SETS for name, source in sets.SOURCES.items()
}
"""By the name that a task's ``source`` has."""


@dataclass(frozen=True)
class Finding:
    """What was found of a source under a folder."""

    missing: list[str]
    """Files and folders of the layout that are not there."""
    counts: dict[str, tuple[int | None, int | None]] = field(default_factory=dict)
    """By what is counted: (here, official); None where it was not counted or no official number is known."""
    faults: list[str] = field(default_factory=list)
    """The first broken annotations."""

    @property
    def complete(self) -> bool:
        """Nothing is missing or broken, and as much is there as the authors published."""
        return not self.missing and not self.faults and not self.short

    @property
    def short(self) -> list[str]:
        """What there is less of than officially."""
        return [name for name, (here, official) in self.counts.items() if (here or 0) < (official or 0)]


def find(name: str) -> Source:
    """The source with this name; raises :class:`UserError` if there is none."""
    if name not in SOURCES:
        raise UserError(f"source {name!r} is not in the catalogue: choose from {', '.join(SOURCES)}, or leave it out.")
    return SOURCES[name]


def examine(source: Source, root: Path, limit: int) -> Finding:
    """Looks for a source under ``root``; annotations are read only where the layout is complete.

    Args:
        limit: broken annotations to report at most.
    """
    missing = [place for place in source.layout if not (root / place).exists()]
    if missing:
        return Finding(missing)
    here = source.count(root)
    counts = {key: (here.get(key), source.counts.get(key)) for key in [*source.counts, *(here.keys() - source.counts)]}
    return Finding([], counts, source.faults(root, limit))
