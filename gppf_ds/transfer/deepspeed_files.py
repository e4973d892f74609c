"""The weights in a checkpoint that DeepSpeed wrote, of every ZeRO stage: mapped from disk, and no code of it runs.

What the files hold was read off DeepSpeed 0.19.8 (``engine.save_checkpoint``; its ``zero_to_fp32.py`` is the reference
that the tests compare with): ZeRO 1 and 2 cut each parameter group's flat fp32 vector into one part for every rank;
ZeRO 3 cuts every parameter by itself; without ZeRO there is the module, and fp32 masters without names beside it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gppf_ds.errors import UserError

MODEL, SHARD = "mp_rank_00_model_states.pt", "mp_rank_00_optim_states.pt"
"""The ends of the names of a rank's files."""
STAGE_2_GROUPS, STAGE_3_GROUPS = "single_partition_of_fp32_groups", "fp32_flat_groups"
"""The keys of a rank's fp32 masters: at ZeRO 1 and 2, and at ZeRO 3."""
HARMLESS = (
    "builtins.getattr",  # Python 3.11.0 to 3.11.3 pickle a member of an enumeration as getattr(class, name)
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.utils.tensor_fragment.fragment_address",
)
"""What DeepSpeed's own entries are pickled with. None of it is imported or called: see :class:`_Ignored`."""


@dataclass(frozen=True)
class PlainTensor:
    """One tensor of the output, as views of what holds it now."""

    shape: tuple[int, ...]
    pieces: Sequence[Tensor]
    """Flat and of one dtype; put together they are the tensor."""
    buffer: bool = False

    @classmethod
    def whole(cls, tensor: Tensor, buffer: bool = False) -> PlainTensor:
        return cls(tuple(tensor.shape), [tensor.detach().reshape(-1)], buffer)

    @property
    def dtype(self) -> torch.dtype:
        return self.pieces[0].dtype if self.pieces else torch.float32


