"""How many images a second does a core read and augment, next to the loaders of timm, mmdet and mmseg?

The same files through the same transforms: by the product's data set, collate and loader (in the training process, as
a worker would), and by the library's own data set, collate and torch's DataLoader. Each arm is a process of its own;
they take turns, round by round, and a ratio is that of the two turns of one round. Time is CPU time of the process,
which runs on one thread: other jobs on the machine disturb it little, and the system's cache has the files. Both arms
draw the same augmentations: theirs is seeded like ours for every sample, and the time that takes does not count for it.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import harness
import numpy as np
import torch

from gppf_ds.config import LoaderConfig
from gppf_ds.data.demo import DIGIT_NAMES, make_demo_data
from gppf_ds.seeding import SAMPLE, seed_global_generators
from gppf_ds.simt.loader import TaskReader, load
from gppf_ds.simt.sampler import Request
from gppf_ds.tasks.task import Task

Side = Literal["ours", "theirs"]
Read = Callable[[int, list[list[int]]], float]
"""(number of the round, indices of every batch): reads, augments and collates them all; CPU seconds not to count."""

LIBRARIES = {"classification": "timm", "detection": "mmdet", "segmentation": "mmseg"}
"""By kind of task, what we are compared with."""

PIPELINES: dict[str, dict[str, Any]] = {
    "usual": {
        "classification": {"image_size": 224, "rand_augment": "rand-m9-mstd0.5-inc1"},
        "detection": "mask-rcnn_r50_fpn_1x_coco.py",
        "segmentation": "upernet_r50_4xb4-80k_ade20k-512x512.py",
    },
    "light": {
        "classification": {"image_size": 128},
        "detection": "mask_rcnn_demo.py",
        "segmentation": "upernet_demo.py",
    },
}
"""Arguments of the classification task; mmdet's and mmseg's configurations, of theirs and of the demo."""

AIM = 1.0
"""Our seconds over theirs, the median: no slower."""


def ours(kind: str, data: Path, pipelines: str) -> tuple[Read, int]:
    """The product's reading of one task, and how many images it has."""
    task = _task(kind, data, PIPELINES[pipelines][kind])
    reader = TaskReader(task.dataset("train"), task.collate)

    def read(number: int, batches: list[list[int]]) -> float:
        requests = [Request(number, 0, kind, (number,) * len(indices), tuple(indices)) for indices in batches]
        for loaded in load({kind: reader}, requests, 0, LoaderConfig(workers=0)):
            assert not loaded.unreadable
        return 0.0

    return read, len(reader.dataset)


def _task(kind: str, data: Path, settings: Any) -> Task:
    if kind == "classification":
        from gppf_ds.tasks.classification import Classification

        return Classification(str(data / "classification"), 1, **settings)
    images: dict[str, Any] = {
        "data_root": str(data / "scenes"),
        "train_images": "images/train",
        "val_images": "images/val",
    }
    if kind == "detection":
        from gppf_ds.tasks.detection import Detection

        images |= {split: f"annotations/instances_{split}.json" for split in ("train", "val")}
        return Detection(settings, 1, **images)
    from gppf_ds.tasks.segmentation import Segmentation

    return Segmentation(settings, 1, **images, train_labels="labels/train", val_labels="labels/val")


def theirs(kind: str, data: Path, pipelines: str) -> tuple[Read, int]:
    """The library's own reading of the same."""
    settings = PIPELINES[pipelines][kind]
    made = _timm(data / "classification", **settings) if kind == "classification" else _openmm(kind, data, settings)
    dataset, collate = made

    def read(number: int, batches: list[list[int]]) -> float:
        seeded = Seeded(dataset, kind, number)
        for _ in torch.utils.data.DataLoader(seeded, batch_sampler=batches, collate_fn=collate):
            pass
        return seeded.seconds

    return read, len(dataset)


class Seeded(torch.utils.data.Dataset[Any]):
    """A data set whose samples draw what ours draw in this round."""

    def __init__(self, inner: Any, kind: str, number: int) -> None:
        self.inner = inner
        self.key = (kind, number)
        self.seconds = 0.0
        """What seeding took."""

    def __getitem__(self, index: int) -> Any:
        start = time.process_time()
        seed_global_generators(0, SAMPLE, *self.key, index)
        self.seconds += time.process_time() - start
        return self.inner[index]


