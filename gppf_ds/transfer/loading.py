"""How an exported file is loaded, by the library whose names it has; each way is gone once before it is described."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from pprint import pformat
from typing import Any, cast

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from gppf_ds.backbone import names
from gppf_ds.errors import UserError
from gppf_ds.tasks.openmm import Library, scope
from gppf_ds.tasks.openmm_export import Backbone, find_backbone
from gppf_ds.tasks.task import PlainPath
from gppf_ds.transfer.extract import (
    ChosenPath,
    Size,
    largest_difference,
    plain_model,
    plain_options,
    probe,
    relative_difference,
)

LARGEST_DIFFERENCE = 1e-6
"""Of a plain model's last map from the path's, relative to the largest value, where timm computes both."""

LARGEST_DIFFERENCE_ELSEWHERE = 1e-5
"""The same where another library does: its operations round otherwise."""

_TORCHVISION = {
    "swin_tiny_patch4_window7_224": "swin_t",
    "swin_small_patch4_window7_224": "swin_s",
    "swin_base_patch4_window7_224": "swin_b",
    "vit_base_patch16_224": "vit_b_16",
    "vit_base_patch32_224": "vit_b_32",
    "vit_large_patch16_224": "vit_l_16",
    "vit_large_patch32_224": "vit_l_32",
}
"""torchvision's models that timm calls otherwise."""


@dataclass(frozen=True)
class Loading:
    """How to load ``model.safetensors``."""

    code: str
    """Python, to be run in the file's folder; it makes ``model``."""
    compared: str = ""
    """The model that was compared with the path; empty where no library that is installed has it."""
    difference: float | None = None
    """Of its last map from the path's, relative to the largest value."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """What the code says, as data."""
    remark: str = ""


def check(path: ChosenPath, convention: str, file: Path, size: Size) -> Loading:
    """Loads a written file back, strictly and in every way that can be gone here, and compares the numbers.

    Args:
        path: what the file was written of.
        convention: of the names in the file, one of :data:`gppf_ds.backbone.names.CONVENTIONS`.
        file: the safetensors file.
        size: of the images to compare on.

    Raises:
        UserError: timm has no model for this path, and the names are timm's.
        RuntimeError: the file does not give the numbers of the path.
    """
    state, written = path.state(), load_file(file)
    back = names.to_timm(written, state)
    if back.keys() != state.keys() or not all(torch.equal(back[name], value) for name, value in state.items()):
        raise RuntimeError(f"{file} does not hold the path's numbers")
    if convention in ("mmdet", "mmseg"):
        found = _openmm(path, cast(Library, convention), written, size)
        if found is None:
            found = _timm(path, convention, back, size)
            found = replace(found, remark=f"No backbone of {convention} was found to give these maps. {found.remark}")
        return found
    loaded = _timm(path, convention, back, size)
    if convention == "torchvision":
        return _torchvision(path, written, size, loaded) or loaded
    return loaded


def _timm(path: ChosenPath, convention: str, state: Mapping[str, Tensor], size: Size) -> Loading:
    """timm's model; a file with other names than timm's gets there through this package."""
    options = plain_options(path, size)
    lines = ["import timm", "from safetensors.torch import load_file"]
    read = 'load_file("model.safetensors")'
    if convention != "timm":
        lines.append("from gppf_ds.backbone.names import to_timm")
        read = f"to_timm({read}, model.state_dict())"
    made = f'model = timm.create_model("{path.timm_model}", **{_literal(options)})'
    code = "\n".join([*lines, "", made, f"model.load_state_dict({read}, strict=True)"])
    remark = " ".join(filter(None, [names.REMARKS.get(convention, ""), _about_windows(path), _about_head_norm(path)]))
    ours = f"timm's {path.timm_model}"
    try:
        difference = largest_difference(path, plain_model(path.timm_model, options, state), size)
        _require(difference, LARGEST_DIFFERENCE, path, f"{ours} at {size[0]} x {size[1]}")
    except UserError:
        if convention == "timm":
            raise
        # Units that only other libraries have: the names are all that can be judged here.
        code = 'from safetensors.torch import load_file\n\nstate = load_file("model.safetensors")'
        return Loading(code, remark=remark)
    return Loading(code, ours, difference, {"timm_options": options}, remark)


def _about_head_norm(path: ChosenPath) -> str:
    if "head.norm.weight" not in path.state():
        return ""
    return "timm's head.norm acts behind pooling, on no map: training has left it as it was."


def _about_windows(path: ChosenPath) -> str:
    if not path.windowed:
        return ""
    height, width = path.trained_size
    remarks = [
        f"On images larger than {height} x {width} the path shifts the windows of all stages: create the model with "
        "always_partition=True for them, and without for others. The head was given the maps of all stages but the "
        "last behind a layer norm without parameters."
    ]
    if "pad_first" in path.kinds:
        remarks.append("The path pads maps before it shifts windows; timm computes the same where none needs padding.")
    return " ".join(remarks)


def _require(difference: float, limit: float, path: ChosenPath, model: str) -> None:
    if difference <= limit:
        return
    if path.kinds == {"plain"}:
        raise RuntimeError(f"{model} differs from its path by {difference:.1e}: nothing is usable")
    raise UserError(
        f"{model} does not compute what the path does (difference {difference:.1e}), since it runs through "
        f"{', '.join(sorted(path.kinds))} units (backbone.unit_blocks): give --names mmdet or mmseg, or another --size."
    )


@torch.no_grad()
def _torchvision(path: ChosenPath, written: Mapping[str, Tensor], size: Size, loaded: Loading) -> Loading | None:
    """torchvision's own model of this architecture without its classifier, or None where it has none.

    It returns pooled features: only ResNets pool the map as it is, and can be compared; for others ``loaded``, that of
    timm's model with the same numbers, has to do.
    """
    import torchvision

    own = path.timm_model.split(".")[0]
    name = _TORCHVISION.get(own, own)
    if name not in torchvision.models.list_models():
        return None
    model = torchvision.models.get_model(name, weights=None)
    head = next(head for head in ("fc", "heads", "head", "classifier[-1]") if hasattr(model, head.split("[")[0]))
    if head == "classifier[-1]":
        model.classifier[-1] = nn.Identity()
    else:
        setattr(model, head, nn.Identity())
    try:
        model.load_state_dict(dict(written), strict=True)
    except RuntimeError:  # another number of layers or channels (backbone.options)
        return None
    compared, difference = loaded.compared, loaded.difference
    if head == "fc":
        images = probe(size)
        pooled = path(images)[-1].mean((2, 3))
        difference = relative_difference(pooled, model.eval()(images))
        compared = f"torchvision's {name}"
        _require(difference, LARGEST_DIFFERENCE_ELSEWHERE, path, compared)
    code = f"""import torch, torchvision
