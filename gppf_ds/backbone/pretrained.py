"""Starting a lego backbone from a plain checkpoint: every unit gets the weights, all but the first with a little noise.

Units that start equal would get proportional gradients and could part ways only through the controllers' noise, so
every unit but the first is moved by a small relative noise (a choice of ours, the paper is silent). Token-level experts
are made of the dense layers' weights (:mod:`gppf_ds.backbone.moe.upcycle`), and those that hold the same get the noise.
"""

from __future__ import annotations

import pickle
import sys
import zipfile
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.serialization import safe_globals

from gppf_ds.backbone.lego import LegoBackbone, LegoLayer
from gppf_ds.backbone.moe.upcycle import NEW, Upcycled, dense_names, upcycled
from gppf_ds.backbone.names import REMARKS, State, recognise
from gppf_ds.errors import UserError
from gppf_ds.seeding import INIT, generator

_WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model", "module")
"""Where training programs keep the weights in what they save; averaged ones first, as timm's loader has it."""


@dataclass
class Report:
    """What of a checkpoint went into a backbone; ``str()`` is for people."""

    source: str
    convention: str
    """Whose names the checkpoint uses."""
    prefix: str
    """In front of them."""
    noise: float
    """Standard deviation of the noise of units 1 and up, and of experts that hold what another one holds, relative to
    that of each tensor."""
    loaded: list[str] = field(default_factory=list)
    """timm's names of the tensors that every unit took."""
    resized: dict[str, str] = field(default_factory=dict)
    """Those among them that timm adapted to another grid, window or patch size, with both shapes."""
    upcycled: dict[str, str] = field(default_factory=dict)
    """Those among them that token-level experts made of dense weights, and what each is."""
    missing: dict[str, str] = field(default_factory=dict)
    """timm's names of the tensors that stayed as they were initialised, and why."""
    unused: dict[str, str] = field(default_factory=dict)
    """The checkpoint's names of tensors that went nowhere, and why."""

    def __str__(self) -> str:
        total = len(self.loaded) + len(self.missing)
        place = f" behind {self.prefix!r}" if self.prefix else ""
        noisy = "experts that repeat others" if self.upcycled else "all units but the first"
        lines = [
            f"{self.source} (names of {self.convention}{place}): {len(self.loaded)} of {total} tensors loaded, "
            f"relative noise {self.noise:g} on {noisy}"
        ]
        for title in ("resized", "upcycled", "missing", "unused"):
            lines += [f"  {title}: {line}" for line in _by_reason(getattr(self, title))]
        if self.convention in REMARKS:
            lines.append(f"  {REMARKS[self.convention]}")
        return "\n".join(lines)


def load_pretrained(backbone: LegoBackbone, source: str, noise: float, seed: int) -> Report:
    """Copies a plain checkpoint into every unit of every layer, and makes token-level experts of it.

    Unit 0 gets the very values. Parameters of the other units become ``value + noise * std(value) * N(0, 1)``, drawn
    for (seed, layer, unit, name) alone, so that every rank has the same bits; buffers get no noise.

    Args:
        backbone: not yet given to an engine; changed in place.
        source: a file (see :func:`read_checkpoint`), with names that :func:`gppf_ds.backbone.names.recognise` knows; or
            ``timm`` for the weights that timm has for the backbone's model, ``timm:TAG`` for those of another tag.
        noise: relative standard deviation, at least 0.
        seed: of the run.

    Returns:
        What was loaded and what was not. Tensors of another shape are not, and no error.

    Raises:
        UserError: the source cannot be read, or nothing in it fits.
    """
    kind, _, tag = source.partition(":")
    state = _from_timm(backbone.config.name, tag) if kind == "timm" else read_checkpoint(source)
    layers: Any = backbone.layers
    wanted = list(dict.fromkeys([*(name for name, *_ in _places(backbone)), *dense_names(layers)]))
    reading = recognise(state, wanted)
    if reading is None:
        raise UserError(
            f"{source} has no tensor of {backbone.config.name}: it holds {_some(state)}; wanted are {_some(wanted)}. "
            "Name a checkpoint of this model (timm, torchvision, mmdet, mmseg, mmpretrain or detectron2)."
        )
    report = Report(source, reading.convention, reading.prefix, noise)
    values = _adapt(reading.read(state), backbone, report)
    moe = backbone.config.moe
    experts = upcycled(values, layers, moe) if moe else Upcycled()
    report.upcycled = experts.how
    _copy(values | experts.values, backbone, seed, report, experts.copies)
    report.unused = {key: reading.why_unused(key) for key in state if key not in set(reading.names.values())}
    if not report.loaded:
        raise UserError(
            f"{source} has no tensor of the right shape for {backbone.config.name} "
            f"({_some([f'{name}: {why}' for name, why in report.missing.items()])}). "
            "Name a checkpoint of this model and these backbone.options."
        )
    return report


def read_checkpoint(source: str) -> State:
    """The tensors of a checkpoint file, out of what training programs wrap them in. Nothing in it is executed.

    Args:
        source: a safetensors file, or one of ``torch.save`` (mmengine's with their records of the training, too).

    Returns:
        By the file's names, on the CPU, mapped from the file where its format allows.

    Raises:
        UserError: there is no such file, it is damaged, holds no tensors or would have to be unpickled.
    """
    path = Path(source)
    if not path.is_file():
        raise UserError(f"{source}: there is no such file. Name a checkpoint, or 'timm' for timm's pretrained weights.")
    content = _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)
    while isinstance(content, Mapping):
        inner = next((content[key] for key in _WRAPPERS if isinstance(content.get(key), Mapping)), None)
        if inner is None:
            break
        content = inner
    tensors = {k: v for k, v in content.items() if isinstance(v, Tensor)} if isinstance(content, Mapping) else {}
    if not tensors:
        raise UserError(f"{source} holds no tensors by name: save the model's state_dict() and name that file.")
    return tensors


