"""Which path of a trained network suits a new data set: probes of frozen features, before anything is trained.

In place of trials by hand (GPPF fine-tunes its IN21K, ADE20K, COCO and other paths and compares, tables 4 to 8): every
path runs as it is over a few hundred training and validation images, and a linear model is fitted to what comes out
(:mod:`gppf_ds.transfer.linear_probe`).
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import gppf_ds
from gppf_ds.config import LoaderConfig
from gppf_ds.errors import UserError
from gppf_ds.seeding import FORWARD, ORDER, generator, seed_global_generators
from gppf_ds.simt.loader import TaskReader, UnreadableSamples, load
from gppf_ds.simt.sampler import Request
from gppf_ds.tasks.task import Batch, FeatureInfo, ProbeSamples, Split, Task
from gppf_ds.train import recipe
from gppf_ds.train.inherit import resolve
from gppf_ds.train.recipe import Recipe
from gppf_ds.train.restore import Trained
from gppf_ds.train.table import aligned
from gppf_ds.transfer.costs import flops
from gppf_ds.transfer.extract import ChosenPath
from gppf_ds.transfer.linear_probe import Vectors, fit_and_predict, scores
from gppf_ds.transfer.serving import TaskBackbone

ADVICE_FILE = "advise.json"
CONFIDENCE = 0.95

WIDTH = 1024
"""Numbers that are kept of what a feature map says of a place; more are projected."""

NOTES = {
    "score": "Of a linear model on frozen features, on validation images: balanced accuracy of classes, or R^2.",
    "error": "Standard deviation of the score over bootstrap samples of the validation images; that other training "
    "images would give another fit is not in it: small leads can turn round with another seed.",
    "first": "Share of these samples in which no other path scores higher.",
    "tied": f"That the first path is better is not sure to {CONFIDENCE:.0%} (the same samples, compared in pairs).",
    "flops": "Forward, per image as the target evaluates it; see costs.json of gppf-ds extract for what counts.",
    "seconds": "In the path and in the fit; reading the data is left out.",
}

_SPLITS: tuple[Split, ...] = ("train", "val")

_Result = TypeVar("_Result")


@dataclass(frozen=True)
class Row:
    """One path for a new task; :data:`NOTES` explains the numbers."""

    tasks: list[str]
    """The tasks of the run that have this path."""
    path: dict[str, int]
    """The unit of every layer."""
    score: float
    error: float
    first: float
    tied: bool
    parameters: int
    flops: int
    seconds: float


@dataclass(frozen=True)
class Advice:
    """The paths of a network for one new task, best first."""

    task: str
    kind: str
    measure: str
    images: dict[Split, int]
    vectors: dict[Split, int]
    rows: list[Row]


@dataclass(frozen=True)
class Target:
    """A new task and how its samples are drawn.

    Args:
        name: of the task.
        task: the task.
        samples: images of each split, at most.
        seed: of the choice of images, and of places in them.
        loader: workers and prefetch.
        device: to compute on.
    """

    name: str
    task: Task
    samples: int
    seed: int
    loader: LoaderConfig
    device: torch.device

    def batches(self, split: Split) -> Iterator[tuple[Batch, int]]:
        """Batches, each with its number of images: the same images in the same order every time."""
        dataset = self.task.probe_dataset(split)
        drawn = generator(self.seed, ORDER, "probe", self.name, split).permutation(len(dataset))[: self.samples]
        starts = range(0, len(drawn), self.task.batch_size)
        parts = [tuple(map(int, drawn[start : start + self.task.batch_size])) for start in starts]
        requests = [Request(step, 0, self.name, (0,) * len(part), part) for step, part in enumerate(parts)]
        unreadable = UnreadableSamples(self.loader)
        for loaded in load({self.name: TaskReader(dataset, self.task.collate)}, requests, self.seed, self.loader):
            unreadable.observe(loaded)
            self.reseed(split, loaded.request.step)
            batch = self.task.preprocess(loaded.data, self.device, training=False)
            yield batch, len(loaded.request.indices)

    def reseed(self, split: Split, step: int) -> None:
        """Makes whatever draws from the global generators a function of the batch."""
        seed_global_generators(self.seed, FORWARD, step, "probe", self.name, split)


@dataclass
class _Candidate:
    """A path, the tasks of the run that have it, and what it gave so far."""

    tasks: list[str]
    path: ChosenPath | TaskBackbone
    found: dict[Split, list[ProbeSamples]] = field(default_factory=lambda: {"train": [], "val": []})
    flops: int = 0
    seconds: float = 0.0

    def timed(self, work: Callable[[], _Result], device: torch.device) -> _Result:
        """The result of some work for this path, whose time is added up."""
        started = time.perf_counter()
        result = work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        self.seconds += time.perf_counter() - started
        return result

    def vectors(self, split: Split) -> Vectors:
        """All that was found of a split."""
        parts = self.found[split]
        maps = zip(*(part.vectors for part in parts), strict=True)
        values = [torch.cat(blocks).numpy() for blocks in maps]
        if not all(np.isfinite(one).all() for one in values):
            raise UserError(
                f"the path of {', '.join(self.tasks)} gives values that are not finite: advise from a checkpoint "
                "before its training diverged (--checkpoint)."
            )
        labels, images = (torch.cat([getattr(part, name) for part in parts]).numpy() for name in ("labels", "images"))
        return Vectors(values, labels, images)


def read_targets(file: Path, names: Sequence[str] | None) -> Recipe:
    """A recipe with new tasks, their data checked; where their training would start from does not matter yet.

    Args:
        file: the recipe.
        names: of the tasks to keep; all of them by default.

    Raises:
        UserError: one sentence that names the key or the file, and the remedy.
    """
    resolved = resolve([file])
    content = {key: value for key, value in resolved.content.items() if key != "finetune"}
    try:
        found = recipe.from_content(content, program="gppf-ds advise")
    except UserError as error:
        raise UserError(f"{error}{resolved.place(str(error))}") from error
    for name in names or ():
        if name not in found.tasks:
            raise UserError(f"{file} has no task {name!r}: choose from {', '.join(found.tasks)}.")
    found.tasks = {name: found.tasks[name] for name in names or found.tasks}
    for name, task in found.tasks.items():
        try:
            task.check()
        except UserError as error:
            raise UserError(f"tasks.{name}: {error}") from error
    return found


def advise(trained: Trained, target: Target) -> Advice:
    """Probes every path of a network with a new task.

    Args:
        trained: the network; stays as it is.
        target: the new task.

    Raises:
        UserError: the kind of task cannot be probed, its data cannot be read, or a few images show too few labels.
    """
    backbone = trained.model.backbone
    maps = FeatureInfo(backbone.channels, backbone.strides).select(target.task.min_stride)
    candidates = _candidates(trained, target.device)
    images = {split: _collect(candidates, target, split, maps) for split in _SPLITS}
    predictions = []
    for one in candidates:
        train, val = one.vectors("train"), one.vectors("val")
        _require_labels(target, train, val)
        predictions.append(one.timed(partial(fit_and_predict, train, val), target.device))
    return Advice(
        task=target.name,
        kind=type(target.task).__name__,
        measure="balanced accuracy" if val.are_classes else "R^2",
        images=images,
        vectors={"train": len(train.labels), "val": len(val.labels)},
        rows=_ranked(candidates, scores(val, predictions, target.seed)),
    )


def _candidates(trained: Trained, device: torch.device) -> list[_Candidate]:
    """Each different path once; with token-level experts each task, whose routers are its own."""
    if trained.model.backbone.layout is not None:
        return [_Candidate([name], TaskBackbone(trained, name).to(device)) for name in trained.recipe.tasks]
    by_path: dict[tuple[int, ...], list[str]] = {}
    for name in trained.recipe.tasks:
        by_path.setdefault(tuple(trained.controller.path(name)), []).append(name)
    backbone = trained.model.backbone
    return [_Candidate(names, ChosenPath(backbone, path).to(device)) for path, names in by_path.items()]


@torch.no_grad()
def _collect(candidates: Sequence[_Candidate], target: Target, split: Split, maps: Sequence[int]) -> int:
    """Reads a split once and keeps what every path gives of it; returns the number of images."""
    total = 0
    for step, (batch, images) in enumerate(target.batches(split)):
        for one in candidates:
            forward = partial(one.path, batch.images)
            if not one.flops:  # it also warms up, before time counts
                one.flops = flops(forward) // images
            features = one.timed(forward, target.device)
            target.reseed(split, step)
            samples = target.task.probe([features[index] for index in maps], batch.targets)
            one.found[split].append(
                ProbeSamples(
                    [_narrowed(part).cpu() for part in samples.vectors], samples.labels.cpu(), samples.images + total
                )
            )
        total += images
    return total


def _narrowed(vectors: Tensor) -> Tensor:
    """(M, C) -> (M, at most WIDTH): a random projection, the same one for all vectors of a length.

    It keeps lengths and angles, all that ridge regression uses of vectors, to a few percent (Johnson and Lindenstrauss,
    1984).
    """
    channels = vectors.shape[1]
    if channels <= WIDTH:
        return vectors.float()
    directions = generator(0, "project", channels).standard_normal((channels, WIDTH), dtype=np.float32)
    return vectors.float() @ torch.from_numpy(directions / WIDTH**0.5).to(vectors.device)


def _require_labels(target: Target, train: Vectors, val: Vectors) -> None:
    if len(np.unique(train.images)) < 2:
        raise UserError(f"tasks.{target.name}: fewer than two training images show a label: raise --samples.")
    for split, vectors in (("train", train), ("val", val)):
        if len(np.unique(vectors.labels)) < 2:
            raise UserError(
                f"tasks.{target.name}: {len(np.unique(vectors.images))} {split} images show fewer than two different "
                "labels, of which nothing can be learnt: raise --samples or correct the data."
            )


def _ranked(candidates: Sequence[_Candidate], found: NDArray[np.float64]) -> list[Row]:
    """Rows, best first.

    Args:
        candidates: in any order.
        found: their :func:`gppf_ds.transfer.linear_probe.scores`.
    """
    order = np.argsort(-found[:, 0], kind="stable")
    best = found[order[0]]
    top = np.nanmax(found[:, 1:], axis=0)
    rows = []
    for index in order:
        one, score = candidates[index], found[index]
        lead = np.nanquantile(best[1:] - score[1:], 1 - CONFIDENCE)
        rows.append(
            Row(
                tasks=one.tasks,
                path=one.path.numbers,
                score=float(score[0]),
                error=float(np.nanstd(score[1:])),
                first=float(np.mean(score[1:] >= top)),
                tied=bool(index != order[0] and lead <= 0),
                parameters=sum(parameter.numel() for parameter in one.path.parameters()),
                flops=one.flops,
                seconds=one.seconds,
            )
        )
    return rows


def table(advice: Advice) -> str:
    """The ranking for people."""
    images, vectors = advice.images, advice.vectors
    head = ("", "path of", advice.measure, "first", "parameters", "GFLOPs/image", "probe")
    rows = [head] + [
        (
            f"{rank}{'=' if row.tied else ''}",
            ", ".join(row.tasks),
            f"{row.score:.3f} +- {row.error:.3f}",
            f"{row.first:.0%}",
            f"{row.parameters / 1e6:.2f} M",
            f"{row.flops / 1e9:.2f}",
            f"{row.seconds:.1f} s",
        )
        for rank, row in enumerate(advice.rows, 1)
    ]
    lines = aligned(rows)
    title = (
        f"{advice.task} ({advice.kind}): a linear model on frozen features, fitted to {vectors['train']} vectors of "
        f"{images['train']} training images, judged on {vectors['val']} of {images['val']} validation images"
    )
    return "\n".join([title, *lines, _verdict(advice.rows)])


def _verdict(rows: Sequence[Row]) -> str:
    best = ", ".join(rows[0].tasks)
    if len(rows) == 1:
        return f"All tasks of the run have the same path ({best}): there is nothing to choose."
    tied = [" and ".join(row.tasks) for row in rows if row.tied]
    if not tied:
        return f"Advice: the path of {best}."
    return f"Advice: the path of {best}; not surely better (=) than that of {', '.join(tied)}: raise --samples to tell."


def write(advices: Sequence[Advice], trained: Trained, run: Path, seed: int, folder: Path) -> Path:
    """Writes ``advise.json``: the whole of the advices, by task.

    Args:
        advices: of the new tasks.
        trained: the network.
        run: its folder.
        seed: of the samples.
        folder: made where it is missing.
    """
    folder.mkdir(parents=True, exist_ok=True)
    content = {
        "run": str(run),
        "checkpoint": trained.path.name,
        "step": trained.step,
        "seed": seed,
        "gppf_ds": gppf_ds.__version__,
        "notes": NOTES,
        "targets": {advice.task: asdict(advice) for advice in advices},
    }
    file = folder / ADVICE_FILE
    file.write_text(json.dumps(content, indent=1) + "\n")
    return file
