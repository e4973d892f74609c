"""The protocol of a task: data, head, loss and metric behind one interface that the trainer never looks behind."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from gppf_ds.errors import UserError

Split = Literal["train", "val"]


@dataclass(frozen=True)
class FeatureInfo:
    """The feature maps that a backbone hands to every head, finest first."""

    channels: tuple[int, ...]
    strides: tuple[int, ...]

    def select(self, min_stride: int) -> list[int]:
        """Indices of the maps with at least this stride (dense heads usually start at stride 4)."""
        return [i for i, stride in enumerate(self.strides) if stride >= min_stride]


@dataclass
class Batch:
    """One device's batch: the images are the backbone's, the targets only the task's own head and metric can read."""

    images: Tensor
    """(B, 3, H, W), normalised, on the device."""
    targets: Any


class Dataset(Protocol):
    """A map-style data set. An unreadable sample raises OSError or :class:`gppf_ds.errors.SampleError`.

    Randomness (augmentation) comes from the global generators of ``random``, ``numpy.random`` and ``torch``: the loader
    seeds them before each item, so an item is a function of (seed, task, epoch, index).
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Any: ...


class Metric(Protocol):
    """Accumulates predictions on one rank; the states of all ranks are merged on one of them before ``compute``."""

    def update(self, predictions: Sequence[Any], targets: Any) -> None:
        """Adds one batch: ``predictions`` as the head's ``predict`` returned them, ``targets`` of the same batch."""

    def state(self) -> Any:
        """What this rank has accumulated; picklable, on the CPU."""

    def merge(self, states: Sequence[Any]) -> None:
        """Replaces what was accumulated by the union of the states of all ranks."""

    def compute(self) -> dict[str, float]:
        """The metrics by name."""


class Head(nn.Module, ABC):
    """Everything of a task's network behind the backbone (neck, decoder, predictor, loss)."""

    @abstractmethod
    def loss(self, features: list[Tensor], targets: Any) -> dict[str, Tensor]:
        """The loss terms by name; the trainer minimises their sum. ``features`` follow :class:`FeatureInfo`."""

    @abstractmethod
    def predict(self, features: list[Tensor], targets: Any) -> list[Any]:
        """One prediction per image, on the CPU, in the form that the task's metric takes."""


class Task(ABC):
    """A named triple (data, head, loss) with its sampling weight, batch size and metric (GPPF section 3.2).

    A subclass is all that a new kind of task needs; it is named by ``class_path`` in the recipe. Constructors stay
    cheap (no data, no heavy imports): the command line builds every task only to check the recipe.

    Args:
        batch_size: images per device and step.
        weight: sampling weight; the schedule gives a device this task with probability weight / sum of weights.
        loss_weight: factor on the task's loss (1.0 for every task in the paper).
    """

    headline: str
    """The metric that stands for the task in tables."""
    higher_is_better: bool = True
    min_stride: int = 4
    """The finest feature map the head wants."""

    def __init__(self, batch_size: int, weight: float = 1.0, loss_weight: float = 1.0) -> None:
        if batch_size < 1:
            raise UserError(f"batch_size must be at least 1, not {batch_size}: set it to the images per device.")
        if not 0 < weight < math.inf:
            raise UserError(f"weight must be above 0, not {weight}: remove the task to leave it out of the schedule.")
        if not 0 < loss_weight < math.inf:
            raise UserError(f"loss_weight must be above 0, not {loss_weight}: 1.0 leaves the task's loss as it is.")
        self.batch_size = batch_size
        self.weight = weight
        self.loss_weight = loss_weight

    @abstractmethod
    def check(self) -> None:
        """Raises :class:`UserError` if the data or the configuration cannot work. Runs before any process group."""

    @abstractmethod
    def dataset(self, split: Split) -> Dataset:
        """The data set of a split, with augmentation for ``train``."""

    @abstractmethod
    def collate(self, samples: list[Any]) -> Any:
        """Joins samples into one picklable batch (in a worker process)."""

    @abstractmethod
    def preprocess(self, batch: Any, device: torch.device, training: bool) -> Batch:
        """Moves a collated batch to the device: normalise, pad, mix."""

    @abstractmethod
    def build_head(self, features: FeatureInfo) -> Head:
        """The head for a backbone with these feature maps."""

    @abstractmethod
    def metric(self) -> Metric:
        """A fresh metric."""
