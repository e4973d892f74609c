"""The network of a run before its first step: from the seed, from pretrained weights, or from a finished run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gppf_ds.backbone.controller import NEVER, Controller
from gppf_ds.backbone.pretrained import load_pretrained, moved
from gppf_ds.config import RunConfig
from gppf_ds.errors import UserError
from gppf_ds.simt.model import SimtModel
from gppf_ds.simt.usage import Owner, owner_of
from gppf_ds.tasks.task import Task
from gppf_ds.train.checkpoint import BUFFER
from gppf_ds.train.finetune import content_of, last_checkpoint, rows_of, units_per_layer
from gppf_ds.train.moe_start import ExpertStart
from gppf_ds.train.provenance import Provenance
from gppf_ds.train.restore import build_model

Rows = dict[str, Tensor]
"""Logits by task, (layers, max units)."""


@dataclass
class Start:
    """A run's network before its first step."""

    model: SimtModel
    controller: Controller
    kept: list[list[int]] | None
    """The units that every lego layer holds; None for all."""
    paths_fixed: bool
    """Whether every device takes its task's path."""
    report: str
    """What was loaded, if anything."""
    provenance: Provenance
    """What has trained it so far."""


def start(config: RunConfig, tasks: Mapping[str, Task]) -> Start:
    """Builds the network of a run and gives it the values that its first step starts from.

    Raises:
        UserError: weights to start from are missing or do not fit.
    """
    if config.finetune.source is None:
        model, controller = build_model(config.backbone, tasks, config.seed, trainable=config.trainable)
        report, weights = "", config.backbone.pretrained
        if weights is not None:
            report = str(load_pretrained(model.backbone, weights, config.backbone.pretrained_noise, config.seed))
        return Start(model, controller, None, False, report, Provenance())
    source = _Source(config, tasks)
    rows = source.rows_for(list(config.trained(tasks)))
    kept = source.kept(rows, config)
    layout = source.experts.layout if source.experts else None
    model, controller = build_model(
        config.backbone, tasks, config.seed, kept, source.paths_fixed, config.trainable, layout
    )
    report = source.load(model, controller, rows, config)
    return Start(model, controller, kept, source.paths_fixed, report, source.provenance(model, config.frozen_tasks))


