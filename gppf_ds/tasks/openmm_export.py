"""A path and its head as a full mmdet detector or mmseg segmentor: a configuration and a checkpoint.

The head is the library's own model already, so all that changes is what stands in the place of the backbone: one of the
library's own, or mmseg's wrapper of timm. Where neither gives the path's maps (a ViT behind its feature pyramid, Swin
units that do not pad first) it is a class of this package. Only then does the configuration need gppf_ds installed, and
says so in its first line.
"""

from __future__ import annotations

import importlib
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gppf_ds.errors import UserError
from gppf_ds.tasks.openmm import Library, leaf_dataset, scope
from gppf_ds.tasks.openmm_task import OpenMMHead
from gppf_ds.tasks.pyramid import PyramidHead, SimpleFeaturePyramid
from gppf_ds.tasks.task import Head, PlainPath

LARGEST_DIFFERENCE = 1e-5
"""Between the maps of the library's backbone and those of the path, relative to the largest value."""

_PROBE_SIZE = (96, 160)

_NEEDS_GPPF_DS = "# Needs gppf_ds installed: no backbone of {library}, nor mmseg's wrapper of timm, gives its maps.\n"

_KEPT = (
    *("model", "default_scope", "custom_imports", "custom_hooks", "default_hooks", "env_cfg", "randomness"),
    *("log_level", "log_processor", "visualizer", "tta_model", "tta_pipeline"),
    *("val_dataloader", "val_evaluator", "val_cfg", "test_dataloader", "test_evaluator", "test_cfg", "test_pipeline"),
)
_KEPT_FOR_TRAINING = ("train_dataloader", "train_cfg", "optim_wrapper", "param_scheduler", "auto_scale_lr")

_DEPTHS: dict[tuple[bool, tuple[int, ...]], int] = {
    (False, (2, 2, 2, 2)): 18,
    (False, (3, 4, 6, 3)): 34,
    (True, (3, 4, 6, 3)): 50,
    (True, (3, 4, 23, 3)): 101,
    (True, (3, 8, 36, 3)): 152,
}
"""mmdet's and mmseg's ResNets by (bottleneck, blocks per stage)."""


@dataclass(frozen=True)
class Backbone:
    """A backbone as the library builds it, and what it loads."""

    config: dict[str, Any]
    state: Mapping[str, Tensor]
    imports: tuple[str, ...] = ()
    """Modules that a configuration has to import for it."""
    own: bool = False
    """Whether its class is one of this package."""


def export(library: Library, cfg: dict[str, Any], head: Head, path: PlainPath, folder: Path) -> list[Path]:
    """Writes ``config.py`` and ``checkpoint.pth``, with which the library's own tools test and predict.

    They also train where the configuration says how (``train_cfg`` and ``optim_wrapper``).

    Args:
        library: the head's.
        cfg: the task's configuration, as plain values; it evaluates on ``test_dataloader``, else on ``val_dataloader``.
        head: as the task built it, trained, with the pyramid in front of it if there is one.
        path: the backbone.
        folder: where to write; exists.

    Returns:
        The two files.

    Raises:
        UserError: no backbone gives the path's maps.
    """
    pyramid = head.pyramid if isinstance(head, PyramidHead) else None
    head = head.head if isinstance(head, PyramidHead) else head
    assert isinstance(head, OpenMMHead)
    files = [folder / "config.py", folder / "checkpoint.pth"]
    with scope(library):
        from mmengine.config import Config
        from mmengine.registry import MODELS

        backbone = find_backbone(library, path, head.maps, pyramid)
        config = _complete(library, cfg, head, backbone)
        Config(config).dump(files[0])
        if backbone.own:
            files[0].write_text(_NEEDS_GPPF_DS.format(library=library) + files[0].read_text())
        heads = {name: value for name, value in head.model.state_dict().items() if not name.startswith("backbone.")}
        state = {f"backbone.{name}": value for name, value in backbone.state.items()} | heads
        state = {name: value.cpu().clone() for name, value in state.items()}
        torch.save({"state_dict": state, "meta": {"dataset_meta": _dataset_meta(config)}}, files[1])
        model = MODELS.build(Config.fromfile(str(files[0])).model)
        model.load_state_dict(torch.load(files[1], weights_only=True)["state_dict"], strict=True)
    return files


