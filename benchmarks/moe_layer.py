"""What does a mixture-of-experts layer cost, next to the dense one at equal active FLOPs and to ``deepspeed.moe``?

All arms live in one process and take turns, step by step; a ratio is that of two neighbouring steps. A step is forward
and backward of one layer on one batch of random tokens, through what it hands to a balancing loss too.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import harness
import torch
from deepspeed.moe.layer import MoE
from timm.layers import Mlp
from timm.models.vision_transformer import Attention
from torch import Tensor, nn

from gppf_ds.backbone.moe.attention import MoeAttention
from gppf_ds.backbone.moe.call import Call
from gppf_ds.backbone.moe.mlp import MlpExpert, MoeMlp
from gppf_ds.simt.job import start_distributed

TASK = "task"

COMPARISONS = {
    "MoE-MLP / dense MLP": ("MoE-MLP", "dense MLP"),
    "MoE-MLP / deepspeed.moe, dropless": ("MoE-MLP", "deepspeed.moe, dropless"),
    "MoE-MLP / deepspeed.moe, capacity 1": ("MoE-MLP", "deepspeed.moe, capacity 1"),
    "MoE-attention / dense attention": ("MoE-attention", "dense attention"),
}
"""What is compared: the throughput of the first over that of the second arm."""


def aim(comparison: str, device: torch.device) -> float:
    """The least that the median of a comparison should be."""
    return 1.0 if "deepspeed" in comparison else 0.8 if device.type == "cuda" else 0.6


@dataclass
class Bench:
    """The arms."""

    width: int
    heads: int
    experts: int
    top_k: int
    images: Tensor
    """(B, N, C): the tokens of every image."""

    def __post_init__(self) -> None:
        self.mlp, self.attention = self._mlp(), self._attention()
        self.dropless, self.capacity = self._deepspeed(drop=False), self._deepspeed(drop=True)
        for layer in (self.mlp, self.attention, self.dropless, self.capacity):
            layer.to(self.images.device).train()

    def difference(self) -> float:
        """The largest difference between our output and that of ``deepspeed.moe``, which drops no token either."""
        with torch.no_grad():
            return float((self.mlp(self.images, Call(TASK)) - self.dropless(self.images)[0]).abs().max())

    def arms(self) -> dict[str, Callable[[int], None]]:
        """A step of each arm."""

        def routed(layer: nn.Module) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
            def forward(x: Tensor) -> tuple[Tensor, Tensor]:
                call = Call(TASK)
                return layer(x, call), call.statistics[0]

            return forward

        def dense(layer: nn.Module) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
            return lambda x: (layer(x), x.new_zeros(1))

        layers: dict[str, tuple[nn.Module, Any]] = {
            "dense MLP": (Mlp(self.width, 4 * self.width), dense),
            "MoE-MLP": (self.mlp, routed),
            "deepspeed.moe, dropless": (self.dropless, lambda layer: lambda x: layer(x)[:2]),
            "deepspeed.moe, capacity 1": (self.capacity, lambda layer: lambda x: layer(x)[:2]),
            "dense attention": (Attention(self.width, self.heads, qkv_bias=True), dense),
            "MoE-attention": (self.attention, routed),
        }
        return {name: self._step(layer.to(self.images.device), kind(layer)) for name, (layer, kind) in layers.items()}

    def _mlp(self) -> MoeMlp:
        ids = range(self.experts)
        return MoeMlp(self.width, 4 * self.width // self.top_k, ids, {TASK: ids}, {TASK: self.top_k})

    def _attention(self) -> MoeAttention:
        ids = range(2 * self.heads)
        return MoeAttention(self.width, 2 * self.width // self.heads, ids, {TASK: ids}, {TASK: self.heads})

    def _deepspeed(self, drop: bool) -> MoE:
        """The same experts and the same router; it renormalises gates over the chosen k, as ours does by default."""
        expert = MlpExpert(self.width, 4 * self.width // self.top_k)
        layer = MoE(self.width, expert, self.experts, k=self.top_k, drop_tokens=drop)
        layer.set_deepspeed_parallelism()
        layer.deepspeed_moe.gate.wg.load_state_dict({"weight": self.mlp.routers[TASK].weight})
        for theirs, ours in zip(layer.deepspeed_moe.experts.deepspeed_experts, self.mlp.experts.values(), strict=True):
            theirs.load_state_dict(ours.state_dict())
        return layer

    def _step(self, layer: nn.Module, forward: Callable[[Tensor], tuple[Tensor, Tensor]]) -> Callable[[int], None]:
        x = self.images.clone().requires_grad_()
        kind = x.device.type

        def step(number: int) -> None:
            with torch.autocast(kind, torch.bfloat16, enabled=kind == "cuda"):
                y, balance = forward(x)
            (y.float().square().mean() + balance.float().square().mean()).backward()
            x.grad = None
            layer.zero_grad()

        return step


def measure(bench: Bench, warmup: int, steps: int) -> dict[str, Any]:
    """Milliseconds of every arm and the ratios of throughput."""
    seconds = harness.interleaved(bench.arms(), bench.images.device, warmup, steps)
    ratios = {
        comparison: harness.spread([b / a for a, b in zip(seconds[one], seconds[other], strict=True)])
        for comparison, (one, other) in COMPARISONS.items()
    }
    return {
        "milliseconds": {name: 1000 * statistics.median(values) for name, values in seconds.items()},
        "ratios": ratios,
        "difference": bench.difference(),
    }


def report(result: dict[str, Any], device: torch.device) -> str:
    """One line for each arm, and one for each comparison."""
    times = [["arm", "step, ms"], *([name, f"{ms:.2f}"] for name, ms in result["milliseconds"].items())]
    rows = [["comparison", "throughput ratio: median (min - max)", "aim", ""]]
    for comparison, ratio in result["ratios"].items():
        least = aim(comparison, device)
        shown = f"{ratio['median']:.3f} ({ratio['min']:.3f} - {ratio['max']:.3f})"
        rows.append([comparison, shown, f">= {least:.2f}", "met" if ratio["median"] >= least else "not met"])
    difference = f"largest difference between MoE-MLP and deepspeed.moe, dropless: {result['difference']:.1e}"
    return f"{harness.table(times)}\n\n{harness.table(rows)}\n\n{difference}"


def main() -> None:
    """Measures, prints the tables and writes the json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=384, help="C (default: %(default)s)")
    parser.add_argument("--heads", type=int, default=6, help="of dense attention, twice as many experts (%(default)s)")
    parser.add_argument("--experts", type=int, default=16, help="of the MLPs (default: %(default)s)")
    parser.add_argument("--top-k", type=int, default=4, help="experts of every token (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=8, help="images (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=197, help="of every image (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=20, help="measured steps of every arm (default: %(default)s)")
    parser.add_argument("--warmup", type=int, default=3, help="steps before them (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of a CPU (default: %(default)s)")
    parser.add_argument("--results", type=Path, default=harness.RESULTS, help="folder for the json")
    args = parser.parse_args()
    if min(args.steps, args.batch_size, args.threads) < 1:
        sys.exit("--steps, --batch-size and --threads start at 1")
    harness.restart_with_steady_malloc()
    device = start_distributed(600.0)
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    images = torch.randn(args.batch_size, args.tokens, args.width, device=device)
    result = measure(Bench(args.width, args.heads, args.experts, args.top_k, images), args.warmup, args.steps)
    print(report(result, device))
    settings = {key: value for key, value in vars(args).items() if key != "results"}
    harness.save("moe_layer", {**settings, "ranks": 1}, result, args.results)


if __name__ == "__main__":
    main()
