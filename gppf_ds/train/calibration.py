"""Which experts the validation images of a task choose: counted, where running rows are an average over training."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from gppf_ds.backbone.lego import Pass
from gppf_ds.backbone.moe.selections import Selections
from gppf_ds.errors import SampleError, UserError
from gppf_ds.tasks.task import Batch, Task, evenly
from gppf_ds.train.restore import Trained


def batches(task: Task, name: str, images: int, device: torch.device) -> Iterator[Batch]:
    """Validation images as they are evaluated, at most so many, spread evenly over the set: always the same ones.

    Args:
        task: of any kind.
        name: of the task.
        images: how many.
        device: of the batches.

    Raises:
        UserError: the data are not there, or an image cannot be read.
    """
    try:
        samples = task.dataset("val")
        places = evenly(len(samples), images)
        for start in range(0, len(places), task.batch_size):
            read = [samples[place] for place in places[start : start + task.batch_size]]
            yield task.preprocess(task.collate(read), device, training=False)
    except (OSError, SampleError) as error:
        raise UserError(f"tasks.{name}: its validation images are needed and cannot be read: {error}") from error


@torch.no_grad()
def count_selections(trained: Trained, tasks: Sequence[str], images: int, device: torch.device) -> Selections:
    """How often the tokens of validation images choose each expert; those of padding do not count.

    Args:
        trained: a network with token-level experts, in evaluation mode on ``device``.
        tasks: their names.
        images: of each task, at most.
        device: of the network.

    Raises:
        UserError: a task's validation images cannot be read.
    """
    layers = trained.model.backbone.moe_layers()
    found: Selections = {}
    for name in tasks:
        sums = {layer: torch.zeros(len(module.experts), device=device) for layer, module in layers.items()}
        for batch in batches(trained.recipe.tasks[name], name, images, device):
            passing = Pass(batch.images, trained.controller.fixed_route(name), sizes=batch.sizes)
            trained.model.backbone([passing], trained.model.batch_norm)
            for layer, statistics in passing.statistics.items():
                sums[layer] += statistics[1]
        found[name] = {
            layer: dict(zip(map(int, module.experts), sums[layer].tolist(), strict=True))
            for layer, module in layers.items()
        }
    return found