def find_backbone(
    library: Library, path: PlainPath, maps: Sequence[int], pyramid: SimpleFeaturePyramid | None = None
) -> Backbone:
    """The first backbone that gives the maps of the path: the library's own, mmseg's wrapper of timm, then the path's.

    Args:
        library: the library.
        path: the backbone.
        maps: indices of the maps that the head takes, of those of the pyramid if there is one.
        pyramid: what stands between the path's only map and the head.

    Raises:
        UserError: none does; the sentence says why.
    """
    reasons = []
    candidates = [] if pyramid else [*_library_backbones(library, path, maps)]
    for candidate in [*candidates, *_own_backbone(path, maps, pyramid)]:
        kind = candidate.config["type"]
        try:
            backbone, difference = _load(library, candidate, path, maps, pyramid)
        except (AssertionError, LookupError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
            reasons.append(f"{kind}: {str(error).splitlines()[0]}")
            continue
        if difference <= LARGEST_DIFFERENCE:
            return backbone
        reasons.append(f"{kind}: its maps differ by {difference:.0e} of the largest value")
    raise UserError(
        f"{path.timm_model} leaves as backbone only (export without --head): no backbone for {library} gives its maps "
        f"({'; '.join(reasons)})."
    )


def _library_backbones(library: Library, path: PlainPath, maps: Sequence[int]) -> Iterator[Backbone]:
    # The map of a ResNet's stem, index 0 here, is none of the library's.
    for arguments, first in ((_resnet(path.state), 1), (_swin(path.state), 0)):
        if arguments is not None:
            try:
                state = path.renamed(library)
            except UserError:  # it has parts that the library's own class lacks
                continue
            yield Backbone({**arguments, "out_indices": [i - first for i in maps]}, state)
    wrapper = {
        "type": "mmseg.TIMMBackbone",
        "model_name": path.timm_model,
        "pretrained": False,
        "feature_cls": "getter",  # maps as (B, C, H, W) for every family
        "out_indices": list(maps),
        **{key: value for key, value in path.timm_options.items() if key != "num_classes"},
    }
    state = {f"timm_model.model.{name}": value for name, value in path.state.items()}
    yield Backbone(wrapper, state, imports=("mmseg.models",))


def _own_backbone(path: PlainPath, maps: Sequence[int], pyramid: SimpleFeaturePyramid | None) -> Iterator[Backbone]:
    if path.fallback is None:
        return
    config, state = {**path.fallback.config, "out_indices": list(maps)}, dict(path.fallback.state)
    if pyramid is not None:
        config["pyramid"] = list(pyramid.features.strides)
        state |= {f"pyramid.{name}": value for name, value in pyramid.state_dict().items()}
    yield Backbone(config, state, own=True)


def _resnet(state: Mapping[str, Tensor]) -> dict[str, Any] | None:
    """The arguments of the library's ResNet, or None where it has none of this depth."""
    blocks = _per_stage(r"layer(\d+)\.(\d+)\.conv1\.weight", state)
    depth = _DEPTHS.get(("layer1.0.conv3.weight" in state, blocks))
    if depth is None:
        return None
    deformable = [f"layer{stage}.0.conv2.conv_offset.weight" in state for stage in range(1, 5)]
    return {
        "type": "ResNetV1d" if "conv1.0.weight" in state else "ResNet",
        "depth": depth,
        "stem_channels": state["bn1.weight"].numel(),
        "base_channels": state["layer1.0.conv1.weight"].shape[0],
        "norm_eval": False,
        **({"dcn": {"type": "DCNv2", "deform_groups": 1}, "stage_with_dcn": deformable} if any(deformable) else {}),
    }


def _swin(state: Mapping[str, Tensor]) -> dict[str, Any] | None:
    """The arguments of the library's Swin transformer (v1), or None."""
    tables = [f"layers.{stage}.blocks.0.attn.relative_position_bias_table" for stage in range(4)]
    if not state.keys() >= set(tables):
        return None
    mlp = state["layers.0.blocks.0.mlp.fc1.weight"]
    return {
        "type": "SwinTransformer",
        "embed_dims": mlp.shape[1],
        "patch_size": state["patch_embed.proj.weight"].shape[-1],
        "window_size": (math.isqrt(state[tables[0]].shape[0]) + 1) // 2,
        "mlp_ratio": mlp.shape[0] // mlp.shape[1],
        "depths": _per_stage(r"layers\.(\d+)\.blocks\.(\d+)\.norm1\.weight", state),
        "num_heads": [state[table].shape[1] for table in tables],
    }


def _per_stage(pattern: str, state: Mapping[str, Tensor]) -> tuple[int, ...]:
    """How many blocks every stage has, from names that hold the numbers of stage and block."""
    stages = [int(found[1]) for found in map(re.compile(pattern).fullmatch, state) if found]
    return tuple(stages.count(stage) for stage in sorted(set(stages)))


@torch.no_grad()
def _load(
    library: Library, candidate: Backbone, path: PlainPath, maps: Sequence[int], pyramid: SimpleFeaturePyramid | None
) -> tuple[Backbone, float]:
    """The backbone with its whole state, and the largest difference of its maps relative to their largest value.

    What it has no use for in the path's state is left out, a norm behind the last map for example: the maps tell
    whether that is right.
    """
    for module in candidate.imports:
        importlib.import_module(module)
    from mmengine.registry import MODELS

    with scope(library):
        backbone = MODELS.build(candidate.config)
    backbone.train(False)  # not eval(): the train() of some backbones returns nothing
    for name, _ in backbone.named_parameters():
        if name not in candidate.state:
            raise LookupError(f"the path has no weights for its {name}")
    wanted = backbone.state_dict().keys()
    backbone.load_state_dict({name: value for name, value in candidate.state.items() if name in wanted}, strict=False)
    images = torch.randn(1, 3, *_PROBE_SIZE, generator=torch.Generator().manual_seed(0))
    ours = path.maps(images) if pyramid is None else pyramid(*path.maps(images))
    pairs = list(zip(backbone(images), (ours[i] for i in maps), strict=True))
    worst = max(float((theirs - own).abs().max() / own.abs().max().clamp_min(1e-12)) for theirs, own in pairs)
    return replace(candidate, state=backbone.state_dict()), worst


def _complete(library: Library, cfg: dict[str, Any], head: OpenMMHead, backbone: Backbone) -> dict[str, Any]:
    """The configuration with the backbone in it and all that the library's tools ask for."""
    cfg = without_own_transforms(cfg) | {"default_scope": library}
    preprocessor = cfg["model"]["data_preprocessor"]
    cfg["model"] = head.config.to_dict() | {"backbone": backbone.config, "data_preprocessor": preprocessor}
    if backbone.imports:
        imports = cfg.get("custom_imports") or {"imports": [], "allow_failed_imports": False}
        cfg["custom_imports"] = {**imports, "imports": [*_as_list(imports["imports"]), *backbone.imports]}
    if "test_dataloader" not in cfg:
        cfg["test_dataloader"], cfg["test_evaluator"] = cfg["val_dataloader"], cfg["val_evaluator"]
    for split, loop in (("val", "ValLoop"), ("test", "TestLoop")):
        cfg[f"{split}_cfg"] = cfg.get(f"{split}_cfg") or {"type": loop}
        loader = cfg[f"{split}_dataloader"]
        cfg[f"{split}_dataloader"] = {"sampler": {"type": "DefaultSampler", "shuffle": False}, **loader}
    cfg["test_pipeline"] = leaf_dataset(cfg["test_dataloader"]["dataset"])["pipeline"]
    trains = all(key in cfg for key in ("train_cfg", "optim_wrapper"))
    return {key: cfg[key] for key in (*_KEPT, *(_KEPT_FOR_TRAINING if trains else ())) if key in cfg}


def without_own_transforms(node: Any) -> Any:
    """A copy of a configuration without the transforms that are classes of this package."""
    if isinstance(node, dict):
        return {key: without_own_transforms(value) for key, value in node.items()}
    if isinstance(node, list | tuple):
        return type(node)(without_own_transforms(child) for child in node if not _is_own(child))
    return node


def _is_own(node: Any) -> bool:
    kind = node.get("type") if isinstance(node, dict) else None
    return isinstance(kind, type) and kind.__module__.split(".")[0] == __name__.split(".")[0]


def _dataset_meta(config: dict[str, Any]) -> dict[str, Any]:
    """Class names and colours as the library's data set gives them; nothing is read."""
    from mmengine.registry import DATASETS

    leaf = leaf_dataset(config["val_dataloader"]["dataset"])
    meta = DATASETS.build({**leaf, "lazy_init": True}).metainfo
    return {key: meta[key] for key in ("classes", "palette") if meta.get(key)}


def _as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]
