"""Semantic segmentation: any mmseg encoder-decoder from an ordinary config."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gppf_ds.data.folders import IMAGE_SUFFIXES, pair_by_stem, read_label_map
from gppf_ds.errors import SampleError, UserError
from gppf_ds.tasks.label_maps import IGNORE, LabelCheck, check_label_map, reduce_zero_label
from gppf_ds.tasks.openmm import existing, leaf_dataset, leaf_datasets, only_leaf_dataset, scope, set_class_count
from gppf_ds.tasks.openmm_task import OpenMMHead, OpenMMTask
from gppf_ds.tasks.probe import of_label_maps, openmm_dataset
from gppf_ds.tasks.task import Batch, Dataset, FeatureInfo, Head, PlainPath, ProbeSamples, Split
from gppf_ds.tasks.windows import Windows, windows_of

_SAMPLED_MAPS = 20
_DIVISOR = 32


class SegmentationHead(OpenMMHead):
    """Decode head, auxiliary heads and neck of an mmseg segmentor.

    Where the configuration evaluates in sliding windows, the features given to :meth:`predict` are those of the
    windows of all images, one image after another, as :meth:`Segmentation.preprocess` cuts them.
    """

    prediction_layers = ("*conv_seg.*",)

    @torch.no_grad()
    def predict(self, features: list[Tensor], targets: Any) -> list[NDArray[np.integer[Any]]]:
        """The class index of every pixel of the original image, (H, W), per image."""
        kind = np.uint8 if self.model.num_classes <= IGNORE else np.int32
        maps = []
        windows = windows_of(self.model.test_cfg)
        maps_of_images = self.select(features)
        samples = (
            self._slide(windows, maps_of_images, targets) if windows else self.model.predict(maps_of_images, targets)
        )
        for sample in samples:
            maps.append(sample.pred_sem_seg.data[0].cpu().numpy().astype(kind))
            del sample.pred_sem_seg, sample.seg_logits  # full-size logits would live as long as the targets
        return maps

    def _slide(self, windows: Windows, maps: list[Tensor], targets: Any) -> Iterator[Any]:
        """The data samples with what mmseg's ``slide_inference`` finds, image by image to save memory."""
        first = 0
        for sample in targets:
            image = sample.metainfo["pad_shape"][:2]
            last = first + len(windows.places(image))
            metas = [{"img_shape": torch.Size(windows.size)}] * (last - first)
            logits = self.model.encode_decode([part[first:last] for part in maps], metas)
            yield from self.model.postprocess_result(windows.join(logits, image)[None], [sample])
            first = last


