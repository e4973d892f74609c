"""Semantic segmentation: any mmseg encoder-decoder from an ordinary config."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gppf_ds.data.folders import IMAGE_SUFFIXES, pair_by_stem, read_label_map
from gppf_ds.errors import SampleError, UserError
from gppf_ds.tasks.openmm import OpenMMHead, OpenMMTask, existing, leaf_dataset, set_class_count
from gppf_ds.tasks.task import Batch, FeatureInfo

_IGNORE = 255
_SAMPLED_MAPS = 20
_DIVISOR = 32


class SegmentationHead(OpenMMHead):
    """Decode head, auxiliary heads and neck of an mmseg segmentor."""

    @torch.no_grad()
    def predict(self, features: list[Tensor], targets: Any) -> list[NDArray[np.integer[Any]]]:
        """The class index of every pixel of the original image, (H, W), per image."""
        kind = np.uint8 if self.model.num_classes <= _IGNORE else np.int32
        maps = []
        for sample in self.model.predict(self.select(features), targets):
            maps.append(sample.pred_sem_seg.data[0].cpu().numpy().astype(kind))
            del sample.pred_sem_seg, sample.seg_logits  # full-size logits would live as long as the targets
        return maps


class LabelCheck:
    """A transform behind the one that reads the label map: refuses a class that the head does not have.

    Args:
        classes: number of classes of the head.

    Raises:
        UserError: a pixel is neither below ``classes`` nor 255.
    """

    def __init__(self, classes: int) -> None:
        self.classes = classes

    def __call__(self, sample: dict[str, Any]) -> dict[str, Any]:
        check_label_map(sample["gt_seg_map"], self.classes, sample["seg_map_path"])
        return sample


def check_label_map(labels: NDArray[Any], classes: int, path: str | Path) -> None:
    """Raises :class:`UserError` if a label of the map is neither below ``classes`` nor 255."""
    highest = int(np.where(labels == _IGNORE, 0, labels).max(initial=0))
    if highest >= classes:
        raise UserError(
            f"{path} has a pixel of class {highest} and the head has {classes} classes (0 to {classes - 1}, "
            f"{_IGNORE} = ignore): correct the label map or 'classes'."
        )


class IoUMetric:
    """mIoU, mAcc and aAcc, from 0 to 1, over all pixels of all images, without those labelled 255.

    As in mmseg a class counts for the mean as soon as it occurs in a label map (mAcc), or there or in a prediction
    (mIoU). An image must be given only once over all ranks.

    Args:
        classes: number of classes.
    """

    def __init__(self, classes: int) -> None:
        from torchmetrics.classification import MulticlassConfusionMatrix

        self._confusion = MulticlassConfusionMatrix(classes, ignore_index=_IGNORE)

    def update(self, predictions: Sequence[NDArray[np.integer[Any]]], targets: Any) -> None:
        """Adds label maps (H, W); ``targets`` are data samples with ``gt_sem_seg`` of the same size."""
        for prediction, sample in zip(predictions, targets, strict=True):
            truth = sample.gt_sem_seg.data[0].cpu().long()
            self._confusion.update(torch.from_numpy(prediction.astype(np.int64)), truth)

    def state(self) -> Tensor:
        """Pixels by (label, prediction), (classes, classes)."""
        return self._confusion.confmat

    def merge(self, states: Sequence[Tensor]) -> None:
        """Replaces the counts by the sum of those of all ranks."""
        self._confusion.confmat = torch.stack(list(states)).sum(0)

    def compute(self) -> dict[str, float]:
        """``mIoU``, ``mAcc`` and ``aAcc``; nan without a labelled pixel."""
        counts = self._confusion.confmat.double()
        hits, labelled, predicted = counts.diag(), counts.sum(1), counts.sum(0)
        return {
            "mIoU": float((hits / (labelled + predicted - hits)).nanmean()),
            "mAcc": float((hits / labelled).nanmean()),
            "aAcc": float(hits.sum() / labelled.sum()),
        }


class Segmentation(OpenMMTask):
    """A class per pixel, on folders of images and 8-bit label maps (pixel = class index, 255 = ignore).

    The whole image is predicted at once; a configuration that evaluates in sliding windows is refused by
    :meth:`check`, since its scores would not be those of its authors.

    Args:
        config: path of an mmseg configuration or the name of a shipped one (see :func:`load_config`). Its backbone is
            replaced, its pipelines and data preprocessor are used.
        batch_size: images per device and step.
        weight, loss_weight: see :class:`Task`.
        data_root: folder of the data set; with it the next four are needed and replace the data in ``config``.
            Without it the configuration's own data are used.
        train_images, train_labels, val_images, val_labels: folders, relative to ``data_root``. An image STEM.jpg
            belongs to the label map STEM.png or STEM_something.png.
        classes: class names in the order of the class indices, or a json file with that list (or an object that has it
            under "classes"), relative to ``data_root``; sets the number of classes of every head. Without it that of
            the configuration holds.
        overrides: values to merge into the configuration, nested or with dotted keys.
    """

    library = "mmseg"
    readers = {"LoadImageFromFile": "img_path", "LoadAnnotations": "seg_map_path"}  # noqa: RUF012
    headline = "mIoU"

    def __init__(
        self,
        config: str,
        batch_size: int,
        weight: float = 1.0,
        loss_weight: float = 1.0,
        data_root: str | None = None,
        train_images: str | None = None,
        train_labels: str | None = None,
        val_images: str | None = None,
        val_labels: str | None = None,
        classes: list[str] | str | None = None,
        overrides: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(config, batch_size, weight, loss_weight, overrides)
        places = {
            "train_images": train_images,
            "train_labels": train_labels,
            "val_images": val_images,
            "val_labels": val_labels,
        }
        missing = [key for key, place in places.items() if place is None]
        if data_root is not None and missing:
            raise UserError(f"data_root is given without {', '.join(missing)}: name them relative to data_root.")
        if data_root is None and len(missing) < len(places):
            raise UserError(f"{', '.join(places.keys() - set(missing))} need data_root: set it.")
        self.root = Path(data_root or "")
        self.places = {key: self.root / place for key, place in places.items() if place is not None}
        self.classes = classes

    @cached_property
    def class_names(self) -> list[str]:
        """The classes in the order of the labels; numbers where nothing names them."""
        if isinstance(self.classes, str):
            return _read_names(self.root / self.classes)
        return self.classes or _numbers(self._head_classes)

    def check(self) -> None:
        """Reads the configuration, lists the folders and opens some label maps.

        Raises:
            UserError: sliding windows, a missing folder, images without label maps, or a class the head does not have.
        """
        if self.cfg.model.get("test_cfg", {}).get("mode", "whole") != "whole":
            raise UserError(f"{self.config} evaluates in sliding windows: set overrides model.test_cfg.mode to whole.")
        if not self.places:
            self._check_own_folders()
            return
        for split in ("train", "val"):
            images, labels = self.places[f"{split}_images"], self.places[f"{split}_labels"]
            pairs = pair_by_stem(images, labels, _suffixes(images, labels)[1])
            for _, path in pairs[:: max(1, len(pairs) // _SAMPLED_MAPS)]:
                try:
                    labels_of_image = read_label_map(path)
                except SampleError as error:
                    raise UserError(f"{error} Repair or replace the file.") from error
                check_label_map(labels_of_image, self._head_classes, path)

    def _check_own_folders(self) -> None:
        for split in ("train", "val"):
            leaf = leaf_dataset(self.cfg[f"{split}_dataloader"].dataset)
            for folder in leaf.get("data_prefix", {}).values():
                existing(Path(leaf.get("data_root") or "") / folder, f"{split}_dataloader of {self.config}")

    @property
    def _head_classes(self) -> int:
        return int(self.cfg.model.decode_head.num_classes)

    def _adapt(self, cfg: Any) -> None:
        heads = cfg.model.decode_head
        if isinstance(heads, list):
            raise UserError(f"{self.config} has a cascade of decode heads: choose one with a single decode_head.")
        if self.classes is not None:
            set_class_count(cfg.model, len(self.class_names))
        for split in ("train", "val"):
            leaf = leaf_dataset(cfg[f"{split}_dataloader"].dataset)
            if self.places:
                images, labels = self.places[f"{split}_images"], self.places[f"{split}_labels"]
                image_suffix, label_suffix = _suffixes(images, labels)
                pipeline = leaf.pipeline
                leaf.clear()
                leaf.update(
                    type="BaseSegDataset",
                    data_prefix={"img_path": str(images), "seg_map_path": str(labels)},
                    img_suffix=image_suffix,
                    seg_map_suffix=label_suffix,
                    metainfo={"classes": self.class_names if self.classes else _numbers(heads.num_classes)},
                    pipeline=pipeline,
                )
            leaf.pipeline = _with_label_check(leaf.pipeline, heads.num_classes, last=split == "val")

    def preprocess(self, batch: Any, device: torch.device, training: bool) -> Batch:
        """The configuration's data preprocessor on the device; val images of different sizes are padded to one size.

        The label maps of val keep the size of the original images.
        """
        if training:
            return super().preprocess(batch, device, training)
        from mmseg.utils import stack_batch

        singles = zip(batch["inputs"], batch["data_samples"], strict=True)
        done = [
            super(Segmentation, self).preprocess({"inputs": [image], "data_samples": [sample]}, device, False)
            for image, sample in singles
        ]
        samples = [single.targets[0] for single in done]
        images, padding = stack_batch([single.images[0] for single in done], size_divisor=_DIVISOR)
        for sample, padded in zip(samples, padding, strict=True):
            sample.set_metainfo(padded)
        return Batch(images, samples)

    def build_head(self, features: FeatureInfo) -> SegmentationHead:
        """The segmentor without its backbone; raises :class:`UserError` if it cannot take these maps."""
        return SegmentationHead(self.library, self.cfg.model, features, self.min_stride)

    def metric(self) -> IoUMetric:
        """mIoU over the val images."""
        return IoUMetric(self._head_classes)


def _with_label_check(pipeline: list[Any], classes: int, last: bool) -> list[Any]:
    """The pipeline with a check of the labels behind their reading.

    Args:
        last: read the label map only before packing, so that no transform changes its size.
    """
    reading = [step for step in pipeline if str(step["type"]).endswith("LoadAnnotations")]
    if len(reading) != 1:
        raise UserError(f"The mmseg pipeline has {len(reading)} LoadAnnotations: it has to have exactly one.")
    checked = [reading[0], {"type": LabelCheck, "classes": classes}]
    others = [step for step in pipeline if step is not reading[0]]
    place = len(others) - 1 if last else pipeline.index(reading[0])
    return others[:place] + checked + others[place:]


def _suffixes(images: Path, labels: Path) -> tuple[str, str]:
    """What follows the stem in the names of the images and of their label maps, guessed from the first image."""
    names = sorted(path.name for path in existing(images, "the image folder").iterdir())
    names = [name for name in names if Path(name).suffix.lower() in IMAGE_SUFFIXES]
    suffixes = {Path(name).suffix for name in names}
    if len(suffixes) != 1:
        found = ", ".join(sorted(suffixes)) or "no images"
        raise UserError(f"{images} has to hold images of one suffix and holds {found}: convert or correct the folder.")
    stem = Path(names[0]).stem
    targets = [path.name for path in existing(labels, "the label folder").iterdir() if path.name.startswith(stem)]
    if not targets:
        raise UserError(f"{labels} has no label map whose name starts with {stem}: correct the folder.")
    return suffixes.pop(), min(targets, key=len).removeprefix(stem)


def _numbers(count: int) -> list[str]:
    return [str(index) for index in range(count)]


def _read_names(path: Path) -> list[str]:
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}): classes has to be a json list of names.") from error
    names = content.get("classes") if isinstance(content, dict) else content
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(f"{path} has to hold a json list of class names, or one under 'classes'.")
    return names
