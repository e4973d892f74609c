"""Running statistics of batch norms, measured anew for one task's path.

Training collects them over all tasks and, with soft routing, behind mixtures of units; a path that runs alone sees
other activations.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from gppf_ds.config import ScheduleConfig
from gppf_ds.errors import UserError
from gppf_ds.simt.loader import UnreadableSamples
from gppf_ds.train.feed import Feed
from gppf_ds.train.recipe import Recipe


@torch.no_grad()
def reestimate(path: nn.Module, recipe: Recipe, task: str, batches: int, device: torch.device) -> int:
    """Replaces the running statistics by their plain average over batches of the task's training set.

    The batches are those that a run of this task alone would begin with: the same for the same seed, with the task's
    augmentation. Everything but the batch norms stays in evaluation mode, so that no dropout changes the statistics.

    Args:
        path: takes images (B, 3, H, W); changed in place.
        recipe: of the run.
        task: its name.
        batches: how many.
        device: where to compute; the path is on the CPU before and after.

    Returns:
        The number of batch norms; without any nothing is read.

    Raises:
        UserError: the data are not there, or the samples cannot be read.
    """
    norms = [module for module in path.modules() if isinstance(module, _BatchNorm) and module.track_running_stats]
    if not norms:
        return 0
    try:
        recipe.tasks[task].check()
    except UserError as error:
        raise UserError(f"--reestimate-bn reads the data of tasks.{task}: {error}") from error
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # torch's cumulative average
        norm.train()
    path.to(device)
    feed = Feed(replace(recipe.config, schedule=ScheduleConfig()), {task: recipe.tasks[task]})
    unreadable = UnreadableSamples(recipe.config.loader)
    for loaded in feed.batches(0, batches, {task: 0}, [0], 1):
        unreadable.observe(loaded)
        path(feed.prepare(loaded, device).images)
    path.cpu().eval()
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    return len(norms)
