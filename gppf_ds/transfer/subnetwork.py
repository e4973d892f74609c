"""Extraction of the sub-network that serves some of a run's tasks: a complete run of its own, with the same numbers."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch.distributed as dist
import yaml
from torch import Tensor

from gppf_ds.backbone.moe.adapt import restricted, rows_kept
from gppf_ds.backbone.moe.layout import Layout
from gppf_ds.errors import UserError
from gppf_ds.simt.masked import Fragment
from gppf_ds.simt.model import learns
from gppf_ds.simt.usage import owner_of
from gppf_ds.train import history
from gppf_ds.train.checkpoint import BUFFER, CONTROLLER, CONTROLLER_STATE, MASTER, CheckpointReader
from gppf_ds.train.recipe import SMOKE_DATA
from gppf_ds.train.record import write_record
from gppf_ds.train.restore import Trained, is_kept
from gppf_ds.train.saving import save


def extract(
    trained: Trained,
    run: Path,
    tasks: Collection[str],
    output: Path,
    keep_frozen: bool = False,
    layout: Layout | None = None,
) -> None:
    """Writes a run's folder with only the units on these tasks' paths, their heads and their controllers.

    Its controllers are frozen, as in the sparse phase. Optimizer state comes along for what is left.

    With ``keep_frozen`` the units stay that a grown run has kept as they were, on a path or not, and so do its
    controllers: less the new tasks, this is the network that it grew from.

    Args:
        trained: the whole network.
        run: its folder.
        tasks: names.
        output: the new folder, which appears when it is complete.
        keep_frozen: see above.
        layout: of token-level experts, with these tasks; by default all that one of them can choose stay.

    Raises:
        UserError: ``output`` holds something already.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"--output {output} is not an empty folder: name one that is not there yet.")
    building = output.with_name(f".{output.name}.incomplete")
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir(parents=True)
    chosen = [name for name in trained.recipe.tasks if name in tasks]
    content = reduced(yaml.safe_load(trained.recipe.text), chosen) | {"output": str(output)}
    write_record(building, yaml.safe_dump(content, sort_keys=False), trained.recipe.config.seed)
    _copy_history(run, building, chosen)
    if (run / SMOKE_DATA).is_dir():
        for source in {str(trained.recipe.tasks[name].source) for name in chosen}:
            shutil.copytree(run / SMOKE_DATA / source, building / SMOKE_DATA / source)
    frozen = _frozen_units(trained) if keep_frozen else set()
    paths = [trained.controller.path(name) for name in chosen]
    kept = [
        sorted({*units, *(unit for own, unit in frozen if own == layer)})
        for layer, units in enumerate(zip(*paths, strict=True))
    ]
    if trained.model.backbone.layout is not None:
        layout = layout or restricted(trained.model.backbone.layout, chosen)
    _write_checkpoint(trained, chosen, kept, not frozen, layout, building / "checkpoints")
    os.replace(building, output)


def reduced(content: dict[str, Any], tasks: Sequence[str]) -> dict[str, Any]:
    """The content of a recipe with only these tasks, and a static schedule that deals only them.

    What a fine-tuned run started from stands in its recipe and its checkpoint already. Nothing is frozen: a run freezes
    for the sake of tasks that may not be here.
    """
    content = {key: value for key, value in content.items() if key not in ("finetune", "trainable", "frozen_tasks")}
    content["tasks"] = {name: task for name, task in content["tasks"].items() if name in tasks}
    if (moe := content.get("backbone", {}).get("moe")) is not None:
        # What k a task has stands in the checkpoint's layout.
        fresh = {**moe, "task_mlp_top_k": {}, "task_attention_top_k": {}}
        content["backbone"] = {**content["backbone"], "moe": fresh}
    if content["schedule"]["kind"] == "static":
        left = [name for name in content["schedule"]["static"] if name in tasks]
        content["schedule"] = {"kind": "static", "static": left} if left else {"kind": "iid", "static": []}
    return content


