"""Where DeepSpeed's flat fp32 partitions hold the parameters of a model (its release 0.19)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from gppf_ds.simt.masked import Partition, Segment


def partitions(engine: Any, stage: int) -> list[Partition]:
    """This rank's flat tensors at ZeRO stage 1, 2 or 3, and what lies in them.

    Args:
        engine: of DeepSpeed.
        stage: of ZeRO.
    """
    return _of_stage_3(engine) if stage == 3 else _of_stages_1_and_2(engine)


def _of_stages_1_and_2(engine: Any) -> list[Partition]:
    """Where the parameters' parts lie in this rank's flat fp32 partitions."""
    names = {parameter: name for name, parameter in engine.module.named_parameters()}
    optimizer = engine.optimizer
    partitions = []
    for index, flat in enumerate(optimizer.single_partition_of_fp32_groups):
        segments = []
        for parameter in optimizer.bit16_groups[index]:
            mapping = parameter._hp_mapping
            if mapping is not None:
                inside, part = mapping.lp_fragment_address, mapping.hp_fragment_address
                segments.append(Segment(names[parameter], inside.start, part.start, part.numel))
        partitions.append(Partition(flat, index, segments))
    return partitions


def _of_stage_3(engine: Any) -> list[Partition]:
    """The same at stage 3, where every parameter is cut into equal parts, the last one padded."""
    names = {parameter: name for name, parameter in engine.module.named_parameters()}
    optimizer = engine.optimizer
    partitions = []
    for index, flat in enumerate(optimizer.fp32_partitioned_groups_flat):
        segments = []
        for parameter in optimizer.fp16_groups[index]:
            _, offset, part = optimizer.grad_position[optimizer.get_param_id(parameter)]
            start = dist.get_rank() * part
            length = min(part, parameter.ds_numel - start)
            if length > 0:
                segments.append(Segment(names[parameter], start, offset, length))
        partitions.append(Partition(flat, optimizer.sub_group_to_group_id[index], segments))
    return partitions


def own_parts(rank: int, parameters: Sequence[Any], _: torch.dtype) -> list[Tensor]:
    """Stage 3: the parts of the whole gradients that this rank steps."""
    sizes = [parameter.partition_numel() for parameter in parameters]
    return [p.grad.view(-1)[rank * size : (rank + 1) * size] for p, size in zip(parameters, sizes, strict=True)]
