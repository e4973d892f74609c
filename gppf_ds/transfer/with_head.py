"""A task's path together with its head, as a full model of the library that the task belongs to."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from gppf_ds.backbone import names
from gppf_ds.tasks.task import Head, PlainPath
from gppf_ds.train.restore import Trained
from gppf_ds.transfer.extract import ChosenPath


def export_with_head(trained: Trained, task: str, path: ChosenPath, folder: Path) -> list[Path]:
    """Writes a task's full model, in the form that its kind of task leaves in.

    Detection: ``config.py`` and ``checkpoint.pth`` of mmdet; segmentation: the same of mmseg; classification:
    ``classifier.safetensors`` and ``classifier.json`` of timm.

    Args:
        trained: the network.
        task: whose head to write.
        path: the task's path.
        folder: is there already.

    Returns:
        The files.

    Raises:
        UserError: no library has this backbone together with this head.
    """
    head = trained.model.heads.bank[task]
    assert isinstance(head, Head)
    state = path.state()

    @torch.no_grad()
    def maps(images: Tensor) -> list[Tensor]:
        return list(path(images))

    def renamed(convention: str) -> dict[str, Tensor]:
        prefix = names.PREFIXES.get(convention, "")
        return {name.removeprefix(prefix): value for name, value in names.from_timm(state, convention).items()}

    plain = PlainPath(path.timm_model, path.timm_options, state, renamed, maps)
    return trained.recipe.tasks[task].export(head.eval(), plain, folder)