from safetensors.torch import load_file

model = torchvision.models.get_model("{name}", weights=None)
model.{head} = torch.nn.Identity()
model.load_state_dict(load_file("model.safetensors"), strict=True)"""
    return Loading(code, compared, difference, {"torchvision_model": name}, "The model returns pooled features.")


@torch.no_grad()
def _openmm(path: ChosenPath, library: Library, written: Mapping[str, Tensor], size: Size) -> Loading | None:
    """The library's own backbone, or None where it has none that gives the path's maps."""
    prefix = names.PREFIXES[library]
    state = {name.removeprefix(prefix): value for name, value in written.items()}
    plain = PlainPath(path.timm_model, path.timm_options, path.state(), lambda _: state, lambda x: list(path(x)))
    usable = [index for index, stride in enumerate(path.strides) if stride >= 4]
    try:
        found = find_backbone(library, plain, usable)
        model = _build(library, found)
        model.load_state_dict(state, strict=True)
    except (UserError, RuntimeError):
        return None
    images = probe(size)
    pairs = zip(model(images), (path(images)[index] for index in usable), strict=True)
    difference = max(relative_difference(ours, theirs) for theirs, ours in pairs)
    compared = f"{library}'s {found.config['type']}"
    _require(difference, LARGEST_DIFFERENCE_ELSEWHERE, path, compared)
    code = f"""import {library}.models
from {library}.registry import MODELS
from safetensors.torch import load_file

model = MODELS.build({_literal(found.config)})
state = {{name.removeprefix("{prefix}"): value for name, value in load_file("model.safetensors").items()}}
model.load_state_dict(state, strict=True)"""
    return Loading(code, compared, difference, {f"{library}_backbone": found.config}, names.REMARKS[library])


def _build(library: Library, backbone: Backbone) -> Any:
    if backbone.imports:
        raise UserError(f"{library} runs timm's own model here")
    with scope(library):
        from mmengine.registry import MODELS

        model = MODELS.build(backbone.config)
    model.train(False)  # not eval(): the train() of some backbones returns nothing
    return model


def _literal(value: Any) -> str:
    return pformat(value, width=100, sort_dicts=False)