class IoUMetric:
    """mIoU, mAcc and aAcc, from 0 to 1, over all pixels of all images, without those labelled 255.

    As in mmseg a class counts for the mean as soon as it occurs in a label map (mAcc), or there or in a prediction
    (mIoU). An image must be given only once over all ranks.

    Args:
        classes: number of classes.
    """

    def __init__(self, classes: int) -> None:
        from torchmetrics.classification import MulticlassConfusionMatrix

        self._confusion = MulticlassConfusionMatrix(classes, ignore_index=IGNORE)

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
    """A class per pixel: a public data set in its official layout, or folders of images and 8-bit label maps.

    A pixel of a label map is a class index, 255 = ignore. A configuration with ``reduce_zero_label`` (ADE20K) counts
    classes from 1, and 0 = ignore too. In evaluation an image is predicted whole or in sliding windows, as the
    configuration says.

    Args:
        config: path of an mmseg configuration or the name of a shipped one (see :func:`load_config`). Its backbone is
            replaced, its pipelines and data preprocessor are used.
        batch_size: images per device and step.
        weight, loss_weight, source: see :class:`Task`.
        data_root: folder of the data set. Alone it takes the place of ``data_root`` in the configuration, whose data
            sets keep their layout; with the next four it replaces them. Without it the configuration's holds.
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
        source: str | None = None,
    ) -> None:
        super().__init__(config, batch_size, weight, loss_weight, overrides, source)
        places = {
            "train_images": train_images,
            "train_labels": train_labels,
            "val_images": val_images,
            "val_labels": val_labels,
        }
        self.places = {key: place for key, place in places.items() if place is not None}
        missing = [key for key in places if key not in self.places]
        if data_root is not None and self.places and missing:
            raise UserError(f"data_root is given without {', '.join(missing)}: name them relative to data_root.")
        if data_root is None and self.places:
            raise UserError(f"{', '.join(self.places)} need data_root: set it.")
        self.data_root = data_root
        self.classes = classes

    @cached_property
    def class_names(self) -> list[str]:
        """The classes in the order of the labels; numbers where nothing names them."""
        if isinstance(self.classes, str):
            return _read_names(Path(self.data_root or "") / self.classes)
        return self.classes or self._published_names() or _numbers(self._head_classes)

    def _published_names(self) -> list[str]:
        """The class names of mmseg's data set; none for other data or another number of classes."""
        if self.places:
            return []
        with scope(self.library):
            from mmengine.registry import DATASETS

            with DATASETS.switch_scope_and_registry(None) as registry:
                kind = registry.get(leaf_dataset(self.cfg.val_dataloader.dataset).type)
        names = list(getattr(kind, "METAINFO", {}).get("classes", ()))
        return [name.strip() for name in names] if len(names) == self._head_classes else []

    def check(self) -> None:
        """Reads the configuration, lists the folders and opens some label maps of folders of one's own.

        Raises:
            UserError: impossible windows, a missing folder or list, images without label maps, or a class the head
                does not have.
        """
        windows_of(self.cfg.model.get("test_cfg"))
        for split in ("train", "val"):
            leaves = list(leaf_datasets(self.cfg[f"{split}_dataloader"].dataset))
            for leaf in leaves:
                folders = [*leaf.get("data_prefix", {}).values(), leaf.get("ann_file", "")]
                for place in filter(None, folders):
                    existing(Path(leaf.get("data_root") or "") / place, f"the {split} data of {self.config}")
            if self.places:
                self._check_label_maps(split, leaves[0].reduce_zero_label)

    def _check_label_maps(self, split: str, reduced: bool) -> None:
        images, labels = self._folders(split)
        pairs = pair_by_stem(images, labels, _suffixes(images, labels)[1])
        for _, path in pairs[:: max(1, len(pairs) // _SAMPLED_MAPS)]:
            try:
                found = read_label_map(path)
            except SampleError as error:
                raise UserError(f"{error} Repair or replace the file.") from error
            check_label_map(reduce_zero_label(found) if reduced else found, self._head_classes, path, reduced)

    def _folders(self, split: str) -> tuple[Path, Path]:
        root = Path(self.data_root or "")
        return root / self.places[f"{split}_images"], root / self.places[f"{split}_labels"]

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
            dataset = cfg[f"{split}_dataloader"].dataset
            if self.places:
                names = self.class_names if self.classes else _numbers(heads.num_classes)
                _read_folders(dataset, self._folders(split), names)
            for leaf in leaf_datasets(dataset):
                leaf.pipeline = _with_label_check(leaf.pipeline, heads.num_classes, last=split == "val")

    def preprocess(self, batch: Any, device: torch.device, training: bool) -> Batch:
        """The configuration's data preprocessor on the device; val images of different sizes are padded to one size.

        In sliding windows the images of the batch are the windows of all val images, one image after another; only an
        image smaller than a window is padded. The label maps of val keep the size of the original images.
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
        windows = windows_of(self.cfg.model.get("test_cfg"))
        if windows:
            stacked = [stack_batch([single.images[0]], size=windows.size) for single in done]
            images = torch.cat([windows.cut(image) for [image], _ in stacked])
            padding, sizes = [padded for _, [padded] in stacked], None
        else:
            images, padding = stack_batch([single.images[0] for single in done], size_divisor=_DIVISOR)
            sizes = torch.tensor([single.images.shape[-2:] for single in done], device=device)
        for sample, padded in zip(samples, padding, strict=True):
            sample.set_metainfo(padded)
        return Batch(images, samples, sizes)

    def build_head(self, features: FeatureInfo) -> SegmentationHead:
        """The segmentor without its backbone; raises :class:`UserError` if it cannot take these maps."""
        return SegmentationHead(self.library, self.cfg.model, features, self.min_stride)

    def metric(self) -> IoUMetric:
        """mIoU over the val images."""
        return IoUMetric(self._head_classes)

    def export(self, head: Head, path: PlainPath, folder: Path) -> list[Path]:
        """A full mmseg segmentor (see :func:`gppf_ds.tasks.openmm_export.export`), which pads images as we do."""
        from gppf_ds.tasks import openmm_export

        cfg = self.cfg.to_dict()
        preprocessor = cfg["model"]["data_preprocessor"]
        windows = windows_of(cfg["model"].get("test_cfg"))
        padding = {"size": windows.size} if windows else {"size_divisor": _DIVISOR}
        preprocessor["test_cfg"] = preprocessor.get("test_cfg") or padding
        own = {"type": "IoUMetric", "iou_metrics": ["mIoU"]}
        cfg.setdefault("val_evaluator", own)
        if self.places:
            cfg["val_evaluator"] = own
            cfg.pop("test_dataloader", None)
        return openmm_export.export(self.library, cfg, head, path, folder)

    def describe(self, head: Head, features: list[Tensor], targets: Any) -> list[dict[str, Any]]:
        """``labels``: the class index of every pixel of the original image, with the names of the ``classes``."""
        described = []
        for labels in head.predict(features, targets):
            shares = np.bincount(labels.ravel()) / labels.size
            largest = [int(k) for k in shares.argsort()[::-1][:3] if shares[k] > 0]
            summary = ", ".join(f"{self.class_names[k]} {shares[k]:.0%}" for k in largest)
            if labels.dtype != np.uint8:
                labels = labels.astype(np.uint16)
            described.append({"summary": summary, "labels": labels, "classes": self.class_names})
        return described

    def probe_dataset(self, split: Split) -> Dataset:
        """The images of a split in the val pipeline; see :meth:`Task.probe_dataset`."""
        with scope(self.library):
            data, val = (list(leaf_datasets(self._data_config(one))) for one in (split, "val"))
        return openmm_dataset(self, data, val[0]["pipeline"])

    def probe(self, features: list[Tensor], targets: Any) -> ProbeSamples:
        """The class at some labelled pixels; see :func:`gppf_ds.tasks.probe.of_label_maps`."""
        return of_label_maps(features, targets, windows_of(self.cfg.model.get("test_cfg")))


def _read_folders(dataset: Any, folders: tuple[Path, Path], classes: list[str]) -> None:
    """Puts a folder of images and one of label maps in the place of what the (first) data set reads."""
    leaf = only_leaf_dataset(dataset)
    image_suffix, label_suffix = _suffixes(*folders)
    pipeline = leaf.pipeline
    reduced = _reading_step(pipeline).get("reduce_zero_label") or leaf.get("reduce_zero_label", False)
    leaf.clear()
    leaf.update(
        type="BaseSegDataset",
        data_prefix={"img_path": str(folders[0]), "seg_map_path": str(folders[1])},
        img_suffix=image_suffix,
        seg_map_suffix=label_suffix,
        metainfo={"classes": classes},
        reduce_zero_label=reduced,
        pipeline=pipeline,
    )


def _reading_step(pipeline: list[Any]) -> Any:
    reading = [step for step in pipeline if str(step["type"]).endswith("LoadAnnotations")]
    if len(reading) != 1:
        raise UserError(f"The mmseg pipeline has {len(reading)} LoadAnnotations: it has to have exactly one.")
    return reading[0]


def _with_label_check(pipeline: list[Any], classes: int, last: bool) -> list[Any]:
    """The pipeline with a check of the labels behind their reading.

    Args:
        last: read the label map only before packing, so that no transform changes its size.
    """
    reading = _reading_step(pipeline)
    checked = [reading, {"type": LabelCheck, "classes": classes}]
    others = [step for step in pipeline if step is not reading]
    place = len(others) - 1 if last else pipeline.index(reading)
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
