"""What a network costs: operations by the closed form, memory by what is held at once, sizes by the data."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gppf_ds.tasks.classification import Classification
from gppf_ds.tasks.depth import Depth
from gppf_ds.train.memory import peak_on_cpu
from gppf_ds.transfer.costs import PICTURE, _picture, flops, typical_batch

torch.set_num_threads(1)
CPU = torch.device("cpu")


def test_operations_of_a_convolutional_network_are_the_closed_form() -> None:
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(8, 16, 3, padding=1, groups=4), nn.Flatten(),
        nn.Linear(16 * 12 * 20, 5),
    )  # fmt: skip
    images = torch.randn(2, 3, 24, 40)
    convolutions = 12 * 20 * 8 * 3 * 9 + 12 * 20 * 16 * (8 // 4) * 9
    with torch.no_grad():
        assert flops(lambda: network(images)) == 2 * 2 * (convolutions + 16 * 12 * 20 * 5)


def test_operations_of_attention_are_counted() -> None:
    query = torch.randn(2, 3, 10, 16)
    with torch.no_grad():
        counted = flops(lambda: F.scaled_dot_product_attention(query, query, query))
    assert counted == 2 * (2 * 3) * (10 * 16 * 10 + 10 * 10 * 16)


@pytest.mark.parametrize("together", [True, False])
def test_the_peak_is_what_is_held_at_once(together: bool) -> None:
    size = 1_000_000

    def run() -> float:
        first = torch.empty(size)
        kept = float(first[0]) if not together else first
        del first
        second = torch.empty(size)
        return float(second[0]) + float(kept[0] if together else kept)  # type: ignore[index]

    expected = 4 * size * (2 if together else 1)
    assert expected <= peak_on_cpu(run) < expected + 10_000


def classification(data: Path) -> Classification:
    return Classification(str(data / "classification"), 4, classes=10, image_size=48)


def depth(data: Path) -> Depth:
    return Depth(str(data / "scenes"), 2, input_size=(64, 64), max_depth=20.0)


@pytest.mark.parametrize(("make", "size"), [(classification, (48, 48)), (depth, (128, 128))])
def test_the_size_is_that_of_the_data(make: Callable[[Path], Any], size: Any, demo_data: Path, tmp_path: Path) -> None:
    batch, origin = typical_batch(make(demo_data), "it", _picture(tmp_path), CPU)
    assert batch.images.shape == (1, 3, *size)
    assert origin.startswith("a validation image")


@pytest.mark.parametrize(("make", "size"), [(classification, (48, 48)), (depth, PICTURE)])
def test_without_data_a_picture_goes_the_same_way(make: Callable[[Path], Any], size: Any, tmp_path: Path) -> None:
    batch, origin = typical_batch(make(tmp_path / "nowhere"), "it", _picture(tmp_path), CPU)
    assert batch.images.shape == (1, 3, *size)
    assert "its data are missing" in origin