def _copy_history(run: Path, target: Path, tasks: Collection[str]) -> None:
    """``results.json`` and ``metrics.jsonl`` with what they say of these tasks."""

    def own(values: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in values.items() if name in tasks}

    if (file := run / "results.json").is_file():
        entries = [{**entry, "metrics": own(entry["metrics"])} for entry in json.loads(file.read_text())]
        if any(entry["metrics"] for entry in entries):  # tasks that were frozen have none
            (target / file.name).write_text(json.dumps(entries, indent=1) + "\n")
    if (file := run / "metrics.jsonl").is_file():
        lines = history.read(file)
        lines = [{**line, "tasks": own(line["tasks"]), "losses": own(line["losses"])} for line in lines]
        (target / file.name).write_text("".join(json.dumps(line) + "\n" for line in lines))


def _frozen_units(trained: Trained) -> set[tuple[int, int]]:
    """(layer, unit) of the units that the run has not trained."""
    patterns = trained.recipe.config.trainable
    names = [name for name, _ in trained.model.named_parameters() if owner_of(name)[0] == "unit"]
    learning = {owner_of(name) for name in names if learns(name, patterns)}
    return {(int(part[1]), int(part[2])) for part in map(owner_of, names) if part not in learning}


def _write_checkpoint(
    trained: Trained,
    tasks: Sequence[str],
    kept: list[list[int]],
    paths_fixed: bool,
    layout: Layout | None,
    folder: Path,
) -> None:
    """Copies from checkpoint to checkpoint, so that of the parent only what is kept is read."""
    reader = CheckpointReader(trained.path)
    before = reader.state.layout

    def wanted(name: str) -> bool:
        return is_kept(name, kept) and is_served(name, tasks, layout)

    def rows(name: str) -> list[int] | None:
        return rows_kept(name, before, layout) if before is not None and layout is not None else None

    fragments = [_whole(reader, name, rows(name)) for name in reader.sizes() if wanted(name)]
    shared: dict[str, Tensor] = {}
    for key, tensor in reader.shared.items():
        name = key.removeprefix(BUFFER)
        if not key.startswith(BUFFER):
            if key.removeprefix(CONTROLLER).removeprefix(CONTROLLER_STATE).split(".")[0] in tasks:
                shared[key] = tensor
        elif wanted(name):
            places = rows(name)
            shared[key] = tensor if places is None else tensor[places]
    cursors = {name: reader.state.cursors.get(name, 0) for name in tasks}  # frozen tasks have none
    provenance = reader.state.provenance.restricted([owner_of(fragment.name) for fragment in fragments])
    state = replace(
        reader.state, cursors=cursors, kept=kept, paths_fixed=paths_fixed, layout=layout, provenance=provenance
    )
    with _group_of_one():
        save(folder, state, fragments, shared, keep=1)


def is_served(name: str, tasks: Collection[str], layout: Layout | None) -> bool:
    """Whether a parameter or buffer is one that these tasks, and this layout of experts, need."""
    match owner_of(name):
        case ("task", task):
            return task in tasks
        case ("expert", layer, expert) if layout is not None:
            return int(expert) in layout.experts[layer]
        case _:
            return True


def _whole(reader: CheckpointReader, name: str, rows: Sequence[int] | None) -> Fragment:
    """A parameter with its optimizer state, or some of its rows."""
    shape = reader.shapes.get(name, ())

    def part(kind: str) -> Tensor:
        tensor = reader.whole(name, kind)
        if rows is None or tensor.dim() == 0 or tensor.numel() == 1:
            return tensor
        return tensor.view(shape)[list(rows)].flatten()

    state = {kind: part(kind) for kind in reader.kinds(name)}
    return Fragment(name, 0, part(MASTER), state, shape if rows is None else (len(rows), *shape[1:]))


@contextmanager
def _group_of_one() -> Iterator[None]:
    """A process group without network, for what is a collective call in training."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()
