"""A task's path together with its head, as a full model of the library that the task belongs to."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from gppf_ds.backbone import names
from gppf_ds.backbone.controller import Route
from gppf_ds.backbone.lego import LegoBackbone, Pass
from gppf_ds.backbone.norm import NormPolicy
from gppf_ds.tasks.task import Head, PlainPath
from gppf_ds.train.restore import Trained
from gppf_ds.transfer.extract import path_state


def export_with_head(trained: Trained, task: str, folder: Path) -> list[Path]:
    """Writes a task's full model, in the form that its kind of task leaves in, into ``folder/task``.

    Detection: ``config.py`` and ``checkpoint.pth`` of mmdet; segmentation: the same of mmseg; classification:
    ``classifier.safetensors`` and ``classifier.json`` of timm.

    Args:
        trained: the network.
        task: whose path and head to write.
        folder: of all exports.

    Returns:
        The files.

    Raises:
        UserError: no library has this backbone together with this head.
    """
    backbone, head = trained.model.backbone, trained.model.heads.bank[task]
    assert isinstance(head, Head)
    target = folder / task
    target.mkdir(parents=True, exist_ok=True)
    path = plain_path(backbone.eval(), trained.controller.fixed_route(task))
    return trained.recipe.tasks[task].export(head.eval(), path, target)


def plain_path(backbone: LegoBackbone, route: Route) -> PlainPath:
    """A path through the backbone as the tasks want to see it.

    Args:
        backbone: in evaluation mode.
        route: along the path.
    """
    assert route.path is not None
    state = path_state(backbone, route.path)

    @torch.no_grad()
    def maps(images: Tensor) -> list[Tensor]:
        return backbone([Pass(images, route)], NormPolicy())[0]

    def renamed(convention: str) -> dict[str, Tensor]:
        prefix = names.PREFIXES.get(convention, "")
        return {name.removeprefix(prefix): value for name, value in names.from_timm(state, convention).items()}

    return PlainPath(backbone.config.name, backbone.timm_options, state, renamed, maps)
