"""The record of the controllers' choices, and files of json lines that grow."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from gppf_ds.backbone.controller import Controller
from gppf_ds.config import RunConfig
from gppf_ds.errors import UserError
from gppf_ds.train import history
from gppf_ds.train.route_record import FILE, POINTS, RouteRecorder, read_routes

LAYERS = ["Stem", "Res2.0"]


def controller(units: tuple[int, int] = (2, 3)) -> Controller:
    made = Controller(["a", "b"], units)
    with torch.no_grad():
        made.logits["a"][1, 2 if units[1] == 3 else 0] = 2.0
    return made


def recorder(folder: Path, steps: int = 10, every: int = 3, main: bool = True) -> RouteRecorder:
    return RouteRecorder(RunConfig(output=str(folder), steps=steps, routes_every=every), main)


def test_what_was_recorded_is_read(tmp_path: Path) -> None:
    made, routes = controller(), recorder(tmp_path)
    for step in range(11):
        routes.step(step, made, LAYERS)
    record = read_routes(tmp_path)
    assert record is not None
    assert record.steps.tolist() == [0, 3, 6, 9, 10]
    assert (record.tasks, record.layers, record.units) == (["a", "b"], LAYERS, [2, 3])
    expected = torch.stack([made.probabilities(task) for task in record.tasks]).detach().numpy()
    assert np.allclose(record.probabilities[-1], expected, atol=1e-5)
    turned = record.ordered(["b", "c", "a"])
    assert turned.tasks == ["b", "a"]
    assert np.array_equal(turned.probabilities, record.probabilities[:, ::-1])


def test_a_run_of_any_length_has_about_as_many_lines(tmp_path: Path) -> None:
    for steps, every in ((50, 1), (POINTS, 1), (1000, 5), (500_000, 2500)):
        assert recorder(tmp_path, steps, every=0).every == every


def test_other_ranks_and_networks_without_choice_write_nothing(tmp_path: Path) -> None:
    recorder(tmp_path, main=False).step(0, controller(), LAYERS)
    recorder(tmp_path).step(0, controller((1, 1)), LAYERS)
    assert not (tmp_path / FILE).exists()
    assert read_routes(tmp_path) is None


def test_of_steps_done_twice_the_later_lines_count(tmp_path: Path) -> None:
    first, again = controller(), Controller(["a", "b"], (2, 3))
    for step in (0, 3, 6):
        recorder(tmp_path).step(step, first, LAYERS)
    with (tmp_path / FILE).open("a") as file:
        file.write('{"step": 9, "probab')  # a kill; the resumed run writes on
    for step in (3, 6, 9):
        recorder(tmp_path).step(step, again, LAYERS)
    record = read_routes(tmp_path)
    assert record is not None
    assert record.steps.tolist() == [0, 3, 6, 9]
    assert record.probabilities[1, 0, 1].tolist() == pytest.approx([1 / 3] * 3, abs=1e-5)


def test_a_run_that_starts_anew_may_have_other_tasks(tmp_path: Path) -> None:
    recorder(tmp_path).step(0, controller(), LAYERS)
    recorder(tmp_path).step(0, Controller(["c"], (2, 2)), ["x", "y"])
    record = read_routes(tmp_path)
    assert record is not None
    assert (record.tasks, record.layers, record.units) == (["c"], ["x", "y"], [2, 2])


def test_a_damaged_record_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / FILE).write_text(json.dumps({"step": 3}) + "\n")
    with pytest.raises(UserError, match=r"routes\.jsonl is damaged"):
        read_routes(tmp_path)


def test_later_lines_take_the_place_of_earlier_ones(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    assert history.read(path) == []
    for step, value in ((1, "a"), (2, "b"), (3, "c"), (2, "d"), (4, "e")):
        history.append(path, {"step": step, "value": value})
    kept = history.latest(history.read(path))
    assert [(entry["step"], entry["value"]) for entry in kept] == [(1, "a"), (2, "d"), (4, "e")]
