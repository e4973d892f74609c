"""Losses for federated labels (LVIS, Open Images): a class that nobody judged in an image cannot be wrong there.

The annotators of such a set looked for a few classes in every image. Those are judged: all their objects are marked, or
they are absent. Of every other class nothing is known, and an object of it may stand in the image without a mark (Gupta
et al., arXiv 1908.03195, section 2; Kuznetsova et al., arXiv 1811.00982, section 2). The official evaluators drop
detections of such classes; here the classification of proposals leaves their logits out.

Of LVIS the judged classes of an image are those with an annotation and ``neg_category_ids``, less
``not_exhaustive_category_ids`` (:mod:`gppf_ds.tasks.lvis_data`). Of Open Images they are the classes with a box or a
verified image label and all below a class that is verified to be absent, less all above a class that is there
(:mod:`gppf_ds.tasks.openimages_data`). A proposal of an object is always judged by the class of that object.

What remains of the penalty: a proposal on an unmarked object still counts as background for the region proposal network
and, with a softmax, raises the logit of the background against that of the judged classes. ``CrossEntropyCustomLoss``
with ``use_sigmoid`` has no such logit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gppf_ds.errors import UserError
from gppf_ds.tasks.detection import DetectionHead, box_heads
from gppf_ds.tasks.openmm import Library, leaf_dataset, walk
from gppf_ds.tasks.task import FeatureInfo

JUDGED = "judged_labels"
"""Key of a sample: the labels of the classes that were judged in its image, an int64 array."""

_LEFT_OUT = -1e4
"""A logit whose exponential is 0 also in half precision, where minus infinity would give nan in a sigmoid loss."""

_LOSSES = ("CrossEntropyLoss", "CrossEntropyCustomLoss")
_MIXING = ("Mosaic", "MixUp", "CachedMosaic", "CachedMixUp")
"""Transforms that bring another image's background along, in which other classes were judged."""


def leave_out_unjudged(logits: Tensor, labels: Tensor, judged: Tensor) -> Tensor:
    """The logits with which a softmax or sigmoid loss sees only the classes that were judged.

    Args:
        logits: (N, C + 1) with the background last, or (N, C).
        labels: (N,), int64; C is the background.
        judged: (N, C + 1), bool; the classes judged in the image of every proposal.

    Returns:
        The same where a class was judged or is the proposal's own; elsewhere a constant of no weight and no gradient.
    """
    seen = judged.scatter(1, labels[:, None], True)[:, : logits.shape[1]]
    return logits.masked_fill(~seen, _LEFT_OUT)


class _JudgedClasses:
    """In front of a box head of mmdet: the same losses, the classification among judged classes only.

    Attributes:
        judged: (B, C + 1), bool; the classes judged in the images of the batch, the background last.
    """

    judged: Tensor

    def loss(self, cls_score: Tensor, bbox_pred: Tensor, rois: Tensor, labels: Tensor, *rest: Any, **named: Any) -> Any:
        """See mmdet's ``BBoxHead.loss``; the first column of ``rois`` is the place of the image in the batch."""
        logits = leave_out_unjudged(cls_score, labels, self.judged[rois[:, 0].long()])
        return super().loss(logits, bbox_pred, rois, labels, *rest, **named)  # type: ignore[misc]


def among_judged(head: nn.Module) -> None:
    """Puts :class:`_JudgedClasses` in front of a box head of mmdet, which keeps its parameters and their names."""
    stock = type(head)
    head.__class__ = type(f"Federated{stock.__name__}", (_JudgedClasses, stock), {})


class FederatedHead(DetectionHead):
    """A detector with proposals whose box heads are trained on what was judged in every image.

    The configuration and the names of the parameters are those of :class:`DetectionHead`.
    """

    def __init__(self, library: Library, model: Any, features: FeatureInfo, min_stride: int) -> None:
        super().__init__(library, model, features, min_stride)
        for head in self._box_heads():
            among_judged(head)

    def _box_heads(self) -> list[Any]:
        """One, or those of a cascade."""
        heads = self.model.roi_head.bbox_head
        return list(heads) if isinstance(heads, nn.ModuleList) else [heads]

    def loss(self, features: list[Tensor], targets: Any) -> dict[str, Tensor]:
        """See :meth:`OpenMMHead.loss`; every target has the labels :data:`JUDGED` among its ``metainfo``."""
        for head in self._box_heads():
            head.judged = _judged_table(targets, head.num_classes).to(features[0].device)
        return super().loss(features, targets)


def _judged_table(samples: Sequence[Any], classes: int) -> Tensor:
    """(B, classes + 1), bool."""
    table = torch.zeros(len(samples), classes + 1, dtype=torch.bool)
    table[:, classes] = True
    for row, sample in zip(table, samples, strict=True):
        row[torch.from_numpy(sample.metainfo[JUDGED])] = True
    return table


def pack_judged(config: Any) -> None:
    """Lets the last transform of a pipeline, ``PackDetInputs``, keep :data:`JUDGED`; changes the configuration."""
    from mmdet.datasets.transforms import PackDetInputs

    for node in walk(config):
        if str(node.get("type")).endswith("PackDetInputs"):
            node["meta_keys"] = (*node.get("meta_keys", PackDetInputs().meta_keys), JUDGED)


def check_federated(cfg: Any, name: str) -> None:
    """Raises :class:`UserError` if the model or the training data of the configuration cannot do with this loss.

    Args:
        cfg: ``mmengine.Config``.
        name: of the configuration, for the message.
    """
    mend = "or set federated to False in overrides."
    heads = box_heads(cfg.model)
    unfit = [head.loss_cls.type for head in heads if head.get("loss_cls") and head.loss_cls.type not in _LOSSES]
    if not heads or unfit:
        found = f"loss {unfit[0]}" if unfit else "model without box head"
        raise UserError(f"{name} is federated and has a {found}: choose a box head with {' or '.join(_LOSSES)}, {mend}")
    leaf = leaf_dataset(cfg.train_dataloader.dataset)
    if "OpenImages" in leaf.type and not leaf.get("image_level_ann_file"):
        raise UserError(f"{name} is federated: name the image_level_ann_file of train_dataloader's data too, {mend}")
    if "OpenImages" not in leaf.type and "LVIS" not in leaf.type:
        raise UserError(f"{name} is federated and trains on a {leaf.type}: choose LVIS or Open Images, {mend}")
    for node in walk(cfg.train_dataloader.dataset.to_dict()):
        if str(node.get("type")).rpartition(".")[2] in _MIXING:
            raise UserError(f"{name} is federated and joins whole images by {node['type']}: leave that out, {mend}")
