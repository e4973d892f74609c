"""The protocol of a task: data, head, loss and metric behind one interface that the trainer never looks behind."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
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
    sizes: Tensor | None = None
    """(B, 2), heights and widths of the images before they were padded at the right and at the bottom, on the device;
    None where none was. Tokens of padding choose no experts (:mod:`gppf_ds.backbone.moe`)."""


@dataclass(frozen=True)
class InputNormalisation:
    """How pixels become the backbone's input: subtract ``mean``, divide by ``std``, channel by channel."""

    channels: Literal["RGB", "BGR"]
    value_range: tuple[float, float]
    """Of the pixels before."""
    mean: tuple[float, ...]
    std: tuple[float, ...]


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


@dataclass(frozen=True)
class ProbeSamples:
    """What a linear model is fitted to, or judged on: see :meth:`Task.probe`."""

    vectors: list[Tensor]
    """(M, C_i): one for each feature map that they were taken from."""
    labels: Tensor
    """(M,): class ids (int64), or real numbers (float32)."""
    images: Tensor
    """(M,): the image of the batch that each row comes from, from 0."""


class Head(nn.Module, ABC):
    """Everything of a task's network behind the backbone (neck, decoder, predictor, loss)."""

    prediction_layers: tuple[str, ...] = ()
    """Patterns (with * and ?) of the names of the final layers, which depend on what is predicted: a head that starts
    from another task's leaves these as they are initialised."""

    @abstractmethod
    def loss(self, features: list[Tensor], targets: Any) -> dict[str, Tensor]:
        """The loss terms by name; the trainer minimises their sum. ``features`` follow :class:`FeatureInfo`."""

    @abstractmethod
    def predict(self, features: list[Tensor], targets: Any) -> list[Any]:
        """One prediction per image, on the CPU, in the form that the task's metric takes."""


@dataclass(frozen=True)
class OwnBackbone:
    """This package's own class that computes a path's maps, for libraries that build by mmengine's registry."""

    config: Mapping[str, Any]
    """``type``, which is the full name of the class, and arguments. ``out_indices`` (of the maps to hand out) and
    ``pyramid`` (strides of a :class:`gppf_ds.tasks.pyramid.SimpleFeaturePyramid`) are for the task to add."""
    state: Mapping[str, Tensor]
    """Parameters and buffers under the names of that class; it keeps a pyramid as ``pyramid``."""


@dataclass(frozen=True)
class PlainPath:
    """A task's path through the backbone as a plain timm model, for a task that leaves together with its head."""

    timm_model: str
    timm_options: Mapping[str, Any]
    """Keyword arguments of ``timm.create_model``, ``num_classes`` 0 among them."""
    state: Mapping[str, Tensor]
    """Parameters and buffers under timm's names."""
    renamed: Callable[[str], Mapping[str, Tensor]]
    """The state under the names of a convention; raises :class:`UserError` where the convention has no such model."""
    maps: Callable[[Tensor], list[Tensor]]
    """Images (B, 3, H, W) -> the feature maps that the head was trained on, in evaluation mode."""
    fallback: OwnBackbone | None = None
    """For maps that no library's backbone gives; whoever loads such an export needs this package."""


