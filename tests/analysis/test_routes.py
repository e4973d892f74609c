"""The selection map is a picture of the controllers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from gppf_ds.analysis.routes import COLOURS, selection_map


@pytest.mark.parametrize("suffix", ["png", "svg", "pdf"])
def test_the_map_is_written_in_the_format_of_its_name(tmp_path: Path, suffix: str) -> None:
    target = tmp_path / f"map.{suffix}"
    selection_map(np.full((2, 3, 2), 0.5), ["a", "b"], ["Stem", "Res2.0", "Res3.0"], target)
    start = target.read_bytes()[:200]
    assert {"png": b"PNG", "svg": b"xml", "pdf": b"%PDF"}[suffix] in start


def test_certain_choices_show_the_colours_of_their_units(tmp_path: Path) -> None:
    from matplotlib.colors import to_rgb
    from matplotlib.image import imread

    certain = np.zeros((1, 2, 2))
    certain[0, 0, 0] = certain[0, 1, 1] = 1.0
    selection_map(certain, ["task"], ["first", "second"], tmp_path / "map.png")
    pixels = imread(tmp_path / "map.png")[..., :3].reshape(-1, 3)
    for colour in COLOURS[:2]:
        share = (np.abs(pixels - np.array(to_rgb(colour))).max(1) < 0.01).mean()
        assert share > 0.02
    assert (np.abs(pixels - np.array(to_rgb(COLOURS[2]))).max(1) < 0.01).mean() == 0
