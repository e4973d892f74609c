"""What is known of a public data set without having it: where it comes from, what lies where, how much there is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Source:
    """A public data set in its official layout."""

    title: str
    """Name and release, as its authors give them."""
    home: str
    """The page that one downloads it from, and what to fetch there, in one sentence."""
    layout: tuple[str, ...]
    """Files and folders under the root that must be there, as the official archives unpack."""
    counts: Mapping[str, int]
    """Official numbers, for example {"train images": 118287}."""
    count: Callable[[Path], Mapping[str, int]]
    """The same numbers of a copy on disk, from its root; cheap (no image is opened)."""
    faults: Callable[[Path, int], list[str]]
    """The first broken annotations of a copy, at most so many: one sentence each, with file and line or id."""
    smoke: Callable[[Path], None]
    """Writes a tiny set of the same layout and format (directory names, json keys, csv columns, png palettes)."""
    licence: str = ""
    """Of images and annotations, as their authors state it; empty where that is not known."""
