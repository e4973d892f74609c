"""Conversion: a checkpoint of any ZeRO stage as one plain safetensors file, written piece by piece.

Checkpoints stay on disk: their files are mapped, and memory never holds more than one tensor.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from gppf_ds.errors import UserError
from gppf_ds.train.checkpoint import CheckpointReader, complete
from gppf_ds.train.restore import BUFFER, CONTROLLER
from gppf_ds.transfer import deepspeed_files
from gppf_ds.transfer.deepspeed_files import PlainTensor

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""What floating-point tensors can be written as."""
CODES = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""The names of dtypes in safetensors."""
CHUNK = 1 << 22
"""Values that are cast at once."""


@dataclass(frozen=True)
class Summary:
    """What was written."""

    tensors: int
    parameters: int
    """Values of parameters; shared parameters count once, buffers do not."""
    bytes: int
    rounded: int
    """Parameters' tensors that the checkpoint holds in 16 bits only, such as frozen ones."""


def convert(checkpoint: Path, output: Path, dtype: str = "fp32", overwrite: bool = False) -> Summary:
    """Writes one safetensors file with the parameters and buffers of a checkpoint, under the module's names.

    Args:
        checkpoint: a folder that DeepSpeed's ``save_checkpoint`` wrote (with ``latest``) or one tag in it; or a run of
            ours, or one of its ``checkpoints/step-N``. Ours adds the controllers' logits, as ``controller.TASK``.
        output: the file; it appears when it is complete.
        dtype: of floating-point tensors: fp32 (the master weights as they are), bf16 or fp16.
        overwrite: whether ``output`` may exist.

    Raises:
        UserError: the checkpoint is incomplete, damaged or of another kind, or ``output`` cannot be written.
    """
    if output.is_dir():
        raise UserError(f"{output} is a folder: name the file to write.")
    if output.exists() and not overwrite:
        raise UserError(f"{output} exists already: choose another name for the file, or replace it with --overwrite.")
    tensors = _read(checkpoint)
    size = _write(output, tensors, DTYPES[dtype])
    parameters = {t.pieces[0].data_ptr(): t for t in tensors.values() if t.pieces and not t.buffer}.values()
    return Summary(
        tensors=len(tensors),
        parameters=sum(math.prod(tensor.shape) for tensor in parameters),
        bytes=size,
        rounded=sum(tensor.dtype in (torch.bfloat16, torch.float16) for tensor in parameters),
    )


def _read(folder: Path) -> dict[str, PlainTensor]:
    """Tells by what lies in a folder whose checkpoint it is."""
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder: give the folder of a checkpoint.")
    if (folder / "latest").is_file():
        tag = folder / (folder / "latest").read_text().strip()
        if not tag.is_dir():
            raise UserError(f"{folder / 'latest'} names {tag}, which is missing: give the folder of another tag.")
        return deepspeed_files.read(tag)
    if any(folder.glob("*_states.pt")):
        return deepspeed_files.read(folder)
    if (folder / "config.yaml").is_file():
        steps = complete(folder / "checkpoints")
        if not steps:
            raise UserError(f"{folder} has no complete checkpoint: train it first.")
        return _ours(steps[-1])
    if (folder / "manifest.json").is_file() or any(folder.glob("rank-*.safetensors")):
        return _ours(folder)
    tags = sorted({path.parent.name for path in folder.glob("*/*_states.pt")})
    remedy = f"give the folder of one of its tags ({', '.join(tags)})" if tags else "give another folder"
    raise UserError(
        f"{folder} holds no checkpoint, neither DeepSpeed's (there is no file 'latest' and no *_states.pt) nor one of "
        f"ours (no config.yaml, no manifest.json): {remedy}."
    )


def _ours(step: Path) -> dict[str, PlainTensor]:
    """The whole network, from slices that stay in their files until they are written."""
    reader = CheckpointReader(step)
    parameters = {name: PlainTensor(shape, reader.parts(name)) for name, shape in sorted(reader.shapes.items())}
    buffers = {
        key.removeprefix(BUFFER): PlainTensor.whole(tensor, buffer=True)
        for key, tensor in sorted(reader.shared.items())
        if key.startswith(BUFFER)
    }
    rows = {key: PlainTensor.whole(t) for key, t in sorted(reader.shared.items()) if key.startswith(CONTROLLER)}
    return parameters | buffers | rows


def _write(output: Path, tensors: Mapping[str, PlainTensor], dtype: torch.dtype) -> int:
    """Writes the safetensors format and returns the file's size.

    The format is the header's length (8 bytes, little endian), the header as json, and the tensors' bytes without gaps.
    """
    targets = {name: dtype if t.dtype.is_floating_point else t.dtype for name, t in tensors.items()}
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    # The widest values first: a reader maps tensors in place, where each has to start at a multiple of its item size.
    names = sorted(tensors, key=lambda name: -targets[name].itemsize)
    end = 0
    for name in names:
        if targets[name] not in CODES:
            raise UserError(f"{name} has values of {targets[name]}, which safetensors cannot hold: remove that buffer.")
        start, end = end, end + math.prod(tensors[name].shape) * targets[name].itemsize
        header[name] = {
            "dtype": CODES[targets[name]],
            "shape": list(tensors[name].shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    size = 8 + len(text) + end
    building = output.parent / f".{output.name}.incomplete"
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with building.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, size)  # so that a full disk shows now
            file.write(struct.pack("<Q", len(text)) + text)
            for name in names:
                for piece in tensors[name].pieces:
                    for chunk in piece.split(CHUNK):
                        file.write(chunk.to(targets[name]).contiguous().view(torch.uint8).numpy().data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(building, output)
    except OSError as error:
        raise UserError(f"cannot write {output} ({size / 1e6:.1f} MB): {error.strerror}.") from error
    finally:
        building.unlink(missing_ok=True)
    return size
