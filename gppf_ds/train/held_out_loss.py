"""Every task's loss on the images that are held out of its training set."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist

from gppf_ds.backbone.controller import Controller
from gppf_ds.backbone.lego import Pass
from gppf_ds.config import LoaderConfig
from gppf_ds.seeding import FORWARD, seed_global_generators
from gppf_ds.simt.loader import load
from gppf_ds.simt.model import HEAD_STREAM, SimtModel
from gppf_ds.simt.sampler import Request
from gppf_ds.train.feed import Feed


@torch.no_grad()
def held_out_losses(model: SimtModel, controller: Controller, feed: Feed, device: torch.device) -> dict[str, float]:
    """Every task's loss on the batches that its training never sees, prepared as in training and the same every time.

    A collective call whose result is the same on every rank, and for any number of them but for rounding.

    Args:
        model: with whole parameters.
        controller: of the same tasks.
        feed: with batches held out.
        device: of this rank.
    """
    was_training = model.training
    model.eval()
    names = list(feed.held_out)
    sums = torch.zeros(len(names), 2, dtype=torch.float64)
    seed = feed.config.seed
    # Few batches, read at once: a pool of workers would take longer to start.
    for loaded in load(feed.held_out, _own_requests(feed), seed, LoaderConfig(workers=0)):
        task, number = loaded.request.task, loaded.request.device
        batch = feed.prepare(loaded, device)
        passing = Pass(batch.images, controller.fixed_route(task), (seed, 0, number), batch.sizes)
        features = model.backbone([passing], model.batch_norm)[0]
        seed_global_generators(seed, FORWARD, 0, number, HEAD_STREAM)
        terms = model.heads.bank[task].loss(features, batch.targets)  # type: ignore[operator]
        loss = sum(float(term) for term in terms.values())
        sums[names.index(task)] += torch.tensor([loss, 1.0], dtype=torch.float64)
    model.train(was_training)
    if dist.is_initialized() and dist.get_world_size() > 1:
        sums = sums.to(device)
        dist.all_reduce(sums)
    return {name: total / count for name, (total, count) in zip(names, sums.tolist(), strict=True)}


def _own_requests(feed: Feed) -> Iterator[Request]:
    """This rank's share of the held-out batches. In the place of the step and the device stand 0 and their number."""
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    for name, reader in feed.held_out.items():
        size = feed.task_by_name[name].batch_size
        for number in range(rank, len(reader.dataset) // size, ranks):
            indices = tuple(range(number * size, (number + 1) * size))
            yield Request(0, number, name, (0,) * size, indices)
