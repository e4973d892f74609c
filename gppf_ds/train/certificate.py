"""The certificate of a grown network: proof, to be checked at any time, that its old tasks are what they were.

Written before the first step, from the source itself: the hash of every parameter and buffer, and of what every old
task computes for a probe image.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from gppf_ds.backbone.lego import Pass
from gppf_ds.errors import SampleError, UserError
from gppf_ds.train.recipe import read_run
from gppf_ds.train.record import versions
from gppf_ds.train.restore import Trained, load_trained

FILE, PROBE = "certificate.json", "probe.png"


@dataclass(frozen=True)
class Finding:
    """What has become of the old tasks."""

    rule: str
    compared: int
    differing: list[str]
    remark: str = ""


def write(folder: Path, source: Path) -> None:
    """Writes ``certificate.json`` and the probe image into the folder of a run that grows.

    Args:
        folder: of the run.
        source: the folder of the finished run that it grows from.
    """
    folder.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(0).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    Image.fromarray(noise).resize((320, 240), Image.Resampling.BICUBIC).save(folder / PROBE)
    trained = load_trained(source, None, read_run(source))
    content = {
        "source": str(trained.path),
        "versions": versions(),
        "tensors": _hashes_of_tensors(trained),
        "outputs": _hashes_of_outputs(trained, list(trained.recipe.tasks), folder / PROBE),
    }
    (folder / FILE).write_text(json.dumps(content, indent=1) + "\n")


def verify(folder: Path) -> list[Finding]:
    """Compares the last checkpoint of a run with its certificate.

    Raises:
        UserError: the run has no certificate, or no checkpoint.
    """
    if not (folder / FILE).is_file():
        raise UserError(f"{folder} has no {FILE}: only runs with finetune.mode grow have one.")
    certified = json.loads((folder / FILE).read_text())
    trained = load_trained(folder, None, read_run(folder))
    tensors = _hashes_of_tensors(trained)
    outputs = _hashes_of_outputs(trained, list(certified["outputs"]), folder / PROBE)
    now = versions()
    others = [
        f"{name} {old}, now {now.get(name)}" for name, old in certified["versions"].items() if now.get(name) != old
    ]
    return [
        Finding("parameters and buffers", len(certified["tensors"]), _differing(certified["tensors"], tensors)),
        Finding(
            "outputs on the probe image",
            len(certified["outputs"]),
            _differing(certified["outputs"], outputs),
            f"written with {'; '.join(others)}" if others else "",
        ),
    ]


def _differing(certified: Mapping[str, str], found: Mapping[str, str]) -> list[str]:
    return [name for name, value in certified.items() if found.get(name) != value]


def _hashes_of_tensors(trained: Trained) -> dict[str, str]:
    return {name: _hash(tensor) for name, tensor in trained.model.state_dict().items()}


@torch.no_grad()
def _hashes_of_outputs(trained: Trained, tasks: Sequence[str], probe: Path) -> dict[str, str]:
    """By task, of its feature maps and predictions; of the maps alone where a task reads no single images."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # how sums are split over threads decides their last bit
    hashes = {}
    for name in tasks:
        task, head = trained.recipe.tasks[name], trained.model.heads.bank[name]
        route = trained.controller.fixed_route(name)
        try:
            batch = task.preprocess(task.collate([task.sample(probe)]), torch.device("cpu"), training=False)
            images = batch.images
        except (UserError, SampleError):
            batch, images = None, torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
        passing = Pass(images, route, sizes=None if batch is None else batch.sizes)
        [maps] = trained.model.backbone([passing], trained.model.batch_norm)
        predictions = [] if batch is None else head.predict(maps, batch.targets)  # type: ignore[operator]
        hashes[name] = _hash([maps, predictions])
    torch.set_num_threads(threads)
    return hashes


def _hash(value: Any) -> str:
    digest = hashlib.sha256()
    for part in _parts(value):
        digest.update(part)
    return digest.hexdigest()


def _parts(value: Any) -> Iterator[bytes]:
    """Anything that heads predict, as bytes."""
    if isinstance(value, Tensor):
        value = value.detach().cpu().numpy()
    if isinstance(value, np.ndarray):
        yield f"{value.dtype}{value.shape}".encode()
        yield np.ascontiguousarray(value).tobytes()
    elif isinstance(value, Mapping):
        for key in sorted(value, key=str):
            yield str(key).encode()
            yield from _parts(value[key])
    elif isinstance(value, list | tuple):
        yield f"[{len(value)}".encode()
        for item in value:
            yield from _parts(item)
    else:
        yield repr(value).encode()
