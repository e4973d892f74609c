"""What it costs to serve tasks with a network: parameters, floating-point operations, latency and memory."""

from __future__ import annotations

import json
import platform
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from gppf_ds.backbone.lego import Pass
from gppf_ds.backbone.shared import shared_forward, units_run
from gppf_ds.errors import SampleError, UserError
from gppf_ds.tasks.task import Batch, Head, Task
from gppf_ds.train.memory import Run, peak_on_cpu
from gppf_ds.train.restore import Trained
from gppf_ds.train.table import aligned
from gppf_ds.transfer.counts import of_task
from gppf_ds.transfer.predict import read_image, with_equal_images

COSTS_FILE = "costs.json"
WARM_UP, RUNS = 3, 10
LOOKED_AT = 8
"""Validation images whose sizes are compared."""
PICTURE = (480, 640)
"""(height, width) of the random picture that stands for the data where there are none."""

NOTES = {
    "flops": "Of matrix products, convolutions and attention, a multiplication and an addition counting as two "
    "(torch.utils.flop_counter); operations that torch does not know, such as deformable convolutions, are left out.",
    "latency_ms": f"One image, forward and head, without reading the file: median and quartiles of {RUNS} runs after "
    f"{WARM_UP} to warm up.",
    "peak_memory": "Bytes. On a GPU, torch.cuda.max_memory_allocated. On a CPU, the whole network's parameters and "
    "buffers, the image, and the most that torch's allocator held beside them in a run (torch.profiler): libraries' "
    "own work space and the program itself are left out.",
    "together": f"All tasks on one random picture of {PICTURE[0]} x {PICTURE[1]}, each at the size that it makes of "
    "it; where their inputs are the same, what their paths share runs once (unshared: as if it did not).",
}


@dataclass(frozen=True)
class Cost:
    """Of one way to use a network."""

    flops: dict[str, int]
    """By part of the work; "total" is the sum."""
    latency_ms: dict[str, float]
    peak_memory: int


@torch.no_grad()
def measure(trained: Trained, tasks: Sequence[str], device: torch.device) -> dict[str, Any]:
    """The costs of serving some of a network's tasks, each at its true resolution and then all on one picture.

    Args:
        trained: the network; goes to ``device``.
        tasks: their names.
        device: to compute on.

    Returns:
        "parameters" of the whole network, and "tasks" by name: "input" (height, width) of the batch after the task's
        pipeline, "measured_on" (where the image is from), "parameters" and "active_parameters"
        (:func:`gppf_ds.transfer.counts.of_task`), and the fields of :class:`Cost`; "together" is that of all on one
        picture. For a task that reads neither its data nor a picture "not_measured" says why.
    """
    trained.model.to(device)
    trained.controller.to(device)
    with tempfile.TemporaryDirectory() as folder:
        picture = _picture(Path(folder))
        alone = {name: _alone(trained, name, picture, device) for name in tasks}
        together = _together(trained, tasks, picture, device)
    return {"parameters": _parameters(trained), "tasks": alone, "together": together}


@torch.no_grad()
def each(trained: Trained, tasks: Sequence[str], device: torch.device) -> dict[str, Any]:
    """What :func:`measure` says of each task, without "parameters" and "together"."""
    trained.model.to(device)
    trained.controller.to(device)
    with tempfile.TemporaryDirectory() as folder:
        picture = _picture(Path(folder))
        return {name: _alone(trained, name, picture, device) for name in tasks}


def write(folder: Path, own: Mapping[str, Any], parent: Mapping[str, Any], device: torch.device) -> Path:
    """Writes ``costs.json``: what was measured of a sub-network ("network") and of the whole network ("parent")."""
    file = folder / COSTS_FILE
    content = {"measured_with": _machine(device), "notes": NOTES, "network": own, "parent": parent}
    file.write_text(json.dumps(content, indent=1) + "\n")
    return file


def _machine(device: torch.device) -> dict[str, Any]:
    cuda = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if cuda else platform.processor() or platform.machine()
    return {"device": device.type, "name": name, "threads": torch.get_num_threads(), "torch": torch.__version__}


def _alone(trained: Trained, name: str, picture: Path, device: torch.device) -> dict[str, Any]:
    task = trained.recipe.tasks[name]
    parameters = of_task(trained, name)
    try:
        batch, origin = typical_batch(task, name, picture, device)
    except UserError as error:
        return {**parameters, "not_measured": str(error)}
    passing = Pass(batch.images, trained.controller.fixed_route(name), sizes=batch.sizes)
    features: list[list[Tensor]] = []

    def backbone() -> None:
        features[:] = trained.model.backbone([passing], trained.model.batch_norm)

    def head() -> None:
        _head(trained, name).predict(features[0], batch.targets)

    def whole() -> None:
        trained.model.predict(name, batch, passing)

    parts = {"backbone": flops(backbone), "head": flops(head)}
    features.clear()
    measured = _cost(trained, whole, parts, [batch.images])
    return {"input": list(batch.images.shape[-2:]), "measured_on": origin, **parameters, **asdict(measured)}


