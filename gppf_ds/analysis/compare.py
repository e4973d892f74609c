"""CKA of trained networks on a task's images: layer by layer, within one path and across two."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gppf_ds.analysis.cka import LEAST_IMAGES, MinibatchCka, gram
from gppf_ds.analysis.heat_map import draw_heat_map
from gppf_ds.analysis.style import new_figure
from gppf_ds.backbone.lego import Pass
from gppf_ds.config import LoaderConfig
from gppf_ds.errors import UserError
from gppf_ds.seeding import ORDER, generator
from gppf_ds.simt.loader import TaskReader, UnreadableSamples, load
from gppf_ds.simt.sampler import Request
from gppf_ds.tasks.task import Batch, Task
from gppf_ds.train.restore import Trained

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Side:
    """A path to compare."""

    run: str
    """A name to print."""
    trained: Trained
    path: str
    """The task of that run whose path it is."""

    @property
    def layers(self) -> list[str]:
        """Names of the layers, first to last."""
        return [str(layer.name) for layer in self.trained.model.backbone.layers]

    @property
    def title(self) -> str:
        """What axes call it."""
        return f"{self.run}: path of {self.path}, step {self.trained.step}"

    @torch.no_grad()
    def grams(self, batch: Batch) -> Tensor:
        """The kernels of what every layer gives, (layers, n, n) on the CPU; a layer's map is let go before the next.

        Args:
            batch: of n images, on the network's device.
        """
        found: list[Tensor] = []
        model = self.trained.model

        def keep(_module: Any, _inputs: Any, outputs: tuple[Tensor, ...]) -> None:
            found.append(gram(outputs[0]).cpu())

        hooks = [layer.register_forward_hook(keep) for layer in model.backbone.layers]
        route = self.trained.controller.fixed_route(self.path)
        try:
            model.backbone([Pass(batch.images, route, sizes=batch.sizes)], model.batch_norm)
        finally:
            for hook in hooks:
                hook.remove()
        return torch.stack(found)


@dataclass(frozen=True)
class Images:
    """The validation images of a task, in random order, as the task is evaluated on them.

    Args:
        name: of the task.
        task: the task.
        count: images, at most.
        batch: images of a minibatch; an incomplete last one is left out, unless it is the only one.
        seed: of the order.
        loader: workers and prefetch.
    """

    name: str
    task: Task
    count: int
    batch: int
    seed: int
    loader: LoaderConfig

    def batches(self, device: torch.device) -> Iterator[Batch]:
        """Batches of equally many images, on the device.

        Raises:
            UserError: there are too few images, or they cannot be read.
        """
        dataset = self.task.dataset("val")
        drawn = generator(self.seed, ORDER, "cka", self.name).permutation(len(dataset))[: self.count]
        if len(drawn) < LEAST_IMAGES:
            raise UserError(
                f"task {self.name!r} has {len(drawn)} val images for CKA: it takes {LEAST_IMAGES} at least."
            )
        size = min(self.batch, len(drawn))
        parts = [tuple(map(int, drawn[start : start + size])) for start in range(0, len(drawn) - size + 1, size)]
        requests = [Request(step, 0, self.name, (0,) * size, part) for step, part in enumerate(parts)]
        unreadable = UnreadableSamples(self.loader)
        for loaded in load({self.name: TaskReader(dataset, self.task.collate)}, requests, self.seed, self.loader):
            unreadable.observe(loaded)
            yield self.task.preprocess(loaded.data, device, training=False)


def compare(sides: Sequence[Side], images: Images, device: torch.device) -> tuple[MinibatchCka, NDArray[np.float64]]:
    """CKA between all layers of one or two paths on the same images.

    Args:
        sides: one or two; their networks are on ``device``.
        images: what all of them see.
        device: to compute on.

    Returns:
        The estimator, which knows how many images it saw; and (layers of all sides, layers of all sides).
    """
    estimator = MinibatchCka()
    for batch in images.batches(device):
        estimator.update(torch.cat([side.grams(batch) for side in sides]))
    return estimator, estimator.compute().numpy()


def heat_maps(sides: Sequence[Side], values: NDArray[np.float64], images: str) -> Figure:
    """Appendix A: layer by layer, one panel for each path, and one across where there are two.

    Args:
        sides: one or two.
        values: from :func:`compare`.
        images: what they saw, for the title.
    """
    first = len(sides[0].layers)
    spans = [slice(0, first), slice(first, None)][: len(sides)]
    panels = [(0, 0)] if len(sides) == 1 else [(0, 0), (1, 1), (1, 0)]
    width = max(len(side.layers) for side in sides)
    figure = new_figure(len(panels) * max(1.5 + 0.36 * width, 4.0) + 1.1, max(2.1 + 0.32 * width, 4.0))
    grid = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, (down, across) in zip(grid, panels, strict=True):
        rows, columns = sides[down], sides[across]
        picture = draw_heat_map(axes, values[spans[down], spans[across]], rows.layers, columns.layers)
        axes.invert_yaxis()
        axes.set_xlabel(f"layer ({columns.title})", fontsize=9)
        axes.set_ylabel(f"layer ({rows.title})", fontsize=9)
    figure.colorbar(picture, ax=list(grid), label="CKA (1: images arranged alike)")
    figure.suptitle(f"minibatch CKA on {images}", fontsize=10)
    return figure


def as_numbers(sides: Sequence[Side], values: NDArray[np.float64], images: str) -> dict[str, Any]:
    """What the heat maps show, for a json file: rows and columns are the layers of all sides; nan becomes null."""
    return {
        "images": images,
        "sides": [
            {"run": side.run, "path": side.path, "checkpoint": side.trained.path.name, "layers": side.layers}
            for side in sides
        ],
        "cka": [[round(float(v), 6) if np.isfinite(v) else None for v in row] for row in values],
    }
