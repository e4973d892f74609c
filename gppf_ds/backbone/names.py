"""Parameter names of other libraries, from and to timm's.

timm's names are this package's own. The tables below say what other libraries call the same tensors; a few of them also
keep a tensor in another order, or keep tensors that timm computes. Nothing else changes: the numbers stay as they are,
so what a library does with the images before the model (channel order, mean, standard deviation) has to fit the
weights; :data:`REMARKS` says what to set.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import cache

import torch
from timm.models.swin_transformer import get_relative_position_index
from torch import Tensor

from gppf_ds.errors import UserError

State = dict[str, Tensor]

CONVENTIONS = ("timm", "torchvision", "mmdet", "mmseg", "mmpretrain", "detectron2")
"""Conventions that can be written. Read, besides: the names of the authors' own code, and torchvision's first ones."""

_MM = ("mmdet", "mmseg", "mmpretrain")
PREFIXES = {**dict.fromkeys(_MM, "backbone."), "detectron2": "backbone.bottom_up."}
"""Where a whole model of the library has its backbone (detectron2: below a feature pyramid)."""

REMARKS = {
    **dict.fromkeys(
        _MM,
        "ResNets are of style pytorch. Swin and ConvNeXt (which timm's does not) normalise every map: norm3 is timm's "
        "last norm, the others have weight 1 and bias 0. ViTs need final_norm=True, an eps of 1e-6 and, in mmseg, "
        "patch_bias=True.",
    ),
    "detectron2": "Images are RGB and bottlenecks have their stride in the 3x3 convolution: set INPUT.FORMAT to RGB, "
    "MODEL.RESNETS.STRIDE_IN_1X1 to False, PIXEL_MEAN and PIXEL_STD to the training's. (detectron2's own R-50 and "
    "R-101 are for BGR images and a stride in the 1x1 convolution: they load, but timm's model is another.)",
}
"""What to know about a convention beside the names."""

# A line holds timm's name and the other one (nothing where it is the same). {n} stands for a number, {2n+1} for one
# computed from it, * for any rest. The first line that fits counts.
_RESNET = """
conv1.weight
bn1.*
layer{n}.{b}.conv{c}.weight
layer{n}.{b}.bn{c}.*
layer{n}.{b}.downsample.0.weight
layer{n}.{b}.downsample.1.*
"""
_RESNET_MM = """
layer{n}.{b}.downsample.{i}.*
layer{n}.{b}.conv2.conv_offset.*
"""
_RESNET_DEEP_MM = """
conv1.{i}.*                        stem.{i}.*
bn1.*                              stem.7.*
layer{n}.{b}.conv{c}.weight
layer{n}.{b}.bn{c}.*
"""
_RESNET_DETECTRON2 = """
conv1.weight                       stem.conv1.weight
bn1.*                              stem.conv1.norm.*
layer{n}.{b}.conv2.conv_offset.*   res{n+1}.{b}.conv2_offset.*
layer{n}.{b}.conv{c}.weight        res{n+1}.{b}.conv{c}.weight
layer{n}.{b}.bn{c}.*               res{n+1}.{b}.conv{c}.norm.*
layer{n}.{b}.downsample.0.weight   res{n+1}.{b}.shortcut.weight
layer{n}.{b}.downsample.1.*        res{n+1}.{b}.shortcut.norm.*
"""
_SWIN_TORCHVISION = """
patch_embed.proj.*                 features.0.0.*
patch_embed.norm.*                 features.0.2.*
layers.{n}.downsample.*            features.{2n}.*
layers.{n}.blocks.{b}.mlp.fc1.*    features.{2n+1}.{b}.mlp.0.*
layers.{n}.blocks.{b}.mlp.fc2.*    features.{2n+1}.{b}.mlp.3.*
layers.{n}.blocks.{b}.*            features.{2n+1}.{b}.*
norm.*
head.fc.*                          head.*
"""
_SWIN_MM = """
patch_embed.proj.*                 patch_embed.projection.*
patch_embed.norm.*
layers.{n}.downsample.*            stages.{n-1}.downsample.*
layers.{n}.blocks.{b}.attn.*       stages.{n}.blocks.{b}.attn.w_msa.*
layers.{n}.blocks.{b}.norm{c}.*    stages.{n}.blocks.{b}.norm{c}.*
layers.{n}.blocks.{b}.mlp.fc1.*    stages.{n}.blocks.{b}.ffn.layers.0.0.*
layers.{n}.blocks.{b}.mlp.fc2.*    stages.{n}.blocks.{b}.ffn.layers.1.*
norm.*                             norm3.*
"""
_SWIN_DETECTRON2 = """
patch_embed.*
layers.{n}.downsample.*            layers.{n-1}.downsample.*
layers.{n}.blocks.*
norm.*                             norm3.*
"""
_VIT_TORCHVISION = """
cls_token                          class_token
pos_embed                          encoder.pos_embedding
patch_embed.proj.*                 conv_proj.*
blocks.{n}.norm{c}.*               encoder.layers.encoder_layer_{n}.ln_{c}.*
blocks.{n}.attn.qkv.weight         encoder.layers.encoder_layer_{n}.self_attention.in_proj_weight
blocks.{n}.attn.qkv.bias           encoder.layers.encoder_layer_{n}.self_attention.in_proj_bias
blocks.{n}.attn.proj.*             encoder.layers.encoder_layer_{n}.self_attention.out_proj.*
blocks.{n}.mlp.fc1.*               encoder.layers.encoder_layer_{n}.mlp.0.*
blocks.{n}.mlp.fc2.*               encoder.layers.encoder_layer_{n}.mlp.3.*
norm.*                             encoder.ln.*
head.*                             heads.head.*
"""
_VIT_MM = """
cls_token
pos_embed
patch_embed.proj.*                 patch_embed.projection.*
blocks.{n}.norm{c}.*               layers.{n}.ln{c}.*
blocks.{n}.mlp.fc1.*               layers.{n}.ffn.layers.0.0.*
blocks.{n}.mlp.fc2.*               layers.{n}.ffn.layers.1.*
norm.*                             ln1.*
"""
_VIT_MMSEG = """
norm_pre.*                         ln_pre.*
blocks.{n}.attn.qkv.weight         layers.{n}.attn.attn.in_proj_weight
blocks.{n}.attn.qkv.bias           layers.{n}.attn.attn.in_proj_bias
blocks.{n}.attn.proj.*             layers.{n}.attn.attn.out_proj.*
"""
_VIT_MMPRETRAIN = """
norm_pre.*                         pre_norm.*
blocks.{n}.attn.qkv.*              layers.{n}.attn.qkv.*
blocks.{n}.attn.proj.*             layers.{n}.attn.proj.*
blocks.{n}.ls1.gamma               layers.{n}.attn.gamma1.weight
blocks.{n}.ls2.gamma               layers.{n}.ffn.gamma2.weight
"""
_CONVNEXT_TORCHVISION = """
stem.{i}.*                         features.0.{i}.*
stages.{n}.downsample.{i}.*        features.{2n}.{i}.*
stages.{n}.blocks.{b}.gamma        features.{2n+1}.{b}.layer_scale
stages.{n}.blocks.{b}.conv_dw.*    features.{2n+1}.{b}.block.0.*
stages.{n}.blocks.{b}.norm.*       features.{2n+1}.{b}.block.2.*
stages.{n}.blocks.{b}.mlp.fc1.*    features.{2n+1}.{b}.block.3.*
stages.{n}.blocks.{b}.mlp.fc2.*    features.{2n+1}.{b}.block.5.*
head.norm.*                        classifier.0.*
head.fc.*                          classifier.2.*
"""
_CONVNEXT_MM = """
stem.{i}.*                         downsample_layers.0.{i}.*
stages.{n}.downsample.{i}.*        downsample_layers.{n}.{i}.*
stages.{n}.blocks.{b}.gamma        stages.{n}.{b}.gamma
stages.{n}.blocks.{b}.conv_dw.*    stages.{n}.{b}.depthwise_conv.*
stages.{n}.blocks.{b}.norm.*       stages.{n}.{b}.norm.*
stages.{n}.blocks.{b}.mlp.fc{c}.*  stages.{n}.{b}.pointwise_conv{c}.*
stages.{n}.blocks.{b}.mlp.grn.weight  stages.{n}.{b}.grn.gamma
stages.{n}.blocks.{b}.mlp.grn.bias  stages.{n}.{b}.grn.beta
head.norm.*                        norm3.*
"""

_OLD_TORCHVISION = "torchvision before 0.12"
_ORIGINAL = "the authors' code"

_TABLES: dict[str, dict[str, str]] = {
    "resnet": {
        "timm": "*",
        "torchvision": _RESNET + "fc.*",
        **dict.fromkeys(_MM, _RESNET + _RESNET_MM),
        "detectron2": _RESNET_DETECTRON2,
    },
    "resnet with a deep stem": {"timm": "*", **dict.fromkeys(_MM, _RESNET_DEEP_MM + _RESNET_MM)},
    "swin": {
        "timm": "*",
        "torchvision": _SWIN_TORCHVISION,
        **dict.fromkeys(_MM, _SWIN_MM),
        "detectron2": _SWIN_DETECTRON2,
        _ORIGINAL: _SWIN_DETECTRON2.replace("norm3", "norm"),
    },
    "vit": {
        "timm": "*",
        "torchvision": _VIT_TORCHVISION,
        "mmseg": _VIT_MM + _VIT_MMSEG,
        "mmpretrain": _VIT_MM + _VIT_MMPRETRAIN,
        _OLD_TORCHVISION: _VIT_TORCHVISION.replace("mlp.0.", "mlp.linear_1.").replace("mlp.3.", "mlp.linear_2."),
    },
    "convnext": {
        "timm": "*",
        "torchvision": _CONVNEXT_TORCHVISION,
        **dict.fromkeys(_MM, _CONVNEXT_MM),
        _ORIGINAL: _CONVNEXT_MM.replace("depthwise_", "dw").replace("pointwise_", "pw").replace("norm3", "norm"),
    },
}
_MARKS = {
    "conv1.weight": "resnet",
    "conv1.0.weight": "resnet with a deep stem",
    "layers.0.blocks.0.attn.relative_position_bias_table": "swin",
    "blocks.0.attn.qkv.weight": "vit",
    "stages.0.blocks.0.conv_dw.weight": "convnext",
}
"""A tensor that tells the family of a model."""


def _unfold_order(merged: Tensor) -> Tensor:
    """(.., 2 columns x 2 rows x C) as timm concatenates neighbours -> (.., C x 2 rows x 2 columns) as ``nn.Unfold``."""
    return merged.unflatten(-1, (2, 2, -1)).transpose(-3, -1).flatten(-3).contiguous()


def _concat_order(unfolded: Tensor) -> Tensor:
    return unfolded.unflatten(-1, (-1, 2, 2)).transpose(-3, -1).flatten(-3).contiguous()


def _identity(t: Tensor) -> Tensor:
    return t


_Change = Callable[[Tensor], Tensor]
_VALUES: dict[tuple[str, str], tuple[str, _Change, _Change]] = {
    **{("swin", mm): (r"layers\.\d+\.downsample\..*", _unfold_order, _concat_order) for mm in _MM},
    ("convnext", "torchvision"): (r".*\.gamma", lambda gamma: gamma[:, None, None], torch.flatten),
    ("convnext", _ORIGINAL): (r".*\.grn\..*", lambda grn: grn[None, None, None], torch.flatten),
}
"""Tensors (a pattern of timm's names) that a convention keeps in another order or shape: how to write and to read."""


def from_timm(state: Mapping[str, Tensor], convention: str) -> State:
    """A backbone's tensors under another library's names, as its own ``load_state_dict(strict=True)`` wants them.

    Args:
        state: by timm's names; the family is told from them. Not changed; the result may share memory with it.
        convention: one of :data:`CONVENTIONS`.

    Returns:
        The tensors under :data:`PREFIXES`, with those that the library keeps and timm does not: relative position
        indices, and norms of the intermediate output maps with weight 1 and bias 0.

    Raises:
        UserError: there is no such convention, or it has no place for some of the tensors.
    """
    if convention not in CONVENTIONS:
        raise UserError(f"there is no naming convention {convention!r}: choose one of {', '.join(CONVENTIONS)}.")
    if convention == "timm":
        return dict(state)
    family = _family(state)
    if convention not in _TABLES.get(family, {}):
        raise UserError(
            f"there are no {convention} names for this {family}: choose another convention, for example timm."
        )
    names = _renamed(state, family, convention)
    homeless = [name for name in state if name not in names]
    if homeless:
        some = ", ".join(homeless[:3])
        raise UserError(
            f"{convention} has no place for {len(homeless)} tensors of this {family} ({some}): "
            "choose another convention, for example timm."
        )
    renamed = {names[name]: _changes(name, family, convention)[0](value) for name, value in state.items()}
    renamed.update(_extras(state, family, convention))
    return {PREFIXES.get(convention, "") + name: value for name, value in renamed.items()}


_UNUSED = {
    r".*(relative_position_index|relative_coords_table|attn_mask)$": "timm computes it",
    r"norm\d\.": "a norm of an output map, which timm's model does not have",
    r"(fc|head|head_dist|heads|classifier|linear|pre_logits)\.": "a classification head",
}
"""Tensors inside a backbone that timm's model lacks (a pattern of their names): why."""


@dataclass(frozen=True)
class Reading:
    """How a checkpoint names the tensors that a backbone wants."""

    convention: str
    prefix: str
    """In front of the backbone's tensors."""
    names: Mapping[str, str]
    """timm's names -> those of the checkpoint, for what is in both."""
    family: str

    def read(self, state: Mapping[str, Tensor]) -> State:
        """The checkpoint's tensors by timm's names, in timm's order of values."""
        return {name: _changes(name, self.family, self.convention)[1](state[key]) for name, key in self.names.items()}

    def why_unused(self, key: str) -> str:
        """Why the backbone takes nothing from a tensor of the checkpoint."""
        own = key.removeprefix(self.prefix)
        if not key.startswith(self.prefix):
            return "outside the backbone"
        for pattern, reason in _UNUSED.items():
            if re.match(pattern, own):
                return reason
        return "the backbone has no such tensor"


def recognise(keys: Iterable[str], wanted: Collection[str]) -> Reading | None:
    """Finds the naming convention, and the prefix (``module.``, ``backbone.body.``, ...), of a checkpoint.

    Args:
        keys: the checkpoint's names.
        wanted: timm's names of the backbone's tensors.

    Returns:
        The reading that covers most of ``wanted``; the first of :data:`CONVENTIONS` where several do. None if nothing
        fits.
    """
    keys = set(keys)
    family = _family(wanted)
    scores: Counter[tuple[str, str]] = Counter()
    for convention in _TABLES.get(family, {"timm": "*"}):
        targets = set(_renamed(wanted, family, convention).values())
        for key in sorted(keys):
            starts = [0, *(dot.end() for dot in re.finditer(r"\.", key))]
            scores.update((convention, key[:start]) for start in starts if key[start:] in targets)
    if not scores:
        return None
    (convention, prefix), _ = scores.most_common(1)[0]
    names = {name: prefix + other for name, other in _renamed(wanted, family, convention).items()}
    return Reading(convention, prefix, {name: key for name, key in names.items() if key in keys}, family)


def to_timm(state: Mapping[str, Tensor], wanted: Collection[str]) -> State:
    """The inverse of :func:`from_timm`: the tensors called ``wanted`` of a checkpoint in any convention known here.

    Args:
        state: the checkpoint.
        wanted: timm's names.

    Returns:
        By timm's names; names that the checkpoint lacks are left out.
    """
    reading = recognise(state, wanted)
    return reading.read(state) if reading else {}


def _family(names: Collection[str]) -> str:
    return next((family for mark, family in _MARKS.items() if mark in names), "model")


def _renamed(names: Iterable[str], family: str, convention: str) -> dict[str, str]:
    """timm's names -> the convention's, without those that it has no place for."""
    rules = _rules(_TABLES.get(family, {"timm": "*"})[convention])
    found = {}
    for name in names:
        for pattern, template in rules:
            if match := pattern.fullmatch(name):
                found[name] = _fill(template, match.groupdict())
                break
    return found


@cache
def _rules(table: str) -> list[tuple[re.Pattern[str], str]]:
    rules = []
    for line in table.split("\n"):
        if not line:
            continue
        ours, _, theirs = line.partition(" ")
        pattern = re.sub(r"\\\{(\w)\\\}", r"(?P<\1>\\d+)", re.escape(ours)).replace(r"\*", "(?P<rest>.+)")
        rules.append((re.compile(pattern), theirs.strip() or ours))
    return rules


def _fill(template: str, found: Mapping[str, str]) -> str:
    def number(field: re.Match[str]) -> str:
        factor, variable, shift = field.groups()
        return str(int(factor or 1) * int(found[variable]) + int(shift or 0))

    return re.sub(r"\{(\d*)(\w)([+-]\d+)?\}", number, template).replace("*", found.get("rest", ""))


def _changes(name: str, family: str, convention: str) -> tuple[_Change, _Change]:
    """How to write and to read the values of a tensor."""
    pattern, write, read = _VALUES.get((family, convention), ("", _identity, _identity))
    return (write, read) if re.fullmatch(pattern, name) else (_identity, _identity)


def _extras(state: Mapping[str, Tensor], family: str, convention: str) -> State:
    """What the library keeps and timm does not."""
    extras = {}
    if family == "swin":
        tables = [name for name in state if name.endswith("relative_position_bias_table")]
        for name, other in _renamed(tables, family, convention).items():
            index = _window_index(name, len(state[name]))
            extras[other.replace("_bias_table", "_index")] = index.flatten() if convention == "torchvision" else index
    if family in ("swin", "convnext") and convention != "torchvision":
        stage = {"swin": "layers.{}.blocks.0.norm1.weight", "convnext": "stages.{}.blocks.0.norm.weight"}[family]
        for number in range(3):
            like = state[stage.format(number)]
            extras[f"norm{number}.weight"] = torch.ones_like(like)
            extras[f"norm{number}.bias"] = torch.zeros_like(like)
    return extras


def _window_index(name: str, entries: int) -> Tensor:
    """The (window^2, window^2) rows of a relative position table of a square window."""
    window = (round(entries**0.5) + 1) // 2
    if (2 * window - 1) ** 2 != entries:
        raise UserError(f"{name} is of a window that is not square, which only timm's names can express.")
    return get_relative_position_index(window, window)
