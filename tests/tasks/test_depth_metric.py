"""The metrics of depth against numpy."""

from __future__ import annotations

import math
import pickle

import numpy as np
import pytest
import torch

from gppf_ds.tasks.depth_metric import DepthMetric, DepthTargets


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


def reference(prediction: np.ndarray, depth: np.ndarray) -> list[float]:
    ratio = np.maximum(depth / prediction, prediction / depth)
    error = np.log(prediction) - np.log(depth)
    return [
        *[(ratio < 1.25**n).mean() for n in (1, 2, 3)],
        np.mean(np.abs(depth - prediction) / depth),
        np.mean((depth - prediction) ** 2 / depth),
        np.sqrt(np.mean((depth - prediction) ** 2)),
        np.sqrt(np.mean((np.log(depth) - np.log(prediction)) ** 2)),
        np.mean(np.abs(np.log10(depth) - np.log10(prediction))),
        100 * np.sqrt(np.mean(error**2) - np.mean(error) ** 2),
    ]


def test_metric_matches_numpy_and_merging_equals_one_pass() -> None:
    sizes = [(20, 30), (17, 23), (20, 25), (9, 30)]
    depth = torch.rand(4, 32, 32) * 12
    depth[depth < 2] = 0
    depth[2] = 0  # an image without a measured pixel
    predictions = [torch.rand(size) * 12 + 0.1 for size in sizes]
    targets = DepthTargets(depth, sizes)

    expected = []
    for prediction, image, (height, width) in zip(predictions, depth.double().numpy(), sizes, strict=True):
        truth = image[:height, :width]
        valid = (truth > 1e-3) & (truth < 10)
        if valid.any():
            expected.append(reference(prediction.double().numpy()[valid], truth[valid]))
    whole = DepthMetric(1e-3, 10.0, garg_crop=False)
    whole.update(predictions, targets)
    means = dict(zip(DepthMetric.NAMES, np.mean(expected, axis=0), strict=True))
    assert len(expected) == 3
    assert whole.compute() == pytest.approx(means, rel=1e-6)

    parts = [DepthMetric(1e-3, 10.0, garg_crop=False) for _ in range(3)]
    for part, chosen in zip(parts, (slice(0, 1), slice(1, 4), slice(4, 4)), strict=True):
        part.update(predictions[chosen], DepthTargets(depth[chosen], sizes[chosen]))
    merged = DepthMetric(1e-3, 10.0, garg_crop=False)
    merged.merge([pickle.loads(pickle.dumps(part.state())) for part in parts])
    assert merged.compute() == pytest.approx(whole.compute(), rel=1e-12)


def test_metric_without_images_is_nan() -> None:
    assert all(math.isnan(value) for value in DepthMetric(1e-3, 80.0, garg_crop=False).compute().values())


def test_garg_crop_counts_only_its_rows_and_columns() -> None:
    depth = torch.full((1, 375, 1242), 10.0)
    prediction = torch.full((375, 1242), 99.0)
    prediction[153:371, 44:1197] = 10.0
    metric = DepthMetric(1e-3, 80.0, garg_crop=True)
    metric.update([prediction], DepthTargets(depth, [(375, 1242)]))
    assert metric.compute()["abs_rel"] == 0
    prediction[153, 44] = 20.0
    metric.update([prediction], DepthTargets(depth, [(375, 1242)]))
    assert metric.compute()["abs_rel"] > 0
