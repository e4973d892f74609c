"""What a real run leaves for its analysis: routes, time, and the commands that read them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SHORT_STEPS

from gppf_ds.analysis import commands, compare
from gppf_ds.analysis.cka import LEAST_IMAGES
from gppf_ds.analysis.run_files import read_files
from gppf_ds.errors import UserError
from gppf_ds.train.recipe import read_run
from gppf_ds.train.restore import load_trained
from gppf_ds.train.route_record import read_routes

torch.set_num_threads(1)
CPU = torch.device("cpu")
LAYERS = ["Stem", "Res2.0", "Res3.0", "Res4.0", "Res5.0"]


def test_routes_were_recorded_at_the_interval_from_the_first_step_on(short_run: Path) -> None:
    record = read_routes(short_run)
    assert record is not None
    assert (record.layers, record.units) == (LAYERS, [2, 2, 3, 1, 2])
    assert record.steps.tolist() == [0, 2, 4, SHORT_STEPS]
    assert record.probabilities.shape == (4, 2, 5, 3)
    assert np.allclose(record.probabilities.sum(-1), 1, atol=1e-4)
    assert np.allclose(
        record.probabilities[0, 0], [[0.5, 0.5, 0]] * 2 + [[1 / 3] * 3] + [[1, 0, 0], [0.5, 0.5, 0]], atol=1e-4
    )
    trained = load_trained(short_run, None, read_run(short_run))
    last = torch.stack([trained.controller.probabilities(task) for task in record.tasks]).detach().numpy()
    assert np.allclose(record.probabilities[-1], last, atol=1e-5)
    assert np.abs(record.probabilities[-1] - record.probabilities[0]).max() > 0.05


def test_time_is_accounted_for(short_run: Path) -> None:
    run = read_files(short_run)
    assert run.images == SHORT_STEPS * (4 + 2)
    assert set(run.seconds) == {"compute", "straggler_wait", "communication", "data", "evaluation", "checkpoint"}
    spent = [sum(line["seconds"].values()) for line in run.time]
    assert sum(run.seconds.values()) == pytest.approx(sum(spent))
    assert all(run.seconds[kind] > 0 for kind in ("compute", "data", "evaluation", "checkpoint"))
    steps, rates = run.pace()
    assert steps == [2, 4, 6]
    lines = [line["seconds"] for line in run.time if line["images"]]
    assert rates == pytest.approx([12 / (line["step"] + line["data"]) for line in lines])
    steps, parts = run.step_parts()
    assert steps == [2, 4, 6]
    means = [sum(values) for values in zip(*parts.values(), strict=True)]
    assert means == pytest.approx([(line["step"] + line["data"]) / 2 for line in lines], rel=0.05)
    for line, mean in zip(run.metrics, means, strict=True):
        assert line["seconds"] <= 2 * mean * 1.05
    assert run.metric("digits", "top1")[0] == [0, 3, SHORT_STEPS]
    assert run.losses("distance")[0] == [2, 4, 6]


def test_analyze_routes_writes_pictures_and_numbers(
    short_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert commands.analyze(["routes", str(short_run), "--output", str(tmp_path)]) == 0
    printed = [Path(line) for line in capsys.readouterr().out.splitlines()]
    names = {"selection", "task_tree", "selection_curves", "certainty"}
    expected = {f"{name}.{suffix}" for name in names for suffix in ("png", "svg", "pdf")} | {"routes.json"}
    assert {file.name for file in printed} == expected
    assert all(file.stat().st_size > 500 for file in printed)
    numbers = json.loads((tmp_path / "routes.json").read_text())
    trained = load_trained(short_run, None, read_run(short_run))
    assert numbers["step"] == SHORT_STEPS
    assert numbers["paths"]["digits"] == list(trained.controller.path("digits"))


def sides(run: Path, *paths: str) -> list[compare.Side]:
    trained = load_trained(run, None, read_run(run))
    return [compare.Side(run.name, trained, path) for path in paths]


def images(run: Path, task: str, count: int, batch: int) -> compare.Images:
    recipe = read_run(run)
    return compare.Images(task, recipe.tasks[task], count, batch, 0, recipe.config.loader)


def test_cka_of_a_network_with_itself_and_across_paths(short_run: Path) -> None:
    estimator, values = compare.compare(sides(short_run, "digits", "distance"), images(short_run, "digits", 20, 8), CPU)
    assert (estimator.batches, estimator.images) == (2, 16)
    assert values.shape == (10, 10)
    assert np.allclose(values, values.T)
    assert np.allclose(values.diagonal(), 1)
    _, same = compare.compare(sides(short_run, "digits", "digits"), images(short_run, "digits", 20, 8), CPU)
    assert np.allclose(same[:5, 5:].diagonal(), 1)
    assert np.allclose(same[:5, :5], values[:5, :5])


def test_cka_is_that_of_the_maps_themselves(short_run: Path) -> None:
    """The last layer's map is what the backbone hands out: its kernel is compared with one made in float64."""
    [side] = sides(short_run, "distance")
    [batch] = images(short_run, "distance", 5, 32).batches(CPU)
    from gppf_ds.backbone.shared import shared_forward

    path = side.trained.controller.path("distance")
    last = shared_forward(side.trained.model.backbone, batch.images, {"distance": path})["distance"][-1]
    flat = last.double().flatten(1)
    centred = flat - flat.mean(0)
    assert torch.allclose(side.grams(batch)[-1], centred @ centred.T, rtol=1e-4, atol=1e-6)
    assert side.layers == LAYERS


def test_analyze_cka_draws_within_and_across(
    short_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--task", "digits", "--batch", "8", "--images", "16", "--output", str(tmp_path)]
    assert commands.analyze(["cka", str(short_run), str(short_run), *options]) == 0
    printed = capsys.readouterr().out.split("\n")[:-1]
    assert [Path(line).name for line in printed] == [f"cka_digits.{kind}" for kind in ("png", "svg", "pdf", "json")]
    numbers = json.loads((tmp_path / "cka_digits.json").read_text())
    assert numbers["images"] == "16 val images of digits, in batches of 8"
    assert [side["layers"] for side in numbers["sides"]] == [LAYERS, LAYERS]
    assert np.allclose(np.array(numbers["cka"])[:5, 5:].diagonal(), 1)


def test_heat_maps_have_one_panel_or_three(short_run: Path) -> None:
    one = compare.heat_maps(sides(short_run, "digits"), np.eye(5), "nothing")
    two = compare.heat_maps(sides(short_run, "digits", "distance"), np.eye(10), "nothing")
    assert [len([axes for axes in figure.axes if axes.get_xlabel()]) for figure in (one, two)] == [1, 3]
    assert [label.get_text() for label in one.axes[0].get_yticklabels()] == LAYERS


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--task", "digit"], "no task 'digit'"),
        (["--task", "digits", "--path", "nobody"], "no task 'nobody'"),
        (["--task", "digits", "--batch", "3"], "at least 4"),
        (["--task", "digits", "--path", "digits", "digits", "digits"], "one or two names"),
    ],
)
def test_what_cka_cannot_do_is_one_sentence(short_run: Path, arguments: list[str], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        commands.analyze(["cka", str(short_run), *arguments])


def test_too_few_images_are_one_sentence(short_run: Path) -> None:
    few = images(short_run, "digits", LEAST_IMAGES - 1, 8)
    with pytest.raises(UserError, match="has 3 val images for CKA"):
        list(few.batches(CPU))
