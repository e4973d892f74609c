"""The benchmarks of communication, memory and reading: what they count, never how fast this machine is."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import benchmark_run
import pytest
import torch
from benchmark_run import BENCHMARKS
from torch import nn

from gppf_ds.config import LoaderConfig
from gppf_ds.data.demo import make_demo_data
from gppf_ds.simt.loader import TaskReader, load
from gppf_ds.simt.sampler import Request

TINY = ["--options", '{"layers": [1, 1, 1, 1], "channels": [16, 32, 64, 64]}', "--batch-size", "1"]
DDP = "DDP, find_unused_parameters=True"


def results(name: str, folder: Path, *arguments: str) -> Any:
    return benchmark_run.results(name, folder, *arguments, limit=550)["result"]


def check_ours(cases: dict[str, Any]) -> None:
    """The gradients of what is used are all that is sent of gradients, so that a head less is its bytes less."""
    gradients = {case: found["bytes"]["gradients"] for case, found in cases.items()}
    assert gradients["all heads used"] > gradients["one head unused"] > gradients["two heads unused"] > 0
    for found in cases.values():
        assert found["gradients over used"]["min"] == found["gradients over used"]["max"] == 1
        assert found["bytes"]["batch norm"] > 0
        assert found["calls"]["agreement"] == found["calls"]["gradients"] == 1  # one piece: the network is small
        assert found["bytes"]["other"] == 0


def test_communication_tells_unused_heads_and_units_from_used_ones(tmp_path: Path) -> None:
    soft, hard = "ours, soft, ZeRO-0", "ours, hard, ZeRO-0"
    found = results("communication", tmp_path, "--steps", "2", *TINY, "--arms", soft, hard, DDP)
    for arm in (soft, hard):
        check_ours(found[arm])
        assert all(case["bytes"]["DeepSpeed"] == 0 for case in found[arm].values())
    # Of two heads, the third is not sent; the bytes of "used" are counted from the modules there.
    theirs, ours = found[DDP], found[soft]
    assert list(theirs) == ["one head unused", "two heads unused"]
    for case, of_ddp in theirs.items():
        assert of_ddp["bytes"]["used"] == ours[case]["bytes"]["used"]
        assert of_ddp["gradients over used"]["min"] > 1.05
    assert theirs["one head unused"]["bytes"]["gradients"] >= ours["all heads used"]["bytes"]["gradients"]
    fine_head, row = 1000 * (64 * 4 + 1) * 4, 5 * 4 * 4  # the row: 5 layers of 4 units
    assert ours["one head unused"]["bytes"]["used"] - ours["two heads unused"]["bytes"]["used"] == fine_head + row
    assert found[hard]["two heads unused"]["bytes"]["used"] < ours["two heads unused"]["bytes"]["used"]


@pytest.mark.long
def test_communication_of_every_stage_and_kind_of_route(tmp_path: Path) -> None:
    found = results("communication", tmp_path, "--steps", "1", *TINY)
    assert len(found) == 9
    for arm in set(found) - {DDP}:
        check_ours(found[arm])
        updated = [case["bytes"]["DeepSpeed"] for case in found[arm].values()]
        assert min(updated) > 0 or arm.endswith("ZeRO-0")


def check_shares(found: list[dict[str, Any]]) -> None:
    for one in found:
        held, ratios = one["bytes"], one["over ZeRO-0"]
        # Nothing of note is held that the books do not know: buffers of batch norms, controllers.
        known = sum(held[kind] for kind in ("parameters", "fp32 copies", "optimizer state"))
        assert known <= held["at rest"] <= 1.02 * (known + held["DeepSpeed's bucket"] + held["gradients, stepped"])
        assert held["peak"] > held["at rest"]
        # What is being summed lies in the gradients themselves. ZeRO keeps a buffer for its parts besides.
        assert one["stage"] or held["gradients, summed"] == pytest.approx(held["parameters"], rel=0.02)
        assert ratios["optimizer state"] == pytest.approx(0.5 if one["stage"] else 1, rel=0.01)
        assert ratios["parameters"] == pytest.approx(0.5 if one["stage"] == 3 else 1, rel=0.01)


def test_memory_finds_each_rank_with_half_of_what_two_share(tmp_path: Path) -> None:
    found = results(
        "memory", tmp_path, *TINY, "--stages", "0", "3", "--devices-per-rank", "1", "--checkpointing", "off"
    )
    check_shares(found)
    assert [(one["stage"], one["checkpoint"]) for one in found] == [(0, False), (3, False)]
    assert found[1]["over ZeRO-0"]["gradients, stepped"] == pytest.approx(0.5, rel=0.01)
    assert found[0]["bytes"]["activations"] > 2**20


@pytest.mark.long
def test_memory_of_every_stage_and_number_of_devices(tmp_path: Path) -> None:
    found = results("memory", tmp_path, *TINY)
    assert len(found) == 16
    check_shares(found)
    activations = {
        (one["checkpoint"], one["devices per rank"]): one["bytes"]["activations"] for one in found if not one["stage"]
    }
    assert activations[True, 2] < 0.7 * activations[False, 2]
    assert activations[False, 2] > 1.5 * activations[False, 1]


def test_live_counts_every_storage_once_and_lets_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    live = importlib.import_module("memory_rank").Live()
    with live:
        linear = nn.Linear(100, 100)
        own = 4 * 10100
        assert live.bytes == own
        images = torch.ones(10, 100)
        loss = linear(images).view(20, 50).relu().sum()  # relu's output is what autograd keeps
        assert live.bytes == own + 4000 + 4000 + 4
        live.restart()
        loss.backward()
        del loss
        assert live.bytes == 2 * own + 4000
        assert live.peak > live.bytes
        linear.zero_grad()
        assert live.bytes == own + 4000


def test_data_speed_reads_the_same_images_on_both_sides(tmp_path: Path) -> None:
    small = ["--pipelines", "light", "--image-size", "64", "--images", "4", "--rounds", "1", "--warmup", "0"]
    found = results("data_speed", tmp_path, *small, "--starts", "2", "--kinds", "classification")
    assert list(found) == ["classification"]
    for kind in found.values():
        for side in ("ours", "theirs"):
            assert 0 < kind[side]["min"] <= kind[side]["median"] <= kind[side]["max"]
        assert 0 < kind["ratio"]["min"] <= kind["ratio"]["max"]


def test_data_speed_draws_the_same_augmentations_on_both_sides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    benchmark = importlib.import_module("data_speed")
    make_demo_data(tmp_path, train_scenes=2, val_scenes=2, train_crops=20, val_crops=20, scene_size=64, crop_size=64)
    settings = benchmark.PIPELINES["usual"]["classification"]
    task = benchmark._task("classification", tmp_path, settings)
    reader = TaskReader(task.dataset("train"), task.collate)
    request = Request(7, 0, "classification", (7,) * 4, (3, 1, 4, 15))
    (own,) = load({"classification": reader}, [request], 0, LoaderConfig(workers=0))
    dataset, collate = benchmark._timm(tmp_path / "classification", **settings)
    other = benchmark.Seeded(dataset, "classification", 7)
    images, labels = collate([other[index] for index in request.indices])
    assert torch.equal(own.data["images"], images)
    assert torch.equal(own.data["labels"], labels)
    assert other.seconds > 0


@pytest.mark.long
@pytest.mark.parametrize("pipelines", ["usual", "light"])
def test_data_speed_has_a_library_for_every_kind(tmp_path: Path, pipelines: str) -> None:
    small = ["--pipelines", pipelines, "--image-size", "64", "--images", "4"]
    few = ["--starts", "1", "--rounds", "1", "--warmup", "0"]
    assert list(results("data_speed", tmp_path, *small, *few)) == [
        "classification",
        "detection",
        "segmentation",
    ]
