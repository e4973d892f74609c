"""Object detection and instance segmentation: any mmdet detector with a feature pyramid, from an ordinary config."""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gppf_ds.errors import UserError
from gppf_ds.tasks.coco_metric import CocoMetric, Detections
from gppf_ds.tasks.openmm import OpenMMHead, OpenMMTask, class_counts, existing, leaf_dataset, set_class_count
from gppf_ds.tasks.task import FeatureInfo


class DetectionHead(OpenMMHead):
    """Neck, proposals and heads of an mmdet detector."""

    @torch.no_grad()
    def predict(self, features: list[Tensor], targets: Any) -> list[Detections]:
        """The detections per image, in pixels of the original image (see :data:`Detections`)."""
        from mmdet.structures.mask import encode_mask_results

        results = []
        for sample in self.model.predict(self.select(features), targets, rescale=True):
            found = sample.pred_instances.cpu()
            del sample.pred_instances  # its full-size masks would live as long as the targets
            results.append(
                {
                    "image_id": int(sample.img_id),
                    "boxes": found.bboxes.float().numpy(),
                    "scores": found.scores.float().numpy(),
                    "labels": found.labels.numpy(),
                    "masks": encode_mask_results(found.masks.numpy()) if "masks" in found else None,
                }
            )
        return results


class Detection(OpenMMTask):
    """Boxes, and masks where the configuration's ``val_evaluator`` names ``segm``, on a COCO data set.

    Args:
        config: path of an mmdet configuration or the name of a shipped one (see :func:`load_config`). Its backbone is
            replaced, its pipelines and data preprocessor are used.
        batch_size: images per device and step.
        weight, loss_weight: see :class:`Task`.
        data_root: folder of a COCO data set; with it the next four are needed and replace the data in ``config``,
            and every head gets the number of classes of the json. Without it the configuration's own data are used.
        train, val: annotation json files, relative to ``data_root``.
        train_images, val_images: image folders, relative to ``data_root``.
        classes: class names in the order of the category ids, only to be checked against the json files.
        overrides: values to merge into the configuration, nested or with dotted keys.
    """

    library = "mmdet"
    readers = {"LoadImageFromFile": "img_path", "LoadAnnotations": "img_path"}  # noqa: RUF012

    def __init__(
        self,
        config: str,
        batch_size: int,
        weight: float = 1.0,
        loss_weight: float = 1.0,
        data_root: str | None = None,
        train: str | None = None,
        val: str | None = None,
        train_images: str | None = None,
        val_images: str | None = None,
        classes: list[str] | None = None,
        overrides: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(config, batch_size, weight, loss_weight, overrides)
        places = {"train": train, "val": val, "train_images": train_images, "val_images": val_images}
        missing = [key for key, place in places.items() if place is None]
        if data_root is not None and missing:
            raise UserError(f"data_root is given without {', '.join(missing)}: name them relative to data_root.")
        if data_root is None and len(missing) < len(places):
            raise UserError(f"{', '.join(places.keys() - set(missing))} need data_root: set it.")
        self.data_root = data_root
        self.places = {key: place for key, place in places.items() if place is not None}
        self.classes = classes

    @property
    def headline(self) -> str:  # type: ignore[override]
        """Mask AP where masks are evaluated, else box AP."""
        return f"{self.iou_types[-1]}_AP"

    @cached_property
    def iou_types(self) -> list[str]:
        """What the configuration evaluates: ``["bbox"]`` or ``["bbox", "segm"]``."""
        evaluators = self.cfg.get("val_evaluator") or {}
        named: set[str] = set()
        for evaluator in evaluators if isinstance(evaluators, list) else [evaluators]:
            metric = evaluator.get("metric", [])
            named |= {metric} if isinstance(metric, str) else set(metric)
        return ["bbox", "segm"] if "segm" in named else ["bbox"]

    @cached_property
    def class_names(self) -> list[str]:
        """The classes in the order of the labels."""
        leaf = leaf_dataset(self.cfg.val_dataloader.dataset)
        names = leaf.get("metainfo", {}).get("classes")
        if names is None:
            names = self.dataset("val").inner.metainfo["classes"]  # type: ignore[attr-defined]
        return [names] if isinstance(names, str) else list(names)

    def check(self) -> None:
        """Reads the configuration and the annotations.

        Raises:
            UserError: a file is missing, the json files are wrong, or ``classes`` or a configured ``num_classes``
                disagrees with them.
        """
        from gppf_ds.data.coco import check_coco

        json_files, folders = [], []
        for split in ("train", "val"):
            leaf = leaf_dataset(self.cfg[f"{split}_dataloader"].dataset)
            if not str(leaf.type).endswith("CocoDataset"):
                raise UserError(
                    f"{self.config} reads a {leaf.type} for {split}: only CocoDataset can be evaluated, so convert "
                    f"the annotations to COCO json and give data_root."
                )
            root = Path(leaf.get("data_root") or "")
            json_files.append(existing(root / leaf.ann_file, split if self.data_root else f"{split}_dataloader"))
            folders.append(root / leaf.data_prefix.img)
        names = check_coco(*json_files, *folders)
        self._check_classes(names, json_files[0])

    def _check_classes(self, names: list[str], source: Path) -> None:
        if self.classes is not None and self.classes != names:
            raise UserError(
                f"classes does not agree with {source}, which has {len(names)}: {', '.join(names[:10])}"
                f"{', ...' if len(names) > 10 else ''}. Leave classes out or correct it."
            )
        unknown = [name for name in self.class_names if name not in names]
        if unknown:
            raise UserError(f"{source} has no category '{unknown[0]}', which {self.config} wants: give data_root.")
        counts = class_counts(self._configured_model())
        if counts - {len(self.class_names)}:
            raise UserError(
                f"num_classes of the model in {self.config} is {sorted(counts)}, and {source} gives "
                f"{len(self.class_names)} classes: correct it in overrides."
            )

    def _configured_model(self) -> Any:
        """What the user says about the model: with own data the overrides only, as the rest follows the json."""
        if self.data_root is None:
            return self.cfg.model
        from mmengine.config import Config

        stated = Config()
        stated.merge_from_dict(self.overrides)
        return stated.get("model", {})

    def _adapt(self, cfg: Any) -> None:
        if self.data_root is None:
            return
        names = _category_names(existing(Path(self.data_root) / self.places["val"], "val"))
        set_class_count(cfg.model, len(names))
        for split in ("train", "val"):
            leaf = leaf_dataset(cfg[f"{split}_dataloader"].dataset)
            kept = {key: leaf[key] for key in ("pipeline", "filter_cfg") if key in leaf}
            leaf.clear()
            leaf.update(
                kept,
                type="CocoDataset",
                data_root=self.data_root,
                ann_file=self.places[split],
                data_prefix={"img": self.places[f"{split}_images"]},
                metainfo={"classes": names},
            )

    def build_head(self, features: FeatureInfo) -> DetectionHead:
        """The detector without its backbone; raises :class:`UserError` if it cannot take these maps."""
        return DetectionHead(self.library, self.cfg.model, features, self.min_stride)

    def metric(self) -> CocoMetric:
        """COCO AP on the val json."""
        leaf = leaf_dataset(self.cfg.val_dataloader.dataset)
        return CocoMetric(Path(leaf.get("data_root") or "") / leaf.ann_file, self.class_names, self.iou_types)


def _category_names(annotations: Path) -> list[str]:
    """The class names in the order of the labels that mmdet gives them: that of the json."""
    try:
        return [category["name"] for category in json.loads(annotations.read_bytes())["categories"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{annotations} has no readable list of categories ({error!r}): give a COCO json.") from error