def _read_safetensors(path: Path) -> Any:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is not a readable safetensors file ({error}): copy it again.") from error


class _Ignored:
    """Stands in for objects of a checkpoint that nobody needs, so that their own classes never come to life."""

    def __new__(cls, *_args: Any, **_kwargs: Any) -> _Ignored:
        return super().__new__(cls)

    def __init__(self, *_args: Any, **_kwargs: Any) -> None:
        pass

    def __setstate__(self, _state: Any) -> None:
        pass


_RECORDS = [
    "mmengine.logging.history_buffer.HistoryBuffer",
    "builtins.getattr",
    "numpy.dtype",
    "numpy.ndarray",
    *(f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("_reconstruct", "scalar")),
]
"""What mmengine keeps of the course of a training."""


def _read_torch(path: Path) -> Any:
    try:
        with safe_globals([(_Ignored, name) for name in _RECORDS]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path) or None)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path} is damaged or holds Python objects beside tensors, which are not unpickled: they could run code. "
            "If you trust it, make a plain file: torch.save(torch.load(FILE, weights_only=False)['state_dict'], NEW)."
        ) from error
    except Exception as error:  # a damaged file can fail in any way
        raise UserError(f"{path} is damaged or no checkpoint ({type(error).__name__}): copy it again.") from error


def _from_timm(name: str, tag: str) -> State:
    if tag:
        name = f"{name.split('.')[0]}.{tag}"
    try:
        return timm.create_model(name, pretrained=True).state_dict()
    except Exception as error:  # whatever stands between here and the hub
        reason = str(error).strip().split("\n")[0]
        raise UserError(
            f"timm could not load its pretrained weights for {name} ({type(error).__name__}: {reason}). "
            "Without a network, put them into its cache (HF_HOME) or name a file; timm.list_pretrained() has the tags."
        ) from error


def _places(backbone: LegoBackbone) -> Iterator[tuple[str, int, int, Tensor]]:
    """(timm's name, layer, unit, tensor) of everything in a backbone's units that a checkpoint would hold."""
    for layer in backbone.layers:
        assert isinstance(layer, LegoLayer)
        for unit, module in layer.units.items():
            for own, tensor in module.state_dict(keep_vars=True).items():
                yield layer.timm_name(own), layer.index, int(unit), tensor


def _adapt(values: State, backbone: LegoBackbone, report: Report) -> State:
    """As timm itself adapts position embeddings, relative position tables and patch embeddings of another size."""
    with torch.device("meta"):
        model = timm.create_model(backbone.config.name, pretrained=False, **backbone.timm_options)
    adapt = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    if adapt is None:
        return values
    try:
        adapted: State = adapt(values, model)
    except (RuntimeError, ValueError, AssertionError, KeyError):
        return values  # a model of another width: the comparison of shapes will tell
    changed = {name for name in adapted if adapted[name].shape != values[name].shape}
    report.resized = {name: f"{_shape(values[name])} -> {_shape(adapted[name])}" for name in changed}
    return adapted


@torch.no_grad()
def _copy(values: State, backbone: LegoBackbone, seed: int, report: Report, repeated: Collection[str]) -> None:
    loaded = {}
    for name, layer, unit, tensor in _places(backbone):
        value = values.get(name)
        if value is None:
            # Batch norm's counter has no use where there is a momentum, and some libraries do not keep it.
            if not name.endswith("num_batches_tracked"):
                new = ".routers." in name or ".task_embeddings." in name
                report.missing[name] = NEW if new else "not in the checkpoint"
        elif value.shape != tensor.shape:
            report.missing[name] = f"{_shape(value)} in the checkpoint, {_shape(tensor)} in the backbone"
        else:
            noisy = (unit > 0 or name in repeated) and isinstance(tensor, nn.Parameter)
            tensor.copy_(moved(value, report.noise, seed, layer, unit, name) if noisy else value)
            loaded[name] = True
    report.loaded = [name for name in loaded if name not in report.missing]


def moved(value: Tensor, noise: float, seed: int, *key: int | str) -> Tensor:
    """value + noise * std(value) * N(0, 1): the same bits for the same seed and key."""
    # numpy in double precision: the number of torch's threads must not decide the last bit.
    exact = value.double().numpy()
    draws = generator(seed, INIT, "pretrained", *key).standard_normal(exact.shape)
    return torch.from_numpy(exact + noise * exact.std() * draws)


def _shape(tensor: Tensor) -> str:
    return str(tuple(tensor.shape))


def _some(entries: Collection[Any]) -> str:
    return ", ".join(str(entry) for entry in list(entries)[:3])


def _by_reason(entries: Mapping[str, str]) -> Iterator[str]:
    """A line for each reason with its first names, at most five."""
    groups: dict[str, list[str]] = {}
    for name, reason in entries.items():
        groups.setdefault(reason, []).append(name)
    for reason, names in list(groups.items())[:5]:
        more = ", ..." if len(names) > 3 else ""
        yield f"{len(names)} ({reason}): {_some(names)}{more}"
    if len(groups) > 5:
        yield f"{sum(len(names) for names in list(groups.values())[5:])} more"
