"""Object detection and instance segmentation: any mmdet detector with a feature pyramid, from an ordinary config."""

from __future__ import annotations

import copy
import json
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from gppf_ds.data.remembered import remembered
from gppf_ds.errors import UserError
from gppf_ds.tasks.coco_metric import CocoMetric, Detections
from gppf_ds.tasks.lvis_metric import LvisMetric, load_lvis
from gppf_ds.tasks.openmm import class_counts, existing, leaf_dataset, only_leaf_dataset, scope, set_class_count, walk
from gppf_ds.tasks.openmm_task import OpenMMHead, OpenMMTask
from gppf_ds.tasks.probe import of_boxes, openmm_dataset, with_boxes
from gppf_ds.tasks.task import Dataset, FeatureInfo, Head, Metric, PlainPath, ProbeSamples, Split

Rules = Literal["coco", "lvis", "openimages"]

_RULES: dict[str, Rules] = {
    "CocoDataset": "coco",
    "Objects365V1Dataset": "coco",
    "Objects365V2Dataset": "coco",
    "LVISDataset": "lvis",
    "LVISV05Dataset": "lvis",
    "LVISV1Dataset": "lvis",
    "OpenImagesDataset": "openimages",
    "OpenImagesChallengeDataset": "openimages",
}
"""By whose rules predictions on a data set class of mmdet are scored."""

_SMOKE_PROPOSALS = 32


class DetectionHead(OpenMMHead):
    """Neck, proposals and heads of an mmdet detector."""

    prediction_layers = ("*fc_cls.*", "*fc_reg.*", "*conv_logits.*", "*retina_cls.*", "*conv_cls.*")

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
                    "image_id": sample.img_id,
                    "boxes": found.bboxes.float().numpy(),
                    "scores": found.scores.float().numpy(),
                    "labels": found.labels.numpy(),
                    "masks": encode_mask_results(found.masks.numpy()) if "masks" in found else None,
                }
            )
        return results