def _timm(folder: Path, image_size: int, rand_augment: str | None = None) -> tuple[Any, Any]:
    """As timm's train script has it with its prefetcher, which normalises on the device: batches of bytes, as ours."""
    from timm.data import create_dataset, create_transform
    from timm.data.loader import fast_collate

    from gppf_ds.tasks.posterize import mend  # where Pillow refuses what timm draws

    transform = mend(
        create_transform(
            image_size,
            is_training=True,
            color_jitter=None,
            auto_augment=rand_augment,
            interpolation="bicubic",
            use_prefetcher=True,
        )
    )
    return create_dataset("", root=str(folder), split="train", is_training=True, transform=transform), fast_collate


def _openmm(kind: str, data: Path, config: str) -> tuple[Any, Any]:
    """The pipeline of the configuration that ours reads, in the library's own data set and built by mmengine alone."""
    from mmengine.dataset import pseudo_collate
    from mmengine.registry import DATASETS

    from gppf_ds.tasks.openmm import load_config, scope  # where mmcv has no compiled operators, for the import

    library: Any = LIBRARIES[kind]
    given = load_config(library, config, {}).train_dataloader.dataset
    wanted: dict[str, Any] = {"data_root": str(data / "scenes"), "pipeline": given.pipeline}
    if kind == "detection":
        wanted |= {"type": "CocoDataset", "metainfo": {"classes": DIGIT_NAMES}, "filter_cfg": given.filter_cfg}
        wanted |= {"ann_file": "annotations/instances_train.json", "data_prefix": {"img": "images/train"}}
    else:
        folders = {"img_path": "images/train", "seg_map_path": "labels/train"}
        reduced = any(step.get("reduce_zero_label") for step in given.pipeline)
        wanted |= {"type": "BaseSegDataset", "data_prefix": folders, "reduce_zero_label": reduced}
    with scope(library):
        return DATASETS.build(wanted), pseudo_collate


def serve(kind: str, side: Side, data: Path, pipelines: str, calls: Any) -> None:
    """An arm's process: tells how many images it has, then answers (round, batches) with the CPU seconds it took."""
    import cv2

    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    read, images = (ours if side == "ours" else theirs)(kind, data, pipelines)
    calls.send(images)
    while (call := calls.recv()) is not None:
        start = time.process_time()
        uncounted = read(*call)
        calls.send(time.process_time() - start - uncounted)


@contextmanager
def arm(kind: str, side: Side, data: Path, settings: Mapping[str, Any]) -> Iterator[Callable[[Any], Any]]:
    """Starts an arm and gives what asks it; asking with None only waits for its next answer."""
    context = multiprocessing.get_context("spawn")
    own, other = context.Pipe()
    process = context.Process(target=serve, args=(kind, side, data, settings["pipelines"], other), daemon=True)
    process.start()
    other.close()

    def ask(call: Any) -> Any:
        if call is not None:
            own.send(call)
        if not own.poll(settings["limit"]):
            sys.exit(f"{kind}, {side}: no answer in {settings['limit']:.0f} s")
        try:
            return own.recv()
        except EOFError:
            sys.exit(f"{kind}, {side}: the process ended; its last words are above")

    try:
        yield ask
    finally:
        process.kill()
        process.join()