class _Source:
    """The finished run that another one starts from."""

    def __init__(self, run: RunConfig, tasks: Mapping[str, Task]) -> None:
        config = run.finetune
        folder = Path(str(config.source))
        content = content_of(folder)
        self.config = config
        self.reader = last_checkpoint(folder)
        self.rows = rows_of(self.reader)
        self.units = units_per_layer(content, len(next(iter(self.rows.values()))))
        self.paths_fixed = config.mode in ("fixed", "retrain")
        self.experts = ExpertStart(self.reader, content, run, tasks) if self.reader.state.layout else None

    def rows_for(self, tasks: Sequence[str]) -> Rows:
        """The rows that fix the paths of these tasks; none where they are to be learnt."""
        path = self.config.path
        if self.config.mode == "fixed":
            if path not in self.rows:
                raise UserError(f"finetune.path: the source has no task {path!r}: choose from {', '.join(self.rows)}.")
            return dict.fromkeys(tasks, self.rows[path])
        if self.config.mode == "retrain":
            found = rows_of(last_checkpoint(Path(str(path))))
            for name in tasks:
                if name not in found:
                    raise UserError(f"finetune.path: {path} has no task {name!r}, only {', '.join(found)}.")
                if found[name].shape != next(iter(self.rows.values())).shape:
                    raise UserError(f"finetune.path: {path} has another backbone than finetune.source.")
            return {name: found[name] for name in tasks}
        return {}

    def kept(self, rows: Rows, config: RunConfig) -> list[list[int]] | None:
        """The units that the new run holds: of its tasks' paths where these are fixed, else the source's and new ones.

        Raises:
            UserError: a path goes through units that the source has dropped.
        """
        there = self.reader.state.kept
        if not self.paths_fixed:
            if there is None:
                return None
            wanted = config.backbone.units
            after = wanted if isinstance(wanted, list) else [wanted] * len(self.units)
            grown = (range(old, new) for old, new in zip(self.units, after, strict=True))
            return [[*units, *new] for units, new in zip(there, grown, strict=True)]
        controller = Controller(list(rows), self.units)
        for name, row in rows.items():
            controller.logits[name].data.copy_(row)
        kept = controller.units_on_paths()
        if there is not None and any(set(own) - set(units) for own, units in zip(kept, there, strict=True)):
            raise UserError(
                f"finetune.path: {self.config.path} goes through units that {self.config.source} has dropped in its "
                "sparse phase: start both from the same run."
            )
        return kept

    @torch.no_grad()
    def load(self, model: SimtModel, controller: Controller, rows: Rows, config: RunConfig) -> str:
        """Gives the network the source's values, and returns a report.

        Raises:
            UserError: the backbones differ, or a head is asked for that is not there.
        """
        report = [f"starting from {self.reader.path}, finetune.mode {self.config.mode}"]
        held = [name for name in (*self.reader.sizes(), *self._buffers()) if name.startswith("backbone.")]
        own = self._tensors(model)
        for name, tensor in own.items():
            if name.startswith("backbone.") and self.experts is not None:
                tensor.copy_(self.experts.value(name, tensor, self._value))
            elif name.startswith("backbone."):
                origin = self._origin(name)
                grown = origin != name
                value = self._value(origin, tensor)
                noise = config.backbone.pretrained_noise if grown and isinstance(tensor, torch.nn.Parameter) else 0.0
                tensor.copy_(moved(value, noise, config.seed, "grown", name) if noise else value)
        taken = sum(name in own for name in held)
        report.append(f"  backbone: {taken} of the source's {len(held)} tensors (the others are on no path wanted)")
        report += self.experts.report() if self.experts is not None else []
        self._load_rows(controller, rows, config.frozen_tasks)
        for name in config.frozen_tasks:
            for key, tensor in own.items():
                if key.startswith(f"heads.bank.{name}."):
                    tensor.copy_(self._value(key, tensor))
        report += [self._load_head(model, own, new, old) for new, old in self.config.heads.items()]
        if config.trainable:
            sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
            learn, all_ = sum(size for size, learns in sizes if learns), sum(size for size, _ in sizes)
            report.append(f"  {learn:,} of {all_:,} parameters learn")
        return "\n".join(report)

    def provenance(self, model: SimtModel, frozen: Sequence[str]) -> Provenance:
        """What has trained the parts that the new network takes over."""
        origins: dict[Owner, Owner] = {}
        for name, _ in model.named_parameters():
            if name.startswith("backbone."):
                origins[owner_of(name)] = owner_of(self._origin(name))
        heads = {name: name for name in frozen} | dict(self.config.heads)
        origins |= {("task", new): ("task", old) for new, old in heads.items()}
        return self.reader.state.provenance.handed_on(origins)

    def _load_rows(self, controller: Controller, rows: Rows, frozen: Sequence[str]) -> None:
        """A unit that a layer does not hold, or that came after a task, is never chosen by it."""
        for name, row in controller.logits.items():
            known = self.rows[name] if name in frozen else rows.get(name)
            if known is not None:
                row.fill_(NEVER)
                row[:, : known.shape[1]] = known
            elif self.reader.state.kept is not None:
                for layer, units in enumerate(self.reader.state.kept):
                    dropped = [unit for unit in range(self.units[layer]) if unit not in units]
                    row[layer, dropped] = NEVER
            if name in frozen:
                for layer, count in enumerate(self.units):
                    row[layer, count:] = NEVER

    def _load_head(self, model: SimtModel, own: Mapping[str, Tensor], new: str, old: str) -> str:
        if new not in model.heads.bank:
            raise UserError(f"finetune.heads: the recipe has no task {new!r}: choose from {', '.join(self.rows)}.")
        if old not in self.rows:
            raise UserError(f"finetune.heads: the source has no task {old!r}: choose from {', '.join(self.rows)}.")
        head: Any = model.heads.bank[new]
        final = () if self.config.final_layers else head.prediction_layers
        prefix, shapes = f"heads.bank.{new}.", {**self.reader.shapes, **self._buffer_shapes()}
        taken, left = 0, {}
        for name, tensor in own.items():
            if not name.startswith(prefix):
                continue
            inner = name.removeprefix(prefix)
            origin = f"heads.bank.{old}.{inner}"
            if any(fnmatch(inner, pattern) for pattern in final):
                left[inner] = "a final prediction layer"
            elif origin not in shapes:
                left[inner] = "not in the old head"
            elif shapes[origin] != tuple(tensor.shape):
                left[inner] = f"{shapes[origin]} there, {tuple(tensor.shape)} here"
            else:
                tensor.copy_(self._value(origin, tensor))
                taken += 1
        if not taken:
            raise UserError(f"finetune.heads: the heads of {new} and of the source's {old} have no tensor in common.")
        lines = [f"  head of {new}: {taken} of {taken + len(left)} tensors of {old}'s"]
        return "\n".join([*lines, *(f"    not {name}: {why}" for name, why in left.items())])

    def _origin(self, name: str) -> str:
        """The source's tensor that one of the backbone starts from: a grown unit is a copy of the layer's first."""
        if self.experts is not None:
            return self.experts.origin(name)
        parts = name.split(".")
        if "units" in parts:
            layer, unit = int(parts[2]), int(parts[4])
            if unit >= self.units[layer]:
                kept = self.reader.state.kept
                parts[4] = str(kept[layer][0] if kept else 0)
        return ".".join(parts)

    def _value(self, name: str, like: Tensor) -> Tensor:
        held = self.reader.shared.get(BUFFER + name)
        if held is None and name in self.reader.shapes:
            held = self.reader.whole(name)
        if held is None or held.numel() != like.numel():
            raise UserError(
                f"finetune.source: {self.reader.path} has no {name} of shape {tuple(like.shape)}: its backbone or its "
                "heads are not those of its recipe."
            )
        return held.view_as(like)

    def _tensors(self, model: SimtModel) -> dict[str, Tensor]:
        """Parameters and those buffers that are saved."""
        saved = model.state_dict().keys()
        return {n: t for n, t in (*model.named_parameters(), *model.named_buffers()) if n in saved}

    def _buffers(self) -> Iterable[str]:
        return (key.removeprefix(BUFFER) for key in self.reader.shared if key.startswith(BUFFER))

    def _buffer_shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(self.reader.shared[BUFFER + name].shape) for name in self._buffers()}
