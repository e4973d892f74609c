"""Numbers and pictures of the controllers' choices."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from gppf_ds.analysis import route_figures
from gppf_ds.analysis.routes import (
    as_numbers,
    effective_units,
    entropy,
    path_distances,
    paths,
    similarity_tree,
    units_in_use,
)
from gppf_ds.analysis.style import COLOURS, line_look, mixed_with_white, save
from gppf_ds.train.route_record import RouteRecord

TASKS = ["a", "b", "c"]
CHOSEN = np.array([[0, 0, 1, 1], [0, 0, 1, 0], [1, 1, 0, 0]])


def certain(chosen: np.ndarray, units: int = 2, share: float = 1.0) -> np.ndarray:
    """Probabilities (tasks, layers, units) of these paths."""
    rest = (1 - share) / (units - 1)
    return np.eye(units)[chosen] * (share - rest) + rest


def record(units: int = 2) -> RouteRecord:
    shares = np.linspace(1 / units, 0.99, 6)
    values = np.stack([certain(CHOSEN, units, share) for share in shares])
    return RouteRecord(np.arange(6) * 10, values, TASKS, ["Stem", "Res2.0", "Res3.0", "Res4.0"], [units] * 4)


def test_entropy_counts_open_choices() -> None:
    probabilities = np.array([[1.0, 0.0, 0.0], [0.5, 0.5, 0.0], [1 / 3, 1 / 3, 1 / 3]])
    assert entropy(probabilities) == pytest.approx([0, np.log(2), np.log(3)])
    assert effective_units(probabilities) == pytest.approx([1, 2, 3])


def test_units_in_use_are_those_of_all_paths() -> None:
    assert units_in_use(np.array([[0, 0], [0, 1], [0, 0], [0, 1]]), 3) == pytest.approx([1, 2])


def test_tasks_that_share_more_are_joined_first() -> None:
    distances = path_distances(CHOSEN)
    assert distances.tolist() == [[0, 0.25, 1.0], [0.25, 0, 0.75], [1.0, 0.75, 0]]
    joined = similarity_tree(distances)
    assert set(joined[0, :2]) == {0, 1}
    assert joined[:, 2] == pytest.approx([0.25, 0.875])


def test_numbers_for_a_json_file() -> None:
    numbers = as_numbers(certain(CHOSEN), TASKS, list("wxyz"))
    assert numbers["paths"] == {"a": [0, 0, 1, 1], "b": [0, 0, 1, 0], "c": [1, 1, 0, 0]}
    assert numbers["share_of_layers_that_differ"]["a"] == [0, 0.25, 1.0]
    assert set(numbers["effective_units"]["a"]) == {1.0}
    assert paths(np.array(numbers["probabilities"]["c"])).tolist() == [1, 1, 0, 0]


def test_pictures_leave_in_every_format(tmp_path: Path) -> None:
    files = save(route_figures.tree(CHOSEN, TASKS), tmp_path / "new" / "tree")
    starts = {file.suffix: file.read_bytes()[:200] for file in files}
    assert b"PNG" in starts[".png"]
    assert b"xml" in starts[".svg"]
    assert b"%PDF" in starts[".pdf"]


def test_certain_choices_show_the_colours_of_their_units(tmp_path: Path) -> None:
    from matplotlib.colors import to_rgb
    from matplotlib.image import imread

    figure = route_figures.selection_map(certain(np.array([[0, 1]])), ["task"], ["first", "second"], [2, 2])
    png = save(figure, tmp_path / "map")[0]
    pixels = imread(png)[..., :3].reshape(-1, 3)
    for colour in COLOURS[:2]:
        share = (np.abs(pixels - np.array(to_rgb(colour))).max(1) < 0.01).mean()
        assert share > 0.02
    assert (np.abs(pixels - np.array(to_rgb(COLOURS[2]))).max(1) < 0.01).mean() == 0


def test_the_surer_a_choice_the_stronger_its_colour() -> None:
    faint, strong = (route_figures.cell_colour(np.array([p, 1 - p]), 2) for p in (0.5, 1.0))
    assert strong == COLOURS[0].lower()
    assert faint == mixed_with_white(COLOURS[0], route_figures.LEAST_STRENGTH)
    assert route_figures.cell_colour(np.array([1.0, 0.0]), 1) == COLOURS[0].lower()


@pytest.mark.parametrize(("units", "panels"), [(2, 4), (3, 12)])
def test_learning_curves_have_a_panel_per_layer_and_a_line_per_task(units: int, panels: int) -> None:
    drawn = [axes for axes in route_figures.selection_curves(record(units)).axes if axes.axison]
    assert len(drawn) == panels
    for axes in drawn:
        assert axes.get_xlabel() == "optimizer step"
        assert [line.get_label() for line in axes.lines] == TASKS
    first = drawn[0]
    assert first.get_title() == "Stem"
    assert first.lines[0].get_ydata()[-1] == pytest.approx(0.99)
    assert first.lines[2].get_ydata()[-1] == pytest.approx(0.01 / (units - 1))


def test_certainty_falls_to_one_unit() -> None:
    left, right = route_figures.certainty(record()).axes
    curve = left.lines[0].get_ydata()
    assert curve[0] == pytest.approx(2)
    assert curve[-1] == pytest.approx(np.exp(entropy(np.array([0.99, 0.01]))))
    assert [bar.get_width() for bar in right.patches] == pytest.approx([np.exp(entropy(np.array([2, 1]) / 3))] * 4)


def test_every_line_of_many_tasks_looks_different() -> None:
    assert len({tuple(line_look(index).items()) for index in range(28)}) == 28
