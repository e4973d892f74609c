"""Genuine DeepSpeed checkpoints of a tiny model, with what they have to give; run on every rank.

For each configuration: the checkpoint itself, ``NAME.masters.safetensors`` (the fp32 weights that the live engine
steps) and, where DeepSpeed's own ``zero_to_fp32`` can read the checkpoint, ``NAME.oracle.safetensors`` (its answer).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor, nn

torch.set_num_threads(1)


class Net(nn.Module):
    """With a frozen layer, persistent and other buffers, a parameter of odd size, a scalar and tied weights."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(7, 5)
        self.frozen = nn.Linear(5, 3).requires_grad_(False)
        self.odd = nn.Parameter(torch.randn(11))
        self.scalar = nn.Parameter(torch.tensor([0.3]))
        self.last = nn.Linear(5, 7)
        self.tied = nn.Linear(7, 5)
        self.tied.weight = self.first.weight
        self.register_buffer("mask", torch.tensor([True, False, True]))
        self.register_buffer("scale", torch.rand(5))
        self.register_buffer("count", torch.tensor(3))
        self.register_buffer("temporary", torch.ones(2), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x) * self.scale.to(x.dtype) * self.scalar
        return self.frozen(y).sum() + self.odd.sum() ** 2 + self.last(y).square().mean() + self.tied(x).square().mean()


class Wide(nn.Sequential):
    """24 MB of weights."""

    def __init__(self) -> None:
        super().__init__(*(nn.Linear(1024, 1024) for _ in range(6)))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).square().mean()


def masters(engine: Any) -> dict[str, Tensor]:
    """The live fp32 weights of what is trained; a collective call."""
    from deepspeed.utils import safe_get_full_fp32_param

    names = {id(p): name for name, p in engine.module.named_parameters()}
    if engine.zero_optimization_stage():
        named = [(names[id(p)], safe_get_full_fp32_param(p)) for p in engine.module.parameters() if p.requires_grad]
    elif hasattr(engine.optimizer, "fp32_groups"):
        pairs = zip(engine.optimizer.fp16_groups, engine.optimizer.fp32_groups, strict=True)
        named = [(names[id(p)], m) for low, high in pairs for p, m in zip(low, high, strict=True)]
    else:
        named = [(name, p) for name, p in engine.module.named_parameters() if p.requires_grad]
    return {name: value.detach().cpu().clone() for name, value in named}


def oracle(folder: Path) -> dict[str, Tensor] | None:
    """What DeepSpeed's own script makes of a checkpoint, in fp32; None where it cannot read it."""
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    try:
        state = get_fp32_state_dict_from_zero_checkpoint(str(folder))
    except (TypeError, ValueError, FileNotFoundError):
        return None
    return {name: t.float().clone() if t.is_floating_point() else t.clone() for name, t in state.items()}


def run(folder: Path, name: str, settings: dict[str, Any]) -> None:
    import deepspeed

    torch.manual_seed(0)
    model = Wide() if name.startswith("wide") else Net()
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() > 1]},
        {"params": [p for p in trained if p.dim() <= 1], "weight_decay": 0.0},
    ]
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "steps_per_print": 2**31 - 1,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        **settings,
    }
    wide = isinstance(model, Wide)
    optimizer = torch.optim.SGD(groups, lr=0.01) if wide else torch.optim.AdamW(groups, lr=0.01)
    engine = deepspeed.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=False)[0]
    for step in range(2):
        generator = torch.Generator().manual_seed(10 * step + dist.get_rank())
        images = torch.randn(4, 1024 if wide else 7, generator=generator).to(next(model.parameters()).dtype)
        engine.backward(engine(images))
        engine.step()
    engine.save_checkpoint(str(folder / name), client_state={"epoch": 2})
    live = masters(engine)
    dist.barrier()
    if dist.get_rank() == 0:
        save_file(live, folder / f"{name}.masters.safetensors")
        answer = oracle(folder / name)
        if answer is not None:
            save_file(answer, folder / f"{name}.oracle.safetensors")
    dist.barrier()


def main() -> None:
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("gloo", verbose=False)
    for name, settings in json.loads(sys.argv[2]).items():
        run(Path(sys.argv[1]), name, settings)
    if dist.get_rank() == 0:
        # Of DeepSpeed's own fp16 mode, which needs a GPU.
        from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler

        scaler = DynamicLossScaler(2.0**16, 2.0, 1000, 1.0, 1)
        torch.save({"optimizer_state_dict": {"loss_scaler": scaler}}, Path(sys.argv[1]) / "scaler.pt")


if __name__ == "__main__":
    main()
