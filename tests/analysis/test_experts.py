"""What token-level experts say of tasks, on arrays."""

from __future__ import annotations

import numpy as np
import pytest

from gppf_ds.analysis.experts import mutual_information, mutual_information_by_layer, usage_matrix
from gppf_ds.backbone.moe.selections import usage


def test_usage_is_a_share_of_the_selections() -> None:
    counts = np.array([[[3, 1, 0], [0, 0, 0]]])
    shares = usage(counts)
    assert shares[0, 0].tolist() == [0.75, 0.25, 0]
    assert np.isnan(shares[0, 1]).all()


def test_mutual_information_between_its_bounds() -> None:
    alike = np.full((4, 1, 8), 1 / 8)
    apart = np.eye(4)[:, None]
    assert mutual_information(alike) == pytest.approx([0], abs=1e-12)
    assert mutual_information(apart) == pytest.approx([np.log(4)])


def test_mutual_information_is_the_sum_of_its_definition() -> None:
    shares = usage(np.random.default_rng(0).random((3, 5, 6)))
    joint = shares / 3
    marginals = joint.sum(0, keepdims=True) * (1 / 3)
    assert mutual_information(shares) == pytest.approx((joint * np.log(joint / marginals)).sum((0, 2)))


def test_the_matrix_has_a_panel_per_layer_and_the_bars_a_bar() -> None:
    shares = usage(np.random.default_rng(0).random((3, 5, 16)))
    layers = [f"block {number}" for number in range(5)]
    panels = [axes for axes in usage_matrix(shares, ["a", "b", "c"], layers).axes if axes.images]
    assert [axes.get_title(loc="left") for axes in panels] == layers
    assert np.array_equal(panels[2].images[0].get_array(), shares[:, 2])
    bars = mutual_information_by_layer(shares, layers).axes[0].patches
    assert [bar.get_width() for bar in bars] == pytest.approx(mutual_information(shares))
