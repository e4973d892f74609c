"""Image classification: class folders or a public set, timm's augmentation, global average pooling, a linear layer."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gppf_ds.data.folders import read_rgb
from gppf_ds.data.planes import to_planes
from gppf_ds.data.sets.classification import SETS, open_split
from gppf_ds.data.sets.classification_images import open_folders
from gppf_ds.errors import UserError
from gppf_ds.tasks.task import (
    Batch,
    Dataset,
    FeatureInfo,
    Head,
    InputNormalisation,
    PlainPath,
    ProbeSamples,
    Split,
    Task,
    evenly,
)

TOP_K = 5
SPLITS: tuple[Split, ...] = ("train", "val")


class Classification(Task):
    """One label per image, from ``train/CLASS/*.jpg`` and ``val/CLASS/*.jpg`` (torchvision's ImageFolder layout).

    With ``source``, the data are that public set in its own layout, with its official splits, and the headline metric
    is the one that papers report of it: ImageNet and the ten sets of :mod:`gppf_ds.data.sets.classification`.

    The defaults are random crop and flip alone, as GPPF appendix D.2 trains its ten small sets; its ImageNet recipe
    (section 4.1) adds mixup 0.8, cutmix 1.0, random_erasing 0.25, label_smoothing 0.1 and a rand_augment policy.

    Args:
        data: folder with ``train/`` and ``val/``, or the root of the public set.
        batch_size: images per device and step; even where mixup or cutmix is on.
        weight: sampling weight of the task.
        loss_weight: factor on the loss.
        image_size: side of the square input in pixels.
        classes: outputs of the head; as many as the data have where not given.
        mixup: alpha of the Beta distribution of mixup's share, 0 for none.
        cutmix: the same for cutmix; with both on, each batch takes one of them at random.
        label_smoothing: probability spread evenly over all classes, in training.
        rand_augment: a timm policy such as ``rand-m9-mstd0.5-inc1``.
        random_erasing: probability that a rectangle of the image is replaced by noise.
        flip: probability of a horizontal flip.
        crop_scale: range of the share of the image's area that a training crop covers.
        val_crop: side of the centre crop over the short side of the resized image in evaluation.
        source: name of the public set, for example ``imagenet1k`` or ``cls_pets``.

    Raises:
        UserError: an argument is out of its range.
    """

    multi_scale = False

    def __init__(
        self,
        data: str,
        batch_size: int,
        weight: float = 1.0,
        loss_weight: float = 1.0,
        image_size: int = 224,
        classes: int | None = None,
        mixup: float = 0.0,
        cutmix: float = 0.0,
        label_smoothing: float = 0.0,
        rand_augment: str | None = None,
        random_erasing: float = 0.0,
        flip: float = 0.5,
        crop_scale: tuple[float, float] = (0.08, 1.0),
        val_crop: float = 0.875,
        source: str | None = None,
    ) -> None:
        super().__init__(batch_size, weight, loss_weight, source)
        if source is not None and source not in SETS:
            raise UserError(f"source '{source}' is no set of images with one label: choose from {', '.join(SETS)}.")
        if (mixup > 0 or cutmix > 0) and batch_size % 2:
            raise UserError(f"mixup and cutmix mix pairs of images: make batch_size even, not {batch_size}.")
        if image_size < 32:
            raise UserError(f"image_size must be at least 32 pixels, not {image_size}.")
        for name, share in (("label_smoothing", label_smoothing), ("random_erasing", random_erasing), ("flip", flip)):
            if not 0 <= share <= 1:
                raise UserError(f"{name} must lie in [0, 1], not {share}.")
        if not 0 < crop_scale[0] <= crop_scale[1] <= 1:
            raise UserError(f"crop_scale must be an ascending range of area shares in (0, 1], not {crop_scale}.")
        if not 0 < val_crop <= 1:
            raise UserError(f"val_crop must lie in (0, 1], not {val_crop}.")
        self.headline = SETS[source].headline if source else "top1"
        self.data = Path(data)
        self.image_size = image_size
        self.mixup = mixup
        self.cutmix = cutmix
        self.label_smoothing = label_smoothing
        self.rand_augment = rand_augment
        self.random_erasing = random_erasing
        self.flip = flip
        self.crop_scale = crop_scale
        self.val_crop = val_crop
        self._classes = classes

    @cached_property
    def classes(self) -> int:
        """Outputs of the head."""
        return self._classes or len(self._images("train").classes)

    @cached_property
    def class_names(self) -> list[str]:
        """The classes in the order of the labels; numbers where the data, which name them, are not here."""
        try:
            names = self._images("train").classes
        except UserError:
            names = []
        return names + [str(index) for index in range(len(names), self.classes)]

    def check(self) -> None:
        """Raises :class:`UserError` where the data, their classes or ``rand_augment`` cannot work."""
        images = {split: self._images(split) for split in SPLITS}
        for split, found in images.items():
            if not len(found):
                raise UserError(f"{self.data}: {split} has no image: put CLASS/IMAGE.jpg files into it.")
        names = {split: found.classes for split, found in images.items()}
        if difference := sorted(set(names["train"]) ^ set(names["val"])):
            only = "train" if difference[0] in names["train"] else "val"
            raise UserError(
                f"{self.data}: train and val must have the same classes, but {len(difference)} are in one of "
                f"them only, the first is '{difference[0]}' (in {only}): add or remove these."
            )
        if self.classes < len(names["train"]):
            raise UserError(
                f"classes is {self.classes}, but {self.data} has {len(names['train'])}: raise classes or leave it out."
            )
        try:
            self._transform("train")
        except (AssertionError, KeyError, ValueError) as error:
            raise UserError(f"rand_augment '{self.rand_augment}' is not a timm policy: {error}") from error

    def use_data(self, root: Path) -> None:
        """See :meth:`Task.use_data`."""
        self.data = root
        for known in ("classes", "class_names"):
            self.__dict__.pop(known, None)

    def shrink(self) -> None:
        """Inputs of 64 pixels, at most 4 images at a time."""
        self.image_size = 64
        self.batch_size = min(self.batch_size, 4)

    def dataset(self, split: Split) -> Dataset:
        """Samples are (uint8 image (3, image_size, image_size), label)."""
        return self._images(split, self._transform(split))

    def _images(self, split: Split, transform: Any = None) -> Any:
        """The images and their labels; its ``classes`` are the names of the labels."""
        if self.source is not None:
            return open_split(self.source, self.data, split, transform)
        return open_folders(self.data, split, transform)

    def image_files(self, split: Split, count: int) -> list[Path]:
        """See :meth:`Task.image_files`; none of a CIFAR, whose images lie in one file."""
        entries = getattr(self._images(split), "entries", [])
        return [entries[index][0] for index in evenly(len(entries), count)]

    def sample(self, image: Path) -> tuple[Tensor, int]:
        """The image as in ``val``; -1 stands for the label."""
        return self._transform("val")(read_rgb(image)), -1

    def _transform(self, split: Split) -> Any:
        from timm.data import create_transform

        from gppf_ds.tasks.posterize import mend

        if split == "val":
            return create_transform(self.image_size, crop_pct=self.val_crop, interpolation="bicubic", normalize=False)
        return mend(
            create_transform(
                self.image_size,
                is_training=True,
                scale=self.crop_scale,
                hflip=self.flip,
                color_jitter=None,
                auto_augment=self.rand_augment,
                interpolation="bicubic",
                normalize=False,
            )
        )

    def collate(self, samples: list[tuple[Tensor, int]]) -> dict[str, Tensor]:
        """Images stay bytes until they are on the device: a quarter of the traffic."""
        images, labels = zip(*samples, strict=True)
        stacked = torch.empty(len(images), *images[0].shape, dtype=torch.uint8)
        for image, place in zip(images, stacked, strict=True):
            to_planes(image.permute(1, 2, 0).numpy(), place.numpy())
        return {"images": stacked, "labels": torch.tensor(labels)}

    def preprocess(self, batch: dict[str, Tensor], device: torch.device, training: bool) -> Batch:
        """Targets are labels (B,), or class probabilities (B, classes) after mixup or cutmix."""
        from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, Mixup
        from timm.data.random_erasing import RandomErasing
        from torchvision.transforms.v2.functional import normalize

        images = batch["images"].to(device, non_blocking=True).float().div(255)
        images = normalize(images, list(IMAGENET_DEFAULT_MEAN), list(IMAGENET_DEFAULT_STD))
        labels = batch["labels"].to(device, non_blocking=True)
        if training and self.random_erasing > 0:
            images = RandomErasing(self.random_erasing, mode="pixel", device=device)(images)
        if training and (self.mixup > 0 or self.cutmix > 0):
            # The loss smooths the labels, mixed or not.
            mix = Mixup(self.mixup, self.cutmix, label_smoothing=0.0, num_classes=self.classes)
            images, labels = mix(images, labels)
        return Batch(images, labels)

    def input_normalisation(self) -> InputNormalisation:
        """ImageNet's mean and standard deviation."""
        from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

        return InputNormalisation("RGB", (0, 1), IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)

    def build_head(self, features: FeatureInfo) -> Head:
        """A linear layer on the coarsest map."""
        return ClassificationHead(features.channels[-1], self.classes, self.label_smoothing)

    def metric(self) -> Accuracy:
        """Top-1, top-5 and mean per-class accuracy."""
        return Accuracy(self.classes)

    @torch.no_grad()
    def export(self, head: Head, path: PlainPath, folder: Path) -> list[Path]:
        """A full timm classifier (see :func:`gppf_ds.tasks.timm_export.export`)."""
        from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

        from gppf_ds.tasks import timm_export

        assert isinstance(head, ClassificationHead)
        side = self.image_size
        described = {
            "classes": self.class_names,
            "input_size": [3, side, side],
            "mean": IMAGENET_DEFAULT_MEAN,
            "std": IMAGENET_DEFAULT_STD,
            "crop_pct": self.val_crop,
            "interpolation": "bicubic",
        }
        images = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0))
        return timm_export.export(path, head.linear, images, head(path.maps(images)), described, folder)

    def describe(self, head: Head, features: list[Tensor], targets: Tensor) -> list[dict[str, Any]]:
        """``classes``: the min(5, classes) best, best first, each with ``name`` and ``score`` (softmax)."""
        described = []
        for scores, ranked in zip(head(features).softmax(1).cpu(), head.predict(features, targets), strict=True):
            best = [{"name": self.class_names[k], "score": float(scores[k])} for k in ranked.tolist()]
            described.append({"summary": f"{best[0]['name']} ({best[0]['score']:.2f})", "classes": best})
        return described

    def probe_dataset(self, split: Split) -> Dataset:
        """The images of a split as ``val`` prepares them."""
        return self._images(split, self._transform("val"))

    def probe(self, features: list[Tensor], targets: Tensor) -> ProbeSamples:
        """What the head's linear layer reads: the last map, averaged; and the label."""
        return ProbeSamples([features[-1].mean(dim=(2, 3))], targets.cpu(), torch.arange(len(targets)))


class ClassificationHead(Head):
    """Global average pooling and a linear layer; cross-entropy (GPPF section 4.1)."""

    prediction_layers = ("linear.*",)

    def __init__(self, channels: int, classes: int, label_smoothing: float) -> None:
        super().__init__()
        self.linear = nn.Linear(channels, classes)
        self.label_smoothing = label_smoothing

    def forward(self, features: list[Tensor]) -> Tensor:
        """Logits (B, classes)."""
        return self.linear(features[-1].mean(dim=(2, 3)))

    def loss(self, features: list[Tensor], targets: Tensor) -> dict[str, Tensor]:
        """Cross-entropy with labels (B,) or class probabilities (B, classes)."""
        logits = self(features).float()
        return {"cross_entropy": F.cross_entropy(logits, targets, label_smoothing=self.label_smoothing)}

    def predict(self, features: list[Tensor], targets: Tensor) -> list[Tensor]:
        """Per image the min(5, classes) best classes, best first."""
        logits = self(features)
        return list(logits.topk(min(TOP_K, logits.shape[1])).indices.cpu())


class Accuracy:
    """``top1`` and ``top5`` over all images and ``mean_class``, the mean over the classes of their top-1 accuracy.

    Mean per-class accuracy is what GPPF table 7 gives for Aircraft, Pets, Caltech-101 and Flowers. All are in [0, 1];
    classes without images do not count. With fewer than 5 classes, ``top5`` is the accuracy of all of them.
    """

    def __init__(self, classes: int) -> None:
        # Per class: images whose first, and one of whose first five predictions, is right; images.
        self._counts = torch.zeros(3, classes, dtype=torch.int64)

    def update(self, predictions: Sequence[Tensor], targets: Tensor) -> None:
        """Adds the ranked classes (k,) of every image and the labels (B,)."""
        labels = targets.cpu()
        right = torch.stack(list(predictions)) == labels[:, None]
        hits = torch.stack([right[:, 0], right.any(dim=1), torch.ones_like(labels, dtype=torch.bool)])
        self._counts.index_add_(1, labels, hits.long())

    def state(self) -> Tensor:
        """The counts (3, classes)."""
        return self._counts

    def merge(self, states: Sequence[Tensor]) -> None:
        """Adds up the counts of all ranks."""
        self._counts = torch.stack(list(states)).sum(dim=0)

    def compute(self) -> dict[str, float]:
        """The accuracies; NaN where no image was seen."""
        first, top, images = self._counts.double()
        return {
            "top1": float(first.sum() / images.sum()),
            "top5": float(top.sum() / images.sum()),
            "mean_class": float((first / images)[images > 0].mean()),
        }
