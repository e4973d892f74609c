"""A path and its linear layer as a full timm classifier: weights that load strictly, and what to create it with."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gppf_ds.errors import UserError
from gppf_ds.tasks.task import PlainPath

LARGEST_DIFFERENCE = 1e-5
"""Between timm's logits and ours, relative to the largest one."""

_POOLING = {"VisionTransformer": {"global_pool": "avg"}}
"""Options, by the class of timm's model, that make timm average the map as the head does."""


@torch.no_grad()
def export(
    path: PlainPath, linear: nn.Linear, images: Tensor, logits: Tensor, described: Mapping[str, Any], folder: Path
) -> list[Path]:
    """Writes ``classifier.safetensors`` and ``classifier.json``, after comparing timm's logits with ours.

    Args:
        path: the backbone.
        linear: on the global average of its last map.
        images: (B, 3, H, W), of the size that the task evaluates.
        logits: (B, classes), what path and linear layer give for them.
        described: what else the json says.
        folder: where to write; exists.

    Returns:
        The two files.

    Raises:
        UserError: timm's model does something else between the last map and the linear layer.
    """
    import timm
    from safetensors.torch import load_file, save_file

    plain = timm.create_model(path.timm_model, pretrained=False, **path.timm_options)
    pooling = _POOLING.get(type(plain).__name__, {})
    options = {**path.timm_options, **pooling, "num_classes": linear.out_features}
    model = timm.create_model(path.timm_model, pretrained=False, **options).eval()
    layer = next((name for name, module in model.named_modules() if module is model.get_classifier()), "")
    state = {**path.state, f"{layer}.weight": linear.weight, f"{layer}.bias": linear.bias}
    try:
        model.load_state_dict(state, strict=True)
        difference = float((model(images) - logits).abs().max() / logits.abs().max())
    except RuntimeError as error:
        raise UserError(_refusal(path, str(error).splitlines()[-1].strip())) from error
    if difference > LARGEST_DIFFERENCE:
        raise UserError(_refusal(path, f"its logits differ by {difference:.0e} of the largest one"))
    files = [folder / "classifier.safetensors", folder / "classifier.json"]
    save_file({name: value.contiguous().clone() for name, value in state.items()}, files[0], {"format": "pt"})
    model.load_state_dict(load_file(files[0]), strict=True)
    description = {
        "timm_model": path.timm_model,
        "timm_options": options,
        **described,
        "difference_to_ours": difference,
    }
    files[1].write_text(json.dumps(description, indent=1) + "\n")
    return files


def _refusal(path: PlainPath, reason: str) -> str:
    hint = ""
    if "head.norm.weight" in path.state:
        hint = " It normalises behind the pooling: train with head_norm_first: true in backbone.options."
    return (
        f"{path.timm_model} leaves as backbone only (export without --head): timm's own classifier is not ours, a "
        f"linear layer on the average of the last map ({reason}).{hint}"
    )
