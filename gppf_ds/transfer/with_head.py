"""A task's path together with its head, as a full model of the library that the task belongs to."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from gppf_ds.backbone import names
from gppf_ds.tasks.task import Head, OwnBackbone, PlainPath
from gppf_ds.train.restore import Trained
from gppf_ds.transfer.extract import ChosenPath
from gppf_ds.transfer.openmm_backbone import PathBackbone


def export_with_head(trained: Trained, task: str, path: ChosenPath, folder: Path) -> list[Path]:
    """Writes a task's full model, in the form that its kind of task leaves in.

    Detection: ``config.py`` and ``checkpoint.pth`` of mmdet; segmentation: the same of mmseg; classification:
    ``classifier.safetensors`` and ``classifier.json`` of timm. Where no backbone of mmdet and mmseg gives the path's
    maps, ``config.py`` names :class:`gppf_ds.transfer.openmm_backbone.PathBackbone`, and says so in its first line.

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

    plain = PlainPath(path.timm_model, path.timm_options, state, renamed, maps, _own_backbone(trained, path))
    return trained.recipe.tasks[task].export(head.eval(), plain, folder)


def _own_backbone(trained: Trained, path: ChosenPath) -> OwnBackbone:
    config = {
        "type": f"{PathBackbone.__module__}.{PathBackbone.__qualname__}",
        "timm_model": path.timm_model,
        "timm_options": path.timm_options,
        "unit_blocks": [trained.model.backbone.block_class(unit) for unit in path.numbers.values()],
    }
    return OwnBackbone(config, path.state_dict())
