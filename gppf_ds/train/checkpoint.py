"""Checkpoints by parameter name: complete or absent, free of pickle, and independent of ranks and ZeRO stage.

Every rank writes the parts of the parameters that it owns, with their optimizer state, as flat slices into one
safetensors file; a reader puts the slices together for whatever layout it has. A checkpoint is a folder that gets its
name by a rename after a manifest with the hash of every file is on disk, so that a kill leaves it complete or ignored.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from gppf_ds.backbone.moe.layout import Layout
from gppf_ds.errors import UserError
from gppf_ds.simt.loss_scale import LossScale
from gppf_ds.simt.masked import Fragment
from gppf_ds.train.capacity import Trial
from gppf_ds.train.provenance import Provenance

FORMAT = 1
MASTER = "master"
"""The kind of a slice that holds parameter values; every other kind is a key of the optimizer state."""
BUFFER, CONTROLLER, CONTROLLER_STATE = "buffer.", "controller.", "controller_optimizer."
"""Prefixes of what every rank holds alike."""


@dataclass
class TrainState:
    """All that a resumed run needs besides tensors."""

    step: int
    """Optimizer steps done."""
    cursors: dict[str, int]
    """Samples dealt so far, by task."""
    seed: int
    """Of the run: the schedule, the samples and all noise follow from it."""
    unchanged_steps: int = 0
    """Steps in a row that the non-finite guard skipped."""
    loss_scale: LossScale = field(default_factory=LossScale)
    """Of an fp16 run."""
    kept: list[list[int]] | None = None
    """The units that every lego layer still holds; None for all."""
    paths_fixed: bool = False
    """Whether every device takes its task's path, and the controllers stay as they are."""
    layout: Layout | None = None
    """Of token-level experts, where the backbone has them."""
    trials: dict[str, Trial] = field(default_factory=dict)
    """By task, what the search for its number of experts remembers; the number itself is in the layout."""
    provenance: Provenance = field(default_factory=Provenance)
    """What trained each part of the network."""


def complete(folder: Path) -> list[Path]:
    """The complete checkpoints in a folder, oldest first; anything a kill left behind is not among them."""
    return sorted(path for path in folder.glob("step-*") if (path / "manifest.json").is_file())


def number_of_layers(path: Path) -> int:
    """Lego layers of the network of a checkpoint, from the head of one file: nothing else is read or verified."""
    with safe_open(path / "shared.safetensors", "pt") as tensors:
        row = next(key for key in tensors.keys() if key.startswith(CONTROLLER))  # noqa: SIM118 (not a mapping)
        return int(tensors.get_slice(row).get_shape()[0])


def layout_of(path: Path) -> Layout:
    """The layout of the token-level experts of a checkpoint whose network has them; nothing is verified."""
    layout = Layout.read(json.loads((path / "state.json").read_text())["layout"])
    assert layout is not None
    return layout


class CheckpointReader:
    """Reads slices of parameters and optimizer state from a checkpoint, whatever layout wrote it.

    The files stay open, mapped into memory, for the reader's life: a large checkpoint has thousands of slices.

    Raises:
        UserError: the folder is no complete checkpoint, or a file is not the one that was written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        ranks = self._verified_ranks()
        self.state = self._state()
        self.shapes: dict[str, tuple[int, ...]] = {}
        """Of the whole parameters."""
        self._slices: dict[tuple[str, str], list[tuple[int, Any, str]]] = defaultdict(list)
        for file in ranks:
            tensors = safe_open(file, "pt")
            self.shapes |= {name: tuple(json.loads(shape)) for name, shape in (tensors.metadata() or {}).items()}
            for key in tensors.keys():  # noqa: SIM118 (not a mapping)
                name, start, kind = key.rsplit("@", 2)
                self._slices[name, kind].append((int(start), tensors, key))
        with safe_open(path / "shared.safetensors", "pt") as tensors:
            self.shared = {key: tensors.get_tensor(key) for key in tensors.keys()}  # noqa: SIM118

    def sizes(self) -> dict[str, int]:
        """The parameters in the checkpoint and how many values each has."""
        sizes: dict[str, int] = defaultdict(int)
        for (name, kind), parts in self._slices.items():
            for _, tensors, key in parts if kind == MASTER else ():
                sizes[name] += tensors.get_slice(key).get_shape()[0]
        return dict(sizes)

    def kinds(self, name: str) -> list[str]:
        """The optimizer state that a parameter has."""
        return sorted(kind for other, kind in self._slices if other == name and kind != MASTER)

    def whole(self, name: str, kind: str = MASTER) -> Tensor:
        """All of a parameter (or of one of its state tensors), flat; a number for a state that is one number."""
        parts = self.parts(name, kind)
        return parts[0].clone() if parts[0].dim() == 0 else torch.cat(parts)

    def parts(self, name: str, kind: str = MASTER) -> list[Tensor]:
        """The slices that make up :meth:`whole`, in order, as they lie in the files."""
        slices = sorted(self._slices[name, kind], key=lambda part: part[0])
        return [tensors.get_tensor(key) for _, tensors, key in slices]

    def _verified_ranks(self) -> list[Path]:
        """The files that the ranks wrote, after all files have been checked against the manifest."""
        try:
            files = dict(json.loads((self.path / "manifest.json").read_text())["files"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{self.path} is no complete checkpoint: choose another (its manifest: {error})."
            ) from error
        for name in sorted({*files, "shared.safetensors", "state.json"}):
            if not (self.path / name).is_file() or describe(self.path / name) != files.get(name):
                raise UserError(
                    f"{self.path / name} is missing or is not the file that was saved: use another checkpoint."
                )
        return [self.path / name for name in sorted(files) if name.startswith("rank-")]

    def _state(self) -> TrainState:
        values = json.loads((self.path / "state.json").read_text())
        if values.pop("format") != FORMAT:
            raise UserError(f"{self.path} was written by another version of gppf_ds: resume it with that version.")
        trials = {task: Trial(**own) for task, own in values.pop("trials", {}).items()}
        scale = LossScale(**values.pop("loss_scale", {}))
        known = {"provenance": Provenance.read(values.get("provenance")), "layout": Layout.read(values.get("layout"))}
        return TrainState(**values | known, trials=trials, loss_scale=scale)


def slices_of(fragment: Fragment) -> Iterable[tuple[str, Tensor]]:
    """The tensors of a fragment with their kinds, flat; numbers stay numbers."""
    yield MASTER, fragment.master
    for kind, value in fragment.state.items():
        tensor = value if isinstance(value, Tensor) else torch.tensor(value)
        yield kind, tensor.detach().reshape(-1) if tensor.dim() else tensor


def describe(path: Path) -> dict[str, Any]:
    """Size and hash of a file, as the manifest has them."""
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