class Detection(OpenMMTask):
    """Boxes, and masks where the configuration's ``val_evaluator`` names ``segm``.

    The data set classes of mmdet for COCO, Objects365, LVIS and Open Images are read in their official layouts and
    scored by the rules of their own evaluators. A configuration of LVIS or Open Images with ``federated = True`` trains
    its box heads on what was judged in every image (:mod:`gppf_ds.tasks.federated`).

    Args:
        config: path of an mmdet configuration or the name of a shipped one (see :func:`load_config`). Its backbone is
            replaced, its pipelines and data preprocessor are used.
        batch_size: images per device and step.
        weight, loss_weight, source: see :class:`Task`.
        data_root: alone, the folder where the configuration's own data sets are. With the next four, which come
            together, the folder of a data set in COCO format that replaces them: then every head gets the number of
            classes of the json. Without it the configuration's own ``data_root`` holds.
        train, val: annotation json files, relative to ``data_root``.
        train_images, val_images: image folders, relative to ``data_root``.
        classes: class names in the order of the category ids, only to be checked against the json files.
        overrides: values to merge into the configuration, nested or with dotted keys.
        class_balance: beta of the class-balanced loss for the classification of boxes, for example 0.999 (see
            :func:`gppf_ds.tasks.class_balance.class_balanced_weights`). None: the configuration's loss as it is.
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
        source: str | None = None,
        class_balance: float | None = None,
    ) -> None:
        super().__init__(config, batch_size, weight, loss_weight, overrides, source)
        places = {"train": train, "val": val, "train_images": train_images, "val_images": val_images}
        self.places = {key: place for key, place in places.items() if place is not None}
        missing = [key for key in places if key not in self.places]
        if self.places and missing:
            raise UserError(f"data_root is given without {', '.join(missing)}: name them relative to data_root.")
        if self.places and data_root is None:
            raise UserError(f"{', '.join(self.places)} need data_root: set it.")
        self.data_root = data_root
        if class_balance is not None and not 0 <= class_balance < 1:
            raise UserError(f"class_balance must be from 0 to below 1, not {class_balance}: 0.999 is usual.")
        self.classes = classes
        self.class_balance = class_balance

    @property
    def headline(self) -> str:  # type: ignore[override]
        """AP50 on Open Images, else mask AP where masks are evaluated, else box AP."""
        return "AP50" if self.rules == "openimages" else f"{self.iou_types[-1]}_AP"

    @cached_property
    def rules(self) -> Rules:
        """Whose evaluator scores the val data; raises :class:`UserError` for an unknown data set class."""
        kind = _class_name(leaf_dataset(self.cfg.val_dataloader.dataset))
        if kind not in _RULES:
            raise UserError(
                f"{self.config} reads a {kind} for val: choose one of {', '.join(_RULES)}, or convert the annotations "
                f"to COCO json and give data_root."
            )
        return _RULES[kind]

    @property
    def federated(self) -> bool:
        """Whether the box heads leave out the classes that nobody judged in an image."""
        return bool(self.cfg.get("federated"))

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
        if self.rules == "lvis":
            return _category_names(_annotations(leaf))
        if self.rules == "openimages":
            return self._open_images().class_table()[0]
        names = leaf.get("metainfo", {}).get("classes")
        if names is None:
            with scope(self.library):
                from mmdet.registry import DATASETS

                names = DATASETS.get(str(leaf.type)).METAINFO["classes"]
        return [names] if isinstance(names, str) else list(names)

    def use_data(self, root: Path) -> None:
        """See :meth:`OpenMMTask.use_data`."""
        super().use_data(root)
        for name in ("rules", "iou_types", "class_names", "_model"):
            self.__dict__.pop(name, None)

    def shrink(self) -> None:
        """See :meth:`OpenMMTask.shrink`; few proposals and detections too: LVIS has 1203 of each box to suppress."""
        super().shrink()
        for node in walk([self.cfg.model.get("train_cfg") or {}, self.cfg.model.get("test_cfg") or {}]):
            for key in ("nms_pre", "max_per_img"):
                if key in node:
                    node[key] = min(node[key], _SMOKE_PROPOSALS)

    def check(self) -> None:
        """Reads the configuration and the annotations (of LVIS, Objects365 and Open Images only the classes).

        Raises:
            UserError: a file is missing, the json files are wrong, ``classes`` or a configured ``num_classes``
                disagrees with them, or the configuration is federated and cannot be.
        """
        from gppf_ds.data.coco import check_coco

        rules = self.rules  # first of all: of an unknown class not even the files are known
        if self.federated:
            from gppf_ds.tasks.federated import check_federated

            check_federated(self.cfg, self.config)
        leaves = [leaf_dataset(self.cfg[f"{split}_dataloader"].dataset) for split in ("train", "val")]
        key = "data_root" if self.data_root else "the dataloaders' data_root"
        files = [existing(_annotations(leaf), key) for leaf in leaves]
        folders = [existing(Path(leaf.get("data_root") or "") / leaf.data_prefix.img, key) for leaf in leaves]
        for leaf in leaves:
            if verified := leaf.get("image_level_ann_file"):
                existing(Path(leaf.get("data_root") or "") / verified, key)
        if rules == "openimages":
            names = self.class_names
        elif {_class_name(leaf) for leaf in leaves} == {"CocoDataset"}:
            question = f"check_coco {folders[0]} {folders[1]}"
            names = remembered(question, files, lambda: check_coco(*files, *folders))
        else:
            names = _category_names(files[1])
        self._check_classes(names, files[0])

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
        if not self.places:
            return self.cfg.model
        from mmengine.config import Config

        stated = Config()
        stated.merge_from_dict(self.overrides)
        return stated.get("model", {})

    def _adapt(self, cfg: Any) -> None:
        if not self.places or self.data_root is None:
            return
        names = _category_names(existing(Path(self.data_root) / self.places["val"], "val"))
        set_class_count(cfg.model, len(names))
        cfg.federated = False  # a json in COCO's format says nothing of what was judged
        for split in ("train", "val"):
            leaf = only_leaf_dataset(cfg[f"{split}_dataloader"].dataset)
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
        from gppf_ds.tasks.federated import FederatedHead

        kind = FederatedHead if self.federated else DetectionHead
        return kind(self.library, self._model, features, self.min_stride)

    @cached_property
    def _model(self) -> Any:
        """The model's configuration, its losses weighted by the objects of each class if that is asked for."""
        if self.class_balance is None:
            return self.cfg.model
        from gppf_ds.tasks.class_balance import class_balanced_weights, object_counts

        names, annotations = self.class_names, _annotations(leaf_dataset(self.cfg.train_dataloader.dataset))
        counts = remembered(f"object counts {names}", [annotations], lambda: object_counts(annotations, names))
        model = copy.deepcopy(self.cfg.model)
        heads = box_heads(model)
        if not heads or any(h.loss_cls.type != "CrossEntropyLoss" or h.loss_cls.get("use_sigmoid") for h in heads):
            raise UserError(f"{self.config} has no box head with a softmax loss: leave class_balance out.")
        for head in heads:
            head.loss_cls.class_weight = class_balanced_weights(counts, self.class_balance)
        return model

    def _data_config(self, split: Split) -> dict[str, Any]:
        config = super()._data_config(split)
        leaf = leaf_dataset(config)
        kind = _class_name(leaf)
        if _RULES.get(kind) == "lvis":
            load_lvis()  # before mmdet imports it
        if _RULES.get(kind) == "openimages":
            from gppf_ds.tasks.openimages_data import OpenImagesBoxes

            leaf["type"] = OpenImagesBoxes
        if split == "train" and self.federated:
            from gppf_ds.tasks.federated import pack_judged

            pack_judged(config)
            if _RULES.get(kind) == "lvis":
                from gppf_ds.tasks.lvis_data import JudgedLVISV05, JudgedLVISV1

                leaf["type"] = JudgedLVISV1 if kind == "LVISV1Dataset" else JudgedLVISV05
        return config

    def _open_images(self) -> Any:
        """The val data set with no boxes read."""
        with scope(self.library):
            from gppf_ds.tasks.openimages_data import OpenImagesBoxes

            leaf = leaf_dataset(self.cfg.val_dataloader.dataset).to_dict()
            settings = {key: value for key, value in leaf.items() if key not in ("type", "_scope_", "pipeline")}
            return OpenImagesBoxes(**settings, pipeline=[], lazy_init=True)

    def metric(self) -> Metric:
        """AP by the rules of the val data set: COCO's, LVIS's or the Open Images challenge's."""
        leaf = leaf_dataset(self.cfg.val_dataloader.dataset)
        if self.rules == "lvis":
            return LvisMetric(_annotations(leaf), self.iou_types)
        if self.rules == "openimages":
            from gppf_ds.tasks.openimages_metric import OpenImagesMetric

            return OpenImagesMetric(self.cfg.val_evaluator, *self._open_images().class_table())
        return CocoMetric(_annotations(leaf), self.class_names, self.iou_types)

    def export(self, head: Head, path: PlainPath, folder: Path) -> list[Path]:
        """A full mmdet detector (see :func:`gppf_ds.tasks.openmm_export.export`)."""
        from gppf_ds.tasks import openmm_export

        cfg = self.cfg.to_dict()
        annotations = str(_annotations(leaf_dataset(self.cfg.val_dataloader.dataset)))
        own = {"type": "CocoMetric", "ann_file": annotations, "metric": self.iou_types}
        evaluator = cfg.setdefault("val_evaluator", own)
        if self.places:
            cfg["val_evaluator"] = own
        elif self.data_root is not None and "ann_file" in evaluator:
            evaluator["ann_file"] = annotations
        if self.data_root is not None:
            cfg.pop("test_dataloader", None)
        return openmm_export.export(self.library, cfg, head, path, folder)

    def describe(self, head: Head, features: list[Tensor], targets: Any) -> list[dict[str, Any]]:
        """``objects``, best first, each with its ``class``, ``label`` (index from 0), ``score`` and ``box``.

        A box is x1, y1, x2, y2 in pixels of the original image. With masks there is ``mask``, a compressed RLE of COCO
        of that image's size.
        """
        return [self._describe(found) for found in head.predict(features, targets)]

    def _describe(self, found: Detections) -> dict[str, Any]:
        objects: list[dict[str, Any]] = []
        for label, score, box in zip(found["labels"], found["scores"], found["boxes"], strict=True):
            name = self.class_names[label]
            objects.append({"class": name, "label": int(label), "score": float(score), "box": box.tolist()})
        if found["masks"] is not None:
            for one, mask in zip(objects, found["masks"], strict=True):
                one["mask"] = {"size": list(mask["size"]), "counts": mask["counts"].decode("ascii")}
        objects.sort(key=lambda one: -one["score"])
        best = ", ".join(f"{one['class']} ({one['score']:.2f})" for one in objects[:3])
        return {"summary": f"{len(objects)} found{': ' if best else ''}{best}", "objects": objects}

    def probe_dataset(self, split: Split) -> Dataset:
        """The images of a split with their boxes in the val pipeline; see :meth:`Task.probe_dataset`."""
        with scope(self.library):
            data, val = (leaf_dataset(self._data_config(one)) for one in (split, "val"))
        return openmm_dataset(self, [data], with_boxes(val["pipeline"]))

    def probe(self, features: list[Tensor], targets: Any) -> ProbeSamples:
        """The class of some boxes, some of them empty; see :func:`gppf_ds.tasks.probe.of_boxes`."""
        return of_boxes(features, targets, len(self.class_names))


def box_heads(model: Any) -> list[Any]:
    """The configurations of a detector's box heads: none, one, or those of a cascade."""
    heads = model.get("roi_head", {}).get("bbox_head") or []
    return list(heads) if isinstance(heads, list | tuple) else [heads]


def _class_name(leaf: Any) -> str:
    """The data set's class, without the scope that a configuration may write before it (``mmdet.CocoDataset``)."""
    return str(leaf["type"]).rpartition(".")[2]


def _annotations(leaf: Any) -> Path:
    """The annotation file of a data set's configuration."""
    return Path(leaf.get("data_root") or "") / leaf.ann_file


def _category_names(annotations: Path) -> list[str]:
    """The class names in the order of the labels that mmdet gives them: that of the json."""

    def read() -> list[str]:
        return [category["name"] for category in json.loads(annotations.read_bytes())["categories"]]

    try:
        return remembered("category names", [annotations], read)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{annotations} has no readable list of categories ({error!r}): give a COCO json.") from error
