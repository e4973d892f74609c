"""The vectors and labels that tasks hand to a linear probe of frozen features: of images, boxes and pixels.

Each of the maps that the task's head would read says what it has of a place. The choice of places is random where there
are more than are kept; it draws from torch's global generator (see :meth:`Task.probe`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gppf_ds.tasks.depth_metric import DepthTargets
from gppf_ds.tasks.label_maps import IGNORE
from gppf_ds.tasks.task import Dataset, ProbeSamples
from gppf_ds.tasks.windows import Windows

POINTS = 16
"""Pixels, or boxes, that are kept of an image."""

BACKGROUNDS = 4
"""How many of the boxes hold no object."""

CELLS = 3
"""Rows and columns that a box is divided into: without them a digit's class is hardly to be read from its box."""

LARGEST_OVERLAP = 0.3
"""Of a box without object with any object: the usual bound of negative proposals."""

_BACKGROUND_ATTEMPTS = 8

_CONSIDERED = 4096
"""Pixels of a label map among which the classes are looked for."""


def of_pixels(features: list[Tensor], places: Sequence[Tensor], labels: Sequence[Tensor], size: Tensor) -> ProbeSamples:
    """The maps' values at chosen pixels, bilinear between cells.

    Args:
        features: maps (N, C_i, H_i, W_i).
        places: for every image (M, 3): the row of ``features``, then y and x in pixels of what the backbone was given.
        labels: for every image (M,).
        size: (2,) height and width of what the backbone was given.
    """
    where = torch.cat(list(places)).to(features[0].device)
    # Cells and pixels both end at the borders: grid_sample's -1 and 1.
    grid = (2 * (where[:, 1:] + 0.5) / size.to(where) - 1).flip(1).to(features[0].dtype)
    rows = where[:, 0].long()
    parts = []
    for one in features:
        vectors = one.new_empty(len(rows), one.shape[1])
        for row in rows.unique().tolist():
            chosen = rows == row
            found = F.grid_sample(one[row, None], grid[chosen][None, None], align_corners=False, padding_mode="border")
            vectors[chosen] = found[0, :, 0].T
        parts.append(vectors)
    counts = torch.tensor([len(one) for one in places])
    return ProbeSamples(parts, torch.cat(list(labels)), torch.arange(len(counts)).repeat_interleave(counts))


def evenly(labels: Tensor, count: int) -> Tensor:
    """Indices of at most ``count`` entries of ``labels`` (M,), as many of every label as can be."""
    order = torch.randperm(len(labels))
    # The r-th entry of each label comes before the (r + 1)-th of any.
    shuffled = labels[order]
    rank = torch.zeros(len(labels), dtype=torch.long)
    for label in shuffled.unique():
        found = shuffled == label
        rank[found] = torch.arange(int(found.sum()))
    return order[rank.argsort(stable=True)[:count]]


def of_depth(features: list[Tensor], targets: DepthTargets, min_depth: float, max_depth: float) -> ProbeSamples:
    """The logarithm of the depth at measured pixels; of mirrored images only the first time counts."""
    places, labels = [], []
    depths = targets.depth.cpu()
    for image, (depth, (height, width)) in enumerate(zip(depths, targets.sizes, strict=True)):
        inside = depth[:height, :width]
        measured = ((inside > min_depth) & (inside < max_depth)).nonzero()
        chosen = measured[torch.randperm(len(measured))[:POINTS]]
        places.append(F.pad(chosen, (1, 0), value=image))
        labels.append(inside[chosen[:, 0], chosen[:, 1]].log())
    return of_pixels(features, places, labels, torch.tensor(depths.shape[1:]))


def of_label_maps(features: list[Tensor], targets: Any, windows: Windows | None) -> ProbeSamples:
    """The class at labelled pixels, of all classes in the image alike.

    Args:
        features: of whole images, or of the windows of all images, one image after another.
        targets: mmseg's data samples, whose label maps have the size of the original images.
        windows: what the images were cut into; a pixel is taken from the window in whose middle it is most.
    """
    places, labels = [], []
    first = 0
    size = torch.tensor(windows.size if windows else targets[0].metainfo["pad_shape"][:2])
    for image, sample in enumerate(targets):
        truth = sample.gt_sem_seg.data[0].cpu().long()
        labelled = (truth != IGNORE).nonzero()
        labelled = labelled[torch.randperm(len(labelled))[:_CONSIDERED]]
        chosen = labelled[evenly(truth[labelled[:, 0], labelled[:, 1]], POINTS)]
        labels.append(truth[chosen[:, 0], chosen[:, 1]])
        shown = torch.tensor(sample.metainfo["img_shape"][:2]) / torch.tensor(truth.shape)
        pixels = (chosen + 0.5) * shown - 0.5
        if windows is None:
            places.append(F.pad(pixels, (1, 0), value=image))
            continue
        corners = torch.tensor(windows.places(sample.metainfo["pad_shape"][:2]))
        nearest = torch.cdist(pixels, corners + size / 2).argmin(1)
        places.append(torch.cat([first + nearest[:, None], pixels - corners[nearest]], 1))
        first += len(corners)
    return of_pixels(features, places, labels, size)