def compare(kind: str, data: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Images per second of CPU time of both arms, and the ratio of their seconds, over the rounds of all starts."""
    counted: dict[Side, list[float]] = {"ours": [], "theirs": []}
    for start in range(settings["starts"]):
        for side, seconds in _rounds(kind, data, settings, start).items():
            counted[side] += seconds
    speeds: dict[str, Any] = {
        side: harness.spread([settings["images"] / value for value in counted[side]]) for side in counted
    }
    ratios = [a / b for a, b in zip(counted["ours"], counted["theirs"], strict=True)]
    return speeds | {"ratio": harness.spread(ratios)}


def _rounds(kind: str, data: Path, settings: Mapping[str, Any], start: int) -> dict[Side, list[float]]:
    """CPU seconds of the rounds of both arms, in processes of their own: where memory lies makes one 5 % faster."""
    seconds: dict[Side, list[float]] = {"ours": [], "theirs": []}
    with arm(kind, "ours", data, settings) as first, arm(kind, "theirs", data, settings) as second:
        asks = {"ours": first, "theirs": second}
        sizes = {side: ask(None) for side, ask in asks.items()}
        if sizes["ours"] != sizes["theirs"]:
            sys.exit(f"{kind}: ours has {sizes['ours']} images, {LIBRARIES[kind]} {sizes['theirs']}")
        rounds = settings["warmup"] + settings["rounds"]
        for number in range(start * rounds, (start + 1) * rounds):
            batches = _batches(number, sizes["ours"], settings)
            for side in ("ours", "theirs") if number % 2 else ("theirs", "ours"):
                seconds[side].append(asks[side]((number, batches)))
    return {side: values[settings["warmup"] :] for side, values in seconds.items()}


def _batches(number: int, size: int, settings: Mapping[str, Any]) -> list[list[int]]:
    """As many images as a round has, each as often as any other, in an order of its own."""
    batch = settings["batch_size"]
    order = np.random.default_rng(number).permutation(settings["images"]) % size
    return [order[start : start + batch].tolist() for start in range(0, len(order), batch)]


def report(result: Mapping[str, Any]) -> str:
    """One line for each kind of task."""
    rows: list[Sequence[str]] = [
        [
            "task",
            "ours, images/s",
            "against",
            "theirs, images/s",
            "seconds, ours over theirs: median (min - max)",
            "aim",
            "",
        ]
    ]
    for kind, found in result.items():
        ratio = found["ratio"]
        rows.append(
            [
                kind,
                f"{found['ours']['median']:.0f}",
                LIBRARIES[kind],
                f"{found['theirs']['median']:.0f}",
                f"{ratio['median']:.3f} ({ratio['min']:.3f} - {ratio['max']:.3f})",
                f"<= {AIM:.2f}",
                "met" if ratio["median"] <= AIM else "not met",
            ]
        )
    return harness.table(rows)


def main() -> None:
    """Measures, prints the table and writes the json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", choices=LIBRARIES, default=list(LIBRARIES), help="default: all")
    parser.add_argument("--pipelines", choices=PIPELINES, default="usual", help="default: %(default)s")
    parser.add_argument("--images", type=int, default=128, help="in a round (default: %(default)s)")
    parser.add_argument("--starts", type=int, default=5, help="fresh processes of each arm (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=6, help="measured ones of each (default: %(default)s)")
    parser.add_argument("--warmup", type=int, default=2, help="rounds before them (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=16, help="images in a batch (default: %(default)s)")
    parser.add_argument("--image-size", type=int, default=384, help="side of the files, px (default: %(default)s)")
    parser.add_argument("--limit", type=float, default=300.0, help="seconds for one answer (default: %(default)s)")
    parser.add_argument("--results", type=Path, default=harness.RESULTS, help="folder for the json")
    args = parser.parse_args()
    if min(args.images, args.starts, args.rounds, args.batch_size) < 1 or args.image_size < 64:
        parser.error("--images, --starts, --rounds and --batch-size start at 1, --image-size at 64")
    names = ("kinds", "pipelines", "images", "starts", "rounds", "warmup", "batch_size", "image_size", "limit")
    settings = {**{name: getattr(args, name) for name in names}, "ranks": 1}
    with tempfile.TemporaryDirectory() as folder:
        os.environ.update(XDG_CACHE_HOME=f"{folder}/cache", OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")
        sizes = {"scene_size": args.image_size, "crop_size": args.image_size}
        make_demo_data(Path(folder) / "demo", train_scenes=48, val_scenes=2, train_crops=160, val_crops=20, **sizes)
        result = {kind: compare(kind, Path(folder) / "demo", settings) for kind in args.kinds}
    facts = f"files of {args.image_size} px, one thread, {args.starts} x {args.rounds} rounds of {args.images} images"
    print(f"{args.pipelines} pipelines: {facts}\n")
    print(report(result))
    harness.save("data_speed", settings, result, args.results)


if __name__ == "__main__":
    main()