def _together(trained: Trained, tasks: Sequence[str], picture: Path, device: torch.device) -> dict[str, Any]:
    try:
        batches = {name: read_image(trained.recipe.tasks[name], name, picture, device) for name in tasks}
    except UserError as error:
        return {"not_measured": str(error)}
    paths = {name: trained.controller.path(name) for name in tasks}
    groups = with_equal_images(batches)

    def run(groups: Iterable[Sequence[str]]) -> None:
        for names in groups:
            first = batches[names[0]]
            together = {name: paths[name] for name in names}
            features = shared_forward(trained.model.backbone, first.images, together, first.sizes)
            for name in names:
                _head(trained, name).predict(features.pop(name), batches[name].targets)

    images = [batch.images for batch in batches.values()]
    measured = asdict(_cost(trained, lambda: run(groups), {"shared": flops(lambda: run(groups))}, images))
    measured["flops"] = {"shared": measured["flops"]["shared"], "unshared": flops(lambda: run([[n] for n in tasks]))}
    units = sum(units_run(paths[name] for name in names) for names in groups)
    return {"units_run": units, "units_unshared": sum(map(len, paths.values())), **measured}


def typical_batch(task: Task, name: str, picture: Path, device: torch.device) -> tuple[Batch, str]:
    """One image as the task evaluates it, of the size that is most frequent among some of its validation images.

    Args:
        task: of any kind.
        name: of the task.
        picture: to be read in their place where the data are not there.
        device: of the batch.

    Returns:
        The batch, and what it was made of, in words.

    Raises:
        UserError: neither the data nor the picture can be read.
    """
    try:
        samples = task.dataset("val")
        places = range(0, len(samples), max(1, len(samples) // LOOKED_AT))[:LOOKED_AT]
        batches = [task.preprocess(task.collate([samples[place]]), device, training=False) for place in places]
    except (OSError, SampleError, UserError):
        batches = []
    if not batches:
        height, width = PICTURE
        return read_image(task, name, picture, device), f"a random picture of {height} x {width} (its data are missing)"
    [(size, _)] = Counter(batch.images.shape for batch in batches).most_common(1)
    found = next(batch for batch in batches if batch.images.shape == size)
    return found, f"a validation image, of the most frequent size among {len(batches)}"


def flops(run: Run) -> int:
    """Floating-point operations of a run; see :data:`NOTES`."""
    # torch counts no fused attention of CPUs: written out, it is two matrix products everywhere.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def _cost(trained: Trained, run: Run, parts: Mapping[str, int], images: Sequence[Tensor]) -> Cost:
    total = {**parts, "total": sum(parts.values())}
    device = images[0].device
    latency = _latency(run, device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        run()
        return Cost(total, latency, torch.cuda.max_memory_allocated(device))
    weights = [*trained.model.parameters(), *trained.model.buffers()]
    return Cost(total, latency, sum(map(_bytes, [*weights, *images])) + peak_on_cpu(run))


def _latency(run: Run, device: torch.device) -> dict[str, float]:
    """Milliseconds of a run."""

    def timed() -> float:
        started = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return 1000 * (time.perf_counter() - started)

    times = [timed() for _ in range(WARM_UP + RUNS)][WARM_UP:]
    low, middle, high = statistics.quantiles(times, n=4, method="inclusive")
    return {"median": middle, "lower_quartile": low, "upper_quartile": high}


def _parameters(trained: Trained) -> dict[str, int]:
    model = trained.model
    counts = {"backbone": _count(model.backbone.parameters()), "heads": _count(model.heads.parameters())}
    return counts | {"total": sum(counts.values())}


def _head(trained: Trained, task: str) -> Head:
    head = trained.model.heads.bank[task]
    assert isinstance(head, Head)
    return head


def _count(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors)


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _picture(folder: Path) -> Path:
    pixels = np.random.default_rng(0).integers(0, 256, (*PICTURE, 3), dtype=np.uint8)
    path = folder / "picture.png"
    Image.fromarray(pixels).save(path)
    return path


def table(own: Mapping[str, Any], parent: Mapping[str, Any]) -> str:
    """The results of :func:`measure` for a sub-network and for the whole network, side by side for people."""
    rows = [("", "input", "GFLOPs", "ms", "peak MiB", "parent: ms", "parent: peak MiB")]
    for name, cost in [*own["tasks"].items(), ("together", own["together"])]:
        whole = parent["together"] if cost is own["together"] else parent["tasks"][name]
        if "not_measured" in cost:
            rows.append((name, "not measured", "", "", "", "", ""))
            continue
        size = " x ".join(map(str, cost["input"])) if "input" in cost else ""
        numbers = ", ".join(f"{part} {value / 1e9:.3f}" for part, value in cost["flops"].items() if part != "total")
        sides = [text for side in (cost, whole) for text in (_milliseconds(side), f"{side['peak_memory'] / 2**20:.1f}")]
        rows.append((name, size, numbers, *sides))
    lines = aligned(rows)
    left, whole = own["parameters"]["total"], parent["parameters"]["total"]
    return "\n".join([*lines, f"parameters: {left:,} of the parent's {whole:,}"])


def _milliseconds(cost: Mapping[str, Any]) -> str:
    times = cost["latency_ms"]
    return f"{times['median']:.1f} ({times['lower_quartile']:.1f} to {times['upper_quartile']:.1f})"