def of_boxes(features: list[Tensor], targets: Any, classes: int) -> ProbeSamples:
    """The class of ground-truth boxes, and ``classes`` for boxes of the same sizes that hold no object.

    The maps are averaged inside each cell of a box (RoIAlign).

    Args:
        features: maps of whole images.
        targets: mmdet's data samples.
        classes: number of classes.
    """
    from torchvision.ops import roi_align

    boxes, labels = [], []
    for sample in targets:
        objects = _tensor(sample.gt_instances.bboxes)
        ids = sample.gt_instances.labels.cpu()
        kept = evenly(ids, POINTS - BACKGROUNDS)
        ignored = _tensor(sample.ignored_instances.bboxes) if "ignored_instances" in sample else objects[:0]
        empty = _backgrounds(torch.cat([objects, ignored]), sample.metainfo["img_shape"][:2])
        boxes.append(torch.cat([objects[kept], empty]).to(features[0]))
        labels.append(torch.cat([ids[kept], ids.new_full((len(empty),), classes)]))
    height = targets[0].metainfo["batch_input_shape"][0]
    parts = [
        roi_align(one, boxes, CELLS, spatial_scale=one.shape[-2] / height, sampling_ratio=2, aligned=True).flatten(1)
        for one in features
    ]
    counts = torch.tensor([len(one) for one in boxes])
    return ProbeSamples(parts, torch.cat(labels), torch.arange(len(counts)).repeat_interleave(counts))


def _backgrounds(objects: Tensor, size: Sequence[int]) -> Tensor:
    """Up to ``BACKGROUNDS`` boxes of the sizes of the image's objects at places where there is none, (n, 4).

    An image without objects gives squares of a quarter of its shorter side.
    """
    from torchvision.ops import box_iou

    height, width = size
    side = min(height, width) / 4
    sizes = objects[:, 2:] - objects[:, :2] if len(objects) else torch.tensor([[side, side]])
    tried = sizes[torch.randint(len(sizes), (BACKGROUNDS * _BACKGROUND_ATTEMPTS,))]
    corner = torch.rand(len(tried), 2) * (torch.tensor([width, height]) - tried).clamp(min=0)
    boxes = torch.cat([corner, corner + tried], 1)
    free = (box_iou(boxes, objects) <= LARGEST_OVERLAP).all(1)
    return boxes[free][:BACKGROUNDS]


def _tensor(boxes: Any) -> Tensor:
    """Corners (M, 4) on the CPU, of a tensor or mmdet's boxes."""
    found: Tensor = getattr(boxes, "tensor", boxes).cpu()
    return found.float()


def with_boxes(pipeline: Sequence[Any]) -> list[Any]:
    """A val pipeline of mmdet that reads the boxes right behind the image, so that what resizes it resizes them."""
    steps = [step for step in pipeline if "LoadAnnotations" not in str(step["type"])]
    reading = next(index for index, step in enumerate(steps) if "LoadImage" in str(step["type"]))
    return [*steps[: reading + 1], {"type": "LoadAnnotations", "with_bbox": True}, *steps[reading + 1 :]]


def openmm_dataset(task: Any, leaves: Sequence[Any], pipeline: list[Any]) -> Dataset:
    """What data sets of mmdet or mmseg read, without their wrappers, through another pipeline.

    Args:
        task: an :class:`gppf_ds.tasks.openmm_task.OpenMMTask`.
        leaves: configurations of data sets that read files.
        pipeline: takes the place of theirs.
    """
    from gppf_ds.tasks.openmm import scope
    from gppf_ds.tasks.openmm_index import build_dataset
    from gppf_ds.tasks.openmm_pipeline import adapted
    from gppf_ds.tasks.openmm_task import Samples

    with scope(task.library):
        parts = [{**leaf, "pipeline": pipeline} for leaf in leaves]
        config = parts[0] if len(parts) == 1 else {"type": "ConcatDataset", "datasets": parts}
        return Samples(task.library, build_dataset(adapted(config, task.readers)))
