"""Runs that start from a finished one: dynamic and fixed-path fine-tuning, retraining, growing (GPPF section 3.3).

What the source decides is settled while the recipe is read, and stands in the run's own ``config.yaml``; its weights
are read once, before the first step. A run that resumes needs the source no more.
"""

from __future__ import annotations

from pathlib import Path

import yaml
from torch import Tensor

from gppf_ds.errors import UserError
from gppf_ds.train import checkpoint
from gppf_ds.train.checkpoint import CONTROLLER, CheckpointReader
from gppf_ds.train.inherit import Content
from gppf_ds.train.moe_plan import settle_plan

_DECIDED = ("name", "options", "units", "unit_blocks")
"""Keys of ``backbone`` that the source decides; of ``moe`` see :mod:`gppf_ds.train.moe_plan`."""


def settle(content: Content, smoke: bool = False) -> Content:
    """The recipe with all that its ``finetune.source`` decides; one without that section as it is.

    Args:
        content: of the recipe.
        smoke: start from the source's smoke run.

    Raises:
        UserError: the source is no run, or the recipe contradicts the mode.
    """
    section = content.get("finetune")
    if not isinstance(section, dict) or not isinstance(section.get("source"), str):
        return content
    if smoke:
        section = {**section, "source": smoke_folder(section["source"])}
        if section.get("mode") == "retrain":
            section["path"] = smoke_folder(str(section.get("path")))
        content = {**content, "finetune": section}
    source = content_of(Path(section["source"]))
    own = content.get("backbone") or {}
    options = {**source["backbone"]["options"], **own.get("options", {})}
    decided = {key: source["backbone"][key] for key in _DECIDED} | {"options": options, "pretrained": None}
    settled = {**content, "backbone": {**own, **decided}}
    if source["backbone"].get("moe") is not None:
        layout = checkpoint.layout_of(_newest(Path(section["source"])))
        return settle_plan(settled, source, layout)
    if section.get("plan") or section.get("routers"):
        raise UserError("finetune.plan and finetune.routers are for token-level experts, which the source has not.")
    return _grown(settled, section, source) if section.get("mode") == "grow" else settled


def _grown(content: Content, section: Content, source: Content) -> Content:
    """The old tasks join, frozen; chosen layers get units; only what is new learns."""
    if content.get("trainable") or content.get("frozen_tasks"):
        raise UserError("finetune.mode grow decides trainable and frozen_tasks itself: leave them out.")
    if (content.get("controller") or {}).get("sparse"):
        raise UserError("finetune.mode grow keeps every old unit, controller.sparse drops units: leave it out.")
    old, new = source["tasks"], content.get("tasks") or {}
    if both := sorted(old.keys() & new.keys()):
        raise UserError(f"tasks.{both[0]}: finetune.source has a task of this name, which stays: choose another name.")
    before = units_per_layer(source, checkpoint.number_of_layers(_newest(Path(section["source"]))))
    layers = section.get("grow_layers")
    if layers is not None and not all(layer in range(len(before)) for layer in layers):
        raise UserError(f"finetune.grow_layers must be among 0 to {len(before) - 1}, not {layers}.")
    chosen = range(len(before)) if layers is None else layers
    after = [count + int(section.get("grow_units", 1)) * (layer in chosen) for layer, count in enumerate(before)]
    grown = [
        f"backbone.layers.{layer}.units.{unit}.*"
        for layer in range(len(before))
        for unit in range(before[layer], after[layer])
    ]
    return {
        **content,
        "backbone": {**content["backbone"], "units": after},
        "tasks": {**old, **new},
        "frozen_tasks": list(old),
        "trainable": [*grown, *(f"heads.bank.{name}.*" for name in new)],
    }


def smoke_folder(output: str) -> str:
    """Where the smoke run of a recipe with this output goes."""
    return str(Path(output).with_name(f"{Path(output).name}-smoke"))


def content_of(folder: Path) -> Content:
    """The resolved recipe of a run."""
    path = folder / "config.yaml"
    if not path.is_file():
        raise UserError(f"finetune.source: {folder} is no run: it has no config.yaml (give the folder of a run).")
    content: Content = yaml.safe_load(path.read_text())
    return content


def units_per_layer(content: Content, layers: int) -> list[int]:
    """How many units every lego layer of a run has, dropped ones included.

    Args:
        content: the run's resolved recipe.
        layers: of its backbone.
    """
    units = content["backbone"]["units"]
    return list(units) if isinstance(units, list) else [units] * layers


def last_checkpoint(folder: Path) -> CheckpointReader:
    """Of a run."""
    return CheckpointReader(_newest(folder))


def _newest(folder: Path) -> Path:
    found = checkpoint.complete(folder / "checkpoints")
    if not found:
        raise UserError(f"finetune: {folder} has no complete checkpoint: train it first.")
    return found[-1]


def rows_of(reader: CheckpointReader) -> dict[str, Tensor]:
    """The logits of every task, (layers, max units)."""
    return {k.removeprefix(CONTROLLER): v for k, v in reader.shared.items() if k.startswith(CONTROLLER)}
