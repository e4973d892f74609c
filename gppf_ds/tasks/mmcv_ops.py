"""mmcv's compiled operators, served by torchvision where mmcv was installed without them.

mmcv calls its operators by keyword as functions of a module ``mmcv._ext`` that write into tensors made by the caller;
the functions here keep those names and that manner. They stay on the device of their inputs.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, NoReturn

import torch
from torch import Tensor

_MODULE = "mmcv._ext"


def install() -> bool:
    """Makes ``mmcv.ops`` importable without its compiled part. Call it before the first import of mmdet or mmseg.

    Returns:
        True if the stand-in serves, False if mmcv brings compiled operators, which are then used as they are.
    """
    if _MODULE in sys.modules:
        return isinstance(sys.modules[_MODULE], _StandIn)
    if importlib.util.find_spec(_MODULE) is not None:
        return False
    import mmcv

    mmcv._ext = sys.modules[_MODULE] = _StandIn()
    return True


class _StandIn(ModuleType):
    """The module ``mmcv._ext``: the operators below; any other name is there too and fails only when called."""

    def __init__(self) -> None:
        super().__init__(_MODULE, "mmcv's operators from torchvision")
        self.__spec__ = ModuleSpec(_MODULE, None)
        for operator in _OPERATORS:
            setattr(self, operator.__name__, operator)

    def __getattr__(self, name: str) -> Callable[..., NoReturn]:
        if name.startswith("__"):
            raise AttributeError(name)

        def missing(*_args: Any, **_kwargs: Any) -> NoReturn:
            raise NotImplementedError(
                f"The mmcv operator '{name}' is not served by torchvision: install mmcv with its compiled operators "
                f"(MMCV_WITH_OPS=1) or choose a model without it."
            )

        return missing


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float, offset: int = 0) -> Tensor:
    """Indices of the boxes (N, 4) that greedy suppression keeps, best first."""
    from torchvision.ops import nms as torchvision_nms

    return torchvision_nms(_widen(boxes.float(), offset), scores.float(), iou_threshold)


def softnms(
    boxes: Tensor,
    scores: Tensor,
    dets: Tensor,
    iou_threshold: float,
    sigma: float,
    min_score: float,
    method: int,
    offset: int,
) -> Tensor:
    """Soft-NMS (Bodla et al. 2017, algorithm 1): neighbours of a kept box lose score instead of being dropped.

    Args:
        dets: (N, 5), filled from the top with the kept boxes and their decayed scores.
        method: 0 drops a neighbour, 1 decays linearly (equation 2), 2 with a Gaussian (equation 3).

    Returns:
        The indices of the kept boxes, in the order of ``dets``.
    """
    from torchvision.ops import box_iou

    wide, scores = _widen(boxes, offset), scores.clone()
    left = torch.arange(len(boxes), device=boxes.device)
    kept: list[Tensor] = []
    while left.numel():
        best = left[scores[left].argmax()]
        dets[len(kept), :4], dets[len(kept), 4] = boxes[best], scores[best]
        kept.append(best)
        left = left[left != best]
        iou = box_iou(wide[best][None], wide[left])[0]
        if method == 2:
            decay = torch.exp(-iou.square() / sigma)
        else:
            decay = torch.where(iou < iou_threshold, torch.ones_like(iou), 1 - iou if method == 1 else 0 * iou)
        scores[left] *= decay
        left = left[scores[left] >= min_score]
    return torch.stack(kept) if kept else left


def roi_align_forward(
    input: Tensor,
    rois: Tensor,
    output: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    *,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """RoIAlign (He et al. 2017, section 3) of ``input`` (B, C, H, W) at ``rois`` (N, 5), averaged in each bin."""
    if pool_mode != 1:
        raise NotImplementedError("roi_align without mmcv's compiled operators averages only: set pool_mode='avg'.")
    wide = _wide(input)
    size = (aligned_height, aligned_width)
    output.copy_(
        _torchvision().roi_align(wide, rois.to(wide.dtype), spatial_scale, *size, sampling_ratio, aligned),
    )


def roi_align_backward(
    grad_output: Tensor,
    rois: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    grad_input: Tensor,
    *,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """Gradient of :func:`roi_align_forward` with respect to ``input``."""
    wide = _wide(grad_output)
    size = (aligned_height, aligned_width)
    grad_input.copy_(
        _torchvision()._roi_align_backward(
            wide, rois.to(wide.dtype), spatial_scale, *size, *grad_input.shape, sampling_ratio, aligned
        )
    )


def roi_pool_forward(
    input: Tensor,
    rois: Tensor,
    output: Tensor,
    argmax: Tensor,
    *,
    pooled_height: int,
    pooled_width: int,
    spatial_scale: float,
) -> None:
    """RoI max pooling (Girshick 2015, section 2.1)."""
    wide = _wide(input)
    pooled, where = _torchvision().roi_pool(wide, rois.to(wide.dtype), spatial_scale, pooled_height, pooled_width)
    output.copy_(pooled)
    argmax.copy_(where)


def roi_pool_backward(
    grad_output: Tensor,
    rois: Tensor,
    argmax: Tensor,
    grad_input: Tensor,
    *,
    pooled_height: int,
    pooled_width: int,
    spatial_scale: float,
) -> None:
    """Gradient of :func:`roi_pool_forward` with respect to ``input``."""
    wide = _wide(grad_output)
    grad_input.copy_(
        _torchvision()._roi_pool_backward(
            wide, rois.to(wide.dtype), argmax, spatial_scale, pooled_height, pooled_width, *grad_input.shape
        )
    )


def sigmoid_focal_loss_forward(
    input: Tensor, target: Tensor, weight: Tensor, output: Tensor, *, gamma: float, alpha: float
) -> None:
    """Focal loss (Lin et al. 2017, equation 5) per logit of ``input`` (N, C); a target outside 0..C-1 is background."""
    output.copy_(_focal_loss(input, target, weight, gamma, alpha))


def sigmoid_focal_loss_backward(
    input: Tensor, target: Tensor, weight: Tensor, grad_input: Tensor, *, gamma: float, alpha: float
) -> None:
    """Gradient of :func:`sigmoid_focal_loss_forward` with respect to ``input``, for a gradient of 1 per logit."""
    with torch.enable_grad():
        logits = input.detach().requires_grad_()
        loss = _focal_loss(logits, target, weight, gamma, alpha)
        grad_input.copy_(torch.autograd.grad(loss.sum(), logits)[0])


_OPERATORS = (
    nms,
    softnms,
    roi_align_forward,
    roi_align_backward,
    roi_pool_forward,
    roi_pool_backward,
    sigmoid_focal_loss_forward,
    sigmoid_focal_loss_backward,
)


def _focal_loss(logits: Tensor, target: Tensor, weight: Tensor, gamma: float, alpha: float) -> Tensor:
    from torchvision.ops import sigmoid_focal_loss

    if weight.numel():
        raise NotImplementedError("sigmoid_focal_loss without mmcv's compiled operators takes no class weights.")
    classes = torch.arange(logits.shape[1], device=logits.device)
    return sigmoid_focal_loss(logits, (target[:, None] == classes).to(logits.dtype), alpha, gamma)


def _widen(boxes: Tensor, offset: int) -> Tensor:
    """Boxes whose plain IoU is the IoU under a side of x2 - x1 + offset (1 in code from before mmdet 2)."""
    return boxes + boxes.new_tensor([0, 0, offset, offset]) if offset else boxes


def _wide(tensor: Tensor) -> Tensor:
    """torchvision has no bfloat16 kernels, and half ones only on some devices: those run in single precision."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def _torchvision() -> Any:
    import torchvision  # noqa: F401 - registers the operators

    return torch.ops.torchvision
