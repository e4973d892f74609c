"""The stand-in for mmcv's compiled operators against short references in plain torch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from gppf_ds.tasks import mmcv_ops

torch.set_num_threads(1)
STAND_IN = mmcv_ops.install()


def random_boxes(count: int, size: float) -> Tensor:
    corners = torch.rand(count, 2) * size * 0.6
    return torch.cat([corners, corners + 4 + torch.rand(count, 2) * size * 0.35], 1)


def iou(a: Tensor, b: Tensor, offset: int) -> float:
    width = float(torch.minimum(a[2], b[2]) - torch.maximum(a[0], b[0])) + offset
    height = float(torch.minimum(a[3], b[3]) - torch.maximum(a[1], b[1])) + offset
    inter = max(width, 0.0) * max(height, 0.0)
    areas = [float((box[2] - box[0] + offset) * (box[3] - box[1] + offset)) for box in (a, b)]
    return inter / (sum(areas) - inter)


@pytest.mark.parametrize("offset", [0, 1])
def test_nms_is_greedy_suppression(offset: int) -> None:
    from mmcv.ops import nms

    torch.manual_seed(0)
    boxes, scores = random_boxes(60, 64), torch.rand(60)
    kept: list[int] = []
    for index in scores.argsort(descending=True).tolist():
        if all(iou(boxes[index], boxes[other], offset) <= 0.4 for other in kept):
            kept.append(index)
    _, found = nms(boxes, scores, iou_threshold=0.4, offset=offset)
    assert found.tolist() == kept
    assert 5 < len(kept) < 55


@pytest.mark.parametrize("method", ["naive", "linear", "gaussian"])
def test_soft_nms_decays_neighbours(method: str) -> None:
    from mmcv.ops import soft_nms

    torch.manual_seed(1)
    boxes, scores = random_boxes(25, 64), torch.rand(25)
    left, kept = dict(enumerate(scores.tolist())), []
    while left:
        best = max(left, key=left.__getitem__)
        kept.append((best, left.pop(best)))
        for other in list(left):
            overlap = iou(boxes[best], boxes[other], 0)
            factor = {
                "naive": float(overlap < 0.3),
                "linear": 1 - overlap if overlap >= 0.3 else 1.0,
                "gaussian": float(torch.exp(torch.tensor(-overlap * overlap / 0.5))),
            }[method]
            left[other] *= factor
            if left[other] < 1e-3:
                del left[other]
    dets, found = soft_nms(boxes, scores, iou_threshold=0.3, sigma=0.5, min_score=1e-3, method=method)
    assert found.tolist() == [index for index, _ in kept]
    torch.testing.assert_close(dets[:, 4], torch.tensor([score for _, score in kept]), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(dets[:, :4], boxes[found])
    assert len(soft_nms(boxes[:0], scores[:0])[1]) == 0


def bilinear(image: Tensor, y: Tensor, x: Tensor) -> Tensor:
    """(C, H, W) at points inside the image, by matrix products with hat functions (differentiable in the image)."""
    rows = (1 - (y[:, None] - torch.arange(image.shape[1])).abs()).clamp(min=0)
    columns = (1 - (x[:, None] - torch.arange(image.shape[2])).abs()).clamp(min=0)
    return rows.to(image.dtype) @ image @ columns.to(image.dtype).T


@pytest.mark.parametrize("aligned", [True, False])
def test_roi_align_averages_bilinear_samples_forward_and_backward(aligned: bool) -> None:
    from mmcv.ops import roi_align

    torch.manual_seed(2)
    features = torch.randn(2, 3, 12, 10, dtype=torch.float64, requires_grad=True)
    # Inside the map by more than the samples' reach, so that no border rule matters.
    rois = torch.tensor([[0, 8, 8, 30, 40], [1, 10, 6, 34, 26], [1, 5, 9, 31, 30]], dtype=torch.float64)
    size, samples, scale = 3, 2, 0.25
    expected = []
    for roi in rois:
        x1, y1, x2, y2 = (roi[1:] * scale - (0.5 if aligned else 0)).tolist()
        points = (torch.arange(size * samples, dtype=torch.float64) + 0.5) / (size * samples)
        values = bilinear(features[int(roi[0])], y1 + points * (y2 - y1), x1 + points * (x2 - x1))
        expected.append(torch.nn.functional.avg_pool2d(values, samples))
    reference = torch.stack(expected)
    found = roi_align(features, rois, size, scale, samples, "avg", aligned)
    torch.testing.assert_close(found, reference)
    weight = torch.randn_like(reference)
    gradients = [torch.autograd.grad((out * weight).sum(), features)[0] for out in (found, reference)]
    torch.testing.assert_close(*gradients)


def test_roi_align_gradient_is_that_of_its_forward() -> None:
    from mmcv.ops import roi_align

    torch.manual_seed(3)
    features = torch.randn(1, 2, 6, 6, dtype=torch.float64, requires_grad=True)
    rois = torch.tensor([[0, -2.0, 1, 20, 30]], dtype=torch.float64)  # reaches over the border
    assert torch.autograd.gradcheck(lambda x: roi_align(x, rois, 2, 0.25, 0, "avg", True), features)


def test_roi_align_of_bfloat16_follows_single_precision() -> None:
    from mmcv.ops import roi_align

    features, rois = torch.randn(1, 2, 8, 8), torch.tensor([[0, 1.0, 1, 25, 25]])
    found = roi_align(features.bfloat16(), rois.bfloat16(), 2, 0.25, 2, "avg", True)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), roi_align(features, rois, 2, 0.25, 2, "avg", True), atol=0.05, rtol=0.05)


def test_roi_pool_takes_the_maximum_and_its_gradient() -> None:
    from mmcv.ops import roi_pool

    torch.manual_seed(4)
    features = torch.randn(1, 2, 8, 8, requires_grad=True)
    found = roi_pool(features, torch.tensor([[0, 0.0, 0, 7, 7]]), 2, 1.0)
    reference = torch.nn.functional.max_pool2d(features, 4)
    torch.testing.assert_close(found, reference)
    weight = torch.randn_like(reference)
    gradients = [torch.autograd.grad((out * weight).sum(), features)[0] for out in (found, reference)]
    torch.testing.assert_close(*gradients)


def test_sigmoid_focal_loss_is_equation_5_with_its_gradient() -> None:
    from mmcv.ops import sigmoid_focal_loss

    torch.manual_seed(5)
    logits = (torch.randn(12, 4, dtype=torch.float64) * 3).requires_grad_()
    target = torch.randint(0, 5, (12,))  # 4 is background
    positive = torch.nn.functional.one_hot(target, 5)[:, :4].bool()
    p = logits.sigmoid()
    p_t = torch.where(positive, p, 1 - p)
    alpha_t = torch.where(positive, 0.25, 0.75)
    reference = -(alpha_t * (1 - p_t) ** 2 * p_t.log())
    for reduction, value in (("none", reference), ("sum", reference.sum()), ("mean", reference.sum() / 12)):
        found = sigmoid_focal_loss(logits, target, 2.0, 0.25, None, reduction)
        torch.testing.assert_close(found, value)
        gradients = [torch.autograd.grad(out.sum(), logits, retain_graph=True)[0] for out in (found, value)]
        torch.testing.assert_close(*gradients)


@pytest.mark.skipif(not STAND_IN, reason="this mmcv has its compiled operators")
def test_other_operators_fail_by_name_when_called() -> None:
    import mmcv._ext

    with pytest.raises(NotImplementedError, match="carafe_forward"):
        mmcv._ext.carafe_forward()
    assert mmcv_ops.install()


@pytest.mark.skipif(not STAND_IN, reason="this mmcv has its compiled operators")
def test_a_compiled_mmcv_is_used_as_it_is(tmp_path: Path) -> None:
    """In a fresh process, with a module where the compiled one would be."""
    code = f"""
import mmcv, sys
mmcv.__path__.append({str(tmp_path)!r})
open({str(tmp_path)!r} + "/_ext.py", "w").write("compiled = True")
from gppf_ds.tasks import mmcv_ops
assert mmcv_ops.install() is False and "mmcv._ext" not in sys.modules
import mmcv._ext
assert mmcv._ext.compiled and mmcv_ops.install() is False
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