class _Ignored:
    """Stands in for what is harmless and not needed for the conversion; takes any state and keeps nothing."""

    def __init__(self, *arguments: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


def read(folder: Path) -> dict[str, PlainTensor]:
    """Every parameter and buffer of the module, by its name there.

    Parameters come as fp32 masters; what has none (frozen parameters, buffers) comes as it was saved.

    Args:
        folder: of one tag: the ``*_model_states.pt`` and ``*_optim_states.pt`` of all ranks.

    Raises:
        UserError: a file is missing, damaged or holds code, or the weights are cut in another way than by ZeRO.
    """
    try:
        return _tensors(folder)
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise UserError(
            f"{folder} is not laid out as DeepSpeed 0.19 lays out its checkpoints ({type(error).__name__}: {error}): "
            "use another, or convert it with the zero_to_fp32.py that lies beside it."
        ) from error


def _tensors(folder: Path) -> dict[str, PlainTensor]:
    _refuse_other_parallelism(folder)
    shards = _shards(folder)
    partitioned = bool(shards) and STAGE_3_GROUPS in shards[0]
    names = [f"zero_pp_rank_{rank}_{MODEL}" for rank in range(len(shards))] if partitioned else [MODEL]
    states = [_load(folder / name) for name in names]
    state = states[0]
    module = state["module"]
    tensors = {name: PlainTensor.whole(module[name], buffer=True) for name in state["buffer_names"] if name in module}
    if partitioned:
        tensors.update(_stage_3(states, [shard[STAGE_3_GROUPS] for shard in shards], folder))
    elif shards:
        tensors.update(_stages_1_and_2(state["param_shapes"], shards, folder))
    else:
        tensors.update(_stage_0(module, state.get("optimizer")))
    for alias, name in (state.get("shared_params") or {}).items():
        if name in tensors:
            tensors.setdefault(alias, tensors[name])
    if not partitioned:  # at stage 3 the module's tensors are empty placeholders
        for name, value in module.items():
            if isinstance(value, Tensor):
                tensors.setdefault(name, PlainTensor.whole(value))
    return {name: tensors[name] for name in module if name in tensors} | tensors


def _stages_1_and_2(
    groups: Sequence[Mapping[str, torch.Size]], shards: Sequence[Mapping[str, Any]], folder: Path
) -> Iterator[tuple[str, PlainTensor]]:
    """The ranks' parts of a group, one after another, hold its parameters one after another."""
    paddings = shards[0].get("param_alignment_paddings")
    for index, shapes in enumerate(groups):
        parts = [shard[STAGE_2_GROUPS][index] for shard in shards]
        offset = 0
        for position, (name, shape) in enumerate(shapes.items()):
            yield name, PlainTensor(tuple(shape), _cut(parts, offset, math.prod(shape), folder))
            offset += math.prod(shape) + (paddings[index][position] if paddings else 0)
        # DeepSpeed pads a group to a multiple of twice the ranks and cuts some of that off again before it saves.
        _require_used(offset, sum(part.numel() for part in parts), 2 * len(parts), folder)


def _stage_3(
    states: Sequence[Mapping[str, Any]], groups: Sequence[Sequence[Tensor]], folder: Path
) -> Iterator[tuple[str, PlainTensor]]:
    """Every rank holds an equal part of every parameter, the last one padded."""
    offset = 0
    for shapes in states[0]["param_shapes"]:
        for name, shape in shapes.items():
            share = math.ceil(math.prod(shape) / len(groups))
            ranks = [_cut(parts, offset, share, folder) for parts in groups]
            yield name, _trimmed(shape, [piece for pieces in ranks for piece in pieces], folder)
            offset += share
    _require_used(offset, sum(part.numel() for part in groups[0]), 1, folder)
    for name, shape in (states[0].get("frozen_param_shapes") or {}).items():
        pieces = [state["frozen_param_fragments"][name].reshape(-1) for state in states]
        yield name, _trimmed(shape, pieces, folder)


def _stage_0(module: Mapping[str, Any], optimizer: Mapping[str, Any] | None) -> Iterator[tuple[str, PlainTensor]]:
    """The fp32 masters of 16-bit weights. They have no names: a weight's master is what rounds to it exactly."""
    groups = (optimizer or {}).get("fp32_groups", [])
    masters = [master for group in groups for master in group]
    for name, value in module.items():
        if isinstance(value, Tensor) and value.dtype in (torch.bfloat16, torch.float16):
            for master in masters:
                if master.shape == value.shape and torch.equal(master.to(value.dtype), value):
                    yield name, PlainTensor.whole(master)
                    break


def _cut(parts: Sequence[Tensor], start: int, length: int, folder: Path) -> list[Tensor]:
    """Views of ``length`` values from ``start`` on, of flat tensors put together."""
    pieces = []
    for part in parts:
        if length and start < part.numel():
            pieces.append(part[start : start + length])
            length -= pieces[-1].numel()
            start = 0
        else:
            start -= min(start, part.numel())
    if length:
        raise UserError(f"{folder} is damaged: its files hold fewer values than its parameters have. Use another.")
    return pieces


def _trimmed(shape: torch.Size, pieces: Sequence[Tensor], folder: Path) -> PlainTensor:
    """Without the padding after the last value."""
    return PlainTensor(tuple(shape), _cut(pieces, 0, math.prod(shape), folder))


def _require_used(used: int, available: int, alignment: int, folder: Path) -> None:
    if math.ceil(used / alignment) != math.ceil(available / alignment):
        raise UserError(
            f"{folder} is damaged: its parameters have {used} values and its files hold {available}. Use another."
        )


def _shards(folder: Path) -> list[dict[str, Any]]:
    """The optimizer state of every rank, in order; empty for a checkpoint without ZeRO."""
    found = sorted(folder.glob(f"*{SHARD}"))
    if not found:
        partitioned = any(folder.glob(f"zero_pp_rank_*_{MODEL}"))
        if partitioned or _load(folder / MODEL).get("param_shapes") is not None:
            raise UserError(f"{folder}/*zero_pp_rank_0_{SHARD} is missing: the checkpoint is incomplete, use another.")
        return []
    count = _load(found[0])["optimizer_state_dict"]["partition_count"]
    ranks = max(count) if isinstance(count, list) else int(count)
    prefix = found[0].name.partition("zero_pp_rank_")[0]  # bf16_, or nothing
    files = [folder / f"{prefix}zero_pp_rank_{rank}_{SHARD}" for rank in range(ranks)]
    shards = [_load(file)["optimizer_state_dict"] for file in files]
    for file in found:
        if file not in files:
            raise UserError(f"{file} does not belong to this checkpoint of {ranks} ranks: remove it, or use another.")
    return shards


def _refuse_other_parallelism(folder: Path) -> None:
    for pattern in ("layer_*", "expp_rank_*", "mp_rank_01_*", "*_mp_rank_01_*"):
        for file in folder.glob(pattern):
            raise UserError(
                f"{file} belongs to a pipeline-, expert- or tensor-parallel checkpoint: only ZeRO's are converted here."
            )


def _load(file: Path) -> dict[str, Any]:
    """What a file of ``torch.save`` holds, its tensors mapped from disk."""
    if not file.is_file():
        raise UserError(f"{file} is missing: the checkpoint is incomplete, use another.")
    try:
        with torch.serialization.safe_globals([(_Ignored, name) for name in HARMLESS]):
            unknown = torch.serialization.get_unsafe_globals_in_checkpoint(file)
            state = None if unknown else torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # whatever a damaged file makes the unpickler raise
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"{file} cannot be read as a file of torch.save ({reason}): use another checkpoint.") from error
    if unknown:
        raise UserError(
            f"{file} holds {', '.join(sorted(unknown))}, which could run code and is not loaded: save the checkpoint "
            "again with plain values only (see client_state and lr_scheduler)."
        )
    if not isinstance(state, dict) or not {"module", "optimizer_state_dict"} & state.keys():
        raise UserError(f"{file} is no file of a DeepSpeed checkpoint: give the folder that save_checkpoint wrote.")
    if state.get("ds_autoep_layers") or state.get("autoep_layers"):
        raise UserError(f"{file} belongs to an expert-parallel checkpoint: only ZeRO's are converted here.")
    return state
