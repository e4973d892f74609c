"""Writing a task's path: weights, what they are in json, a model card, and graphs for other runtimes."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from gppf_ds.backbone import names
from gppf_ds.errors import UserError
from gppf_ds.train.restore import Trained
from gppf_ds.transfer import batch_norms, card, deploy, loading, training_data
from gppf_ds.transfer.extract import ChosenPath, Size
from gppf_ds.transfer.with_head import export_with_head

WEIGHTS_FILE, DESCRIPTION_FILE, CARD_FILE = "model.safetensors", "model.json", "README.md"

MODULE_FILE = "model.py"
"""The code of a model with token-level experts, see :mod:`gppf_ds.transfer.moe_export`."""

FULL_MODEL_FILES = ("classifier.safetensors", "classifier.json", "config.py", "checkpoint.pth")

DENSE_SIZE = (256, 320)
"""Not the size of a classifier: there Swin in mmdet and mmseg computes otherwise than at all others."""


@dataclass(frozen=True)
class Options:
    """How a path leaves."""

    names: str = "timm"
    """Whose parameter names the file has: one of :data:`gppf_ds.backbone.names.CONVENTIONS`."""
    reestimate: int = 0
    """Measure the running statistics of batch norms anew on this many training batches of the task; 0 keeps them."""
    head: bool = False
    """Write the full model, path and head, too."""
    onnx: bool = False
    program: bool = False
    """Write what ``torch.export`` makes of the path, too."""
    size: Size | None = None
    """Of the images to compare and trace with; where not given, what timm's model was made for, or :data:`DENSE_SIZE`
    for names of mmdet and mmseg."""


def export(
    trained: Trained, task: str, folder: Path, options: Options | None = None, run: Path | None = None
) -> list[Path]:
    """Writes ``folder/task/``: ``model.safetensors``, ``model.json``, ``README.md``, ``model.onnx``, ``model.pt2``, and
    what :func:`gppf_ds.transfer.with_head.export_with_head` writes.

    The files have been loaded back and compared with the path before this returns.

    Args:
        trained: the network; stays as it is.
        task: whose path to write.
        folder: of all exports.
        options: how.
        run: the folder of the run, whose evaluations are quoted.

    Returns:
        The files.

    Raises:
        UserError: the names have no place for this path, a package or the data are missing, or it cannot be traced.
        RuntimeError: what was written does not give the numbers of the path.
    """
    options = options or Options()
    if options.onnx:
        deploy.require_onnx()
    path = ChosenPath(trained.model.backbone, trained.controller.path(task))
    size = options.size or (DENSE_SIZE if options.names in ("mmdet", "mmseg") else path.trained_size)
    statistics = _reestimate(path, trained, task, options.reestimate) if options.reestimate else None
    named = names.from_timm(path.state(), options.names)
    target = emptied(folder / task)
    weights = target / WEIGHTS_FILE
    save_file({name: tensor.contiguous().clone() for name, tensor in named.items()}, weights, {"format": "pt"})
    graph = None
    full: list[Path] = []
    try:
        loaded = loading.check(path, options.names, weights, size)
        if options.onnx or options.program:
            graph = deploy.write(path, size, target, options.onnx, options.program)
        if options.head:
            full = export_with_head(trained, task, path, target)
    except (UserError, RuntimeError):
        emptied(target)
        raise
    description = card.describe(trained, task, path, loaded, size, options.names, statistics, graph)
    description |= {"full_model": [file.name for file in full]}
    description |= {"trained_on": training_data.of_path(trained.path, task, path.numbers, bool(full))}
    description |= {"evaluation": card.last_evaluation(run, task, trained.step)}
    (target / DESCRIPTION_FILE).write_text(json.dumps(description, indent=1) + "\n")
    (target / CARD_FILE).write_text(card.text(description, loaded))
    written = [WEIGHTS_FILE, DESCRIPTION_FILE, CARD_FILE, *(graph.files if graph else ())]
    return [target / name for name in written] + full


def _reestimate(path: ChosenPath, trained: Trained, task: str, batches: int) -> dict[str, Any]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    norms = batch_norms.reestimate(path, trained.recipe, task, batches, device)
    return {"batch_norms": norms, "reestimated_on_batches": batches if norms else 0}


def emptied(target: Path) -> Path:
    """The folder without the files of an earlier export, which may be of another checkpoint."""
    target.mkdir(parents=True, exist_ok=True)
    for name in (
        WEIGHTS_FILE,
        DESCRIPTION_FILE,
        CARD_FILE,
        MODULE_FILE,
        f"{deploy.ONNX_FILE}*",
        deploy.PROGRAM_FILE,
        *FULL_MODEL_FILES,
    ):
        for file in target.glob(name):
            file.unlink()
    return target