def evenly(length: int, count: int) -> list[int]:
    """Indices of at most ``count`` of ``length`` things, spread evenly over them."""
    count = min(length, count)
    return [(2 * index + 1) * length // (2 * count) for index in range(count)]


class Task(ABC):
    """A named triple (data, head, loss) with its sampling weight, batch size and metric (GPPF section 3.2).

    A subclass is all that a new kind of task needs; it is named by ``class_path`` in the recipe. Constructors stay
    cheap (no data, no heavy imports): the command line builds every task only to check the recipe.

    Args:
        batch_size: images per device and step.
        weight: sampling weight; the schedule gives a device this task with probability weight / sum of weights.
        loss_weight: factor on the task's loss (1.0 for every task in the paper).
        source: name of the public data set that the data are, see :mod:`gppf_ds.data.catalogue`: ``gppf-ds check-data``
            then knows what to expect, and ``gppf-ds train --smoke`` what to imitate. None: data of your own.
    """

    headline: str
    """The metric that stands for the task in tables."""
    higher_is_better: bool = True
    min_stride: int = 4
    """The finest feature map the head wants."""
    multi_scale: bool = True
    """Whether the head wants maps of several strides: a backbone of one map (ViT) then gets a feature pyramid in front
    of the head, see :mod:`gppf_ds.tasks.pyramid`."""

    def __init__(
        self, batch_size: int, weight: float = 1.0, loss_weight: float = 1.0, source: str | None = None
    ) -> None:
        if batch_size < 1:
            raise UserError(f"batch_size must be at least 1, not {batch_size}: set it to the images per device.")
        if not 0 < weight < math.inf:
            raise UserError(f"weight must be above 0, not {weight}: remove the task to leave it out of the schedule.")
        if not 0 < loss_weight < math.inf:
            raise UserError(f"loss_weight must be above 0, not {loss_weight}: 1.0 leaves the task's loss as it is.")
        self.batch_size = batch_size
        self.weight = weight
        self.loss_weight = loss_weight
        self.source = source

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

    def data_folder(self) -> Path | None:
        """The root of the data in the layout of :attr:`source`, from ``data``, ``data_root`` or ``root``; or None."""
        named = next((vars(self)[key] for key in ("data", "data_root", "root") if vars(self).get(key)), None)
        return None if named is None else Path(named)

    def use_data(self, root: Path) -> None:
        """From now on the data are below ``root``, in the layout of :attr:`source`. Optional.

        ``gppf-ds train --smoke`` calls it before anything has read the data.

        Raises:
            UserError: this kind of task does not know how.
        """
        raise UserError(f"{type(self).__name__} has no smoke run: give it the methods use_data and shrink.")

    def shrink(self) -> None:
        """From now on images are 64 to 128 pixels and batches tiny, on the same code path. Optional, see `use_data`.

        Raises:
            UserError: this kind of task does not know how.
        """
        raise UserError(f"{type(self).__name__} has no smoke run: give it the methods use_data and shrink.")

    def input_normalisation(self) -> InputNormalisation | None:
        """What :meth:`preprocess` does to the values of pixels, for those who use an exported path. Optional.

        None: an export says nothing about it.
        """
        return None

    def image_files(self, split: Split, count: int) -> list[Path]:
        """Image files of a split, at most ``count``, spread evenly over it; optional, for pictures in reports.

        None where the images are no files of their own.
        """
        return []

    def sample(self, image: Path) -> Any:
        """One image file, read as the val data set reads its own, for :meth:`collate` and all that follows. Optional.

        In place of the ground truth stands what means that there is none; a head's ``predict`` does not read it.

        Raises:
            OSError, SampleError: the file cannot be read.
            UserError: this kind of task reads no single images.
        """
        raise UserError(f"{type(self).__name__} cannot predict: give it the methods sample and describe.")

    def describe(self, head: Head, features: list[Tensor], targets: Any) -> list[dict[str, Any]]:
        """For every image of a batch, what the head finds in it, to be written by ``gppf-ds predict``. Optional.

        Args:
            head: of this task, in evaluation mode.
            features: see :class:`FeatureInfo`.
            targets: of the batch, by :meth:`preprocess`.

        Returns:
            Values for a json file. "summary" is a few words to print. A map of pixels is an array (H, W), uint8 or
            uint16, and becomes a png file.
        """
        raise UserError(f"{type(self).__name__} cannot predict: give it the methods sample and describe.")

    def probe_dataset(self, split: Split) -> Dataset:
        """The data set of a split for :meth:`probe`: with its ground truth, and where possible without augmentation.

        Its samples go through :meth:`collate` and :meth:`preprocess` with ``training=False``.
        """
        return self.dataset(split)

    def probe(self, features: list[Tensor], targets: Any) -> ProbeSamples:
        """What frozen features of a batch know of its ground truth, for ``gppf-ds advise``. Optional.

        A few vectors per image and the label of each, such that a backbone from which a linear model reads the labels
        well suits the task. What is random in it draws from torch's global generator, which is seeded before: all
        backbones are asked for the same places.

        Args:
            features: the maps of at least :attr:`min_stride`, finest first.
            targets: of the batch, by :meth:`preprocess`.

        Raises:
            UserError: this kind of task cannot be probed.
        """
        raise UserError(f"{type(self).__name__} cannot be probed: give it the method probe.")

    def export(self, head: Head, path: PlainPath, folder: Path) -> list[Path]:
        """Writes path and head as a model that another library runs. Optional: not every head has such a form.

        Args:
            head: trained, on the CPU, in evaluation mode.
            path: the task's backbone.
            folder: of this task's export; exists.

        Returns:
            The files.

        Raises:
            UserError: no library has this model.
        """
        raise UserError(
            f"{type(self).__name__} leaves as backbone only (export without --head): no library that we export to has "
            "its head."
        )
