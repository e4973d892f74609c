"""Checkpoints by parameter name: complete or absent, free of pickle, and independent of ranks and ZeRO stage.

Every rank writes the parts of the parameters that it owns, with their optimizer state, as flat slices into one
safetensors file; a reader puts the slices together for whatever layout it has. A checkpoint is a folder that gets its
name by a rename after a manifest with the hash of every file is on disk, so that a kill leaves it complete or ignored.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from gppf_ds.errors import UserError
from gppf_ds.simt.masked import Fragment
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
    kept: list[list[int]] | None = None
    """The units that every lego layer still holds; None for all."""
    paths_fixed: bool = False
    """Whether every device takes its task's path, and the controllers stay as they are."""
    provenance: Provenance = field(default_factory=Provenance)
    """What trained each part of the network."""


def save(folder: Path, state: TrainState, fragments: Iterable[Fragment], shared: dict[str, Tensor], keep: int) -> Path:
    """Writes ``folder/step-N``; a collective call.

    Args:
        folder: of all checkpoints of the run.
        state: step and cursors.
        fragments: what this rank owns.
        shared: tensors that every rank holds alike (buffers, controllers); rank 0 writes them.
        keep: how many checkpoints to leave in the folder.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    final = folder / f"step-{state.step:08d}"
    building = folder / f".{final.name}.incomplete"
    if rank == 0:
        shutil.rmtree(building, ignore_errors=True)
        building.mkdir(parents=True)
    dist.barrier()
    entries = {}
    name = f"rank-{rank:05d}.safetensors"
    fragments = list(fragments)
    slices = {_key(f, kind): tensor for f in fragments for kind, tensor in _slices(f)}
    entries[name] = _write(building / name, slices, {f.name: json.dumps(f.shape) for f in fragments})
    if rank == 0:
        entries["shared.safetensors"] = _write(building / "shared.safetensors", shared)
        (building / "state.json").write_text(json.dumps({"format": FORMAT, **asdict(state)}, indent=1))
        entries["state.json"] = _describe(building / "state.json")
    gathered: list[Any] = [None] * world_size
    dist.all_gather_object(gathered, entries)
    if rank == 0:
        files = {name: entry for part in gathered for name, entry in part.items()}
        _write_synced(building / "manifest.json", json.dumps({"format": FORMAT, "files": files}, indent=1))
        shutil.rmtree(final, ignore_errors=True)
        os.replace(building, final)
        for old in complete(folder)[:-keep]:
            shutil.rmtree(old)
    dist.barrier()
    return final


def complete(folder: Path) -> list[Path]:
    """The complete checkpoints in a folder, oldest first; anything a kill left behind is not among them."""
    return sorted(path for path in folder.glob("step-*") if (path / "manifest.json").is_file())


def number_of_layers(path: Path) -> int:
    """Lego layers of the network of a checkpoint, from the head of one file: nothing else is read or verified."""
    with safe_open(path / "shared.safetensors", "pt") as tensors:
        row = next(key for key in tensors.keys() if key.startswith(CONTROLLER))  # noqa: SIM118 (not a mapping)
        return int(tensors.get_slice(row).get_shape()[0])


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
            if not (self.path / name).is_file() or _describe(self.path / name) != files.get(name):
                raise UserError(
                    f"{self.path / name} is missing or is not the file that was saved: use another checkpoint."
                )
        return [self.path / name for name in sorted(files) if name.startswith("rank-")]

    def _state(self) -> TrainState:
        values = json.loads((self.path / "state.json").read_text())
        if values.pop("format") != FORMAT:
            raise UserError(f"{self.path} was written by another version of gppf_ds: resume it with that version.")
        return TrainState(**values | {"provenance": Provenance.read(values.get("provenance"))})


def _slices(fragment: Fragment) -> Iterable[tuple[str, Tensor]]:
    yield MASTER, fragment.master
    for kind, value in fragment.state.items():
        tensor = value if isinstance(value, Tensor) else torch.tensor(value)
        yield kind, tensor.detach().reshape(-1) if tensor.dim() else tensor


def _key(fragment: Fragment, kind: str) -> str:
    return f"{fragment.name}@{fragment.start}@{kind}"


def _write(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> dict[str, Any]:
    # safetensors 0.8 writes a broken header for no tensors with an empty metadata mapping.
    whole = {key: tensor.detach().cpu().contiguous().clone() for key, tensor in tensors.items()}
    save_file(whole, path, metadata or None)
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return _describe(path)


def _write_synced(path: Path, text: str) -> None:
    with path.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _describe(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
