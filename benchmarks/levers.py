"""What would make a step faster on this hardware: 16 bits, another memory layout, a compiler, a fused optimizer?

All arms live in one process and take turns, step by step; a ratio is that of two neighbouring steps. A step is forward
and backward of a static lego backbone in training on one batch of random images, or what its optimizer does afterwards.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Mapping
from typing import Any

import harness
import torch
from backbones import MODELS, Bench, Step

from gppf_ds.backbone.lockstep import has_batch_norm
from gppf_ds.simt.job import start_distributed

PLAIN = {"channels last": "fp32", "bf16": "fp32", "bf16, channels last": "fp32", "compiled": "fp32", "fused": "AdamW"}
"""Every lever and the arm without it."""


def arms(name: str, options: Mapping[str, Any], images: torch.Tensor) -> dict[str, Step]:
    """The steps of one model; those whose blocks part at batch norms are not compiled."""
    found: dict[str, Step] = {}
    for layout, memory_format in (("", torch.contiguous_format), ("channels last", torch.channels_last)):
        bench = Bench(name, options, images.contiguous(memory_format=memory_format))
        found[layout or "fp32"] = bench.lego(1, "fixed")[1]
        found[f"bf16, {layout}" if layout else "bf16"] = _with_16_bits(bench.lego(1, "fixed")[1], images.device.type)
    bench = Bench(name, options, images)
    backbone, step = bench.lego(1, "fixed")
    units = [unit for layer in backbone.layers for unit in layer.units.values()]
    if not any(map(has_batch_norm, units)):
        for unit in units:
            unit.compile()
        found["compiled"] = step
    return found | {"AdamW": _optimizer(bench, False), "fused": _optimizer(bench, True)}


def _with_16_bits(step: Step, kind: str) -> Step:
    def run(number: int) -> None:
        with torch.autocast(kind, torch.bfloat16):
            step(number)

    return run


def _optimizer(bench: Bench, fused: bool) -> Step:
    """AdamW's step alone."""
    backbone, _ = bench.lego(1, "fixed")
    optimizer = torch.optim.AdamW(backbone.parameters(), lr=1e-6, fused=fused or None)
    for parameter in backbone.parameters():
        parameter.grad = torch.randn_like(parameter)
    return lambda number: optimizer.step()


def measure(name: str, options: Mapping[str, Any], images: torch.Tensor, warmup: int, steps: int) -> dict[str, Any]:
    """Milliseconds of every arm, and the ratio of each lever, of one model."""
    seconds = harness.interleaved(arms(name, options, images), images.device, warmup, steps)
    ratios = {
        lever: harness.spread([a / b for a, b in zip(seconds[lever], seconds[plain], strict=True)])
        for lever, plain in PLAIN.items()
        if lever in seconds
    }
    return {"milliseconds": {arm: 1000 * statistics.median(own) for arm, own in seconds.items()}, "ratios": ratios}


def report(result: Mapping[str, Any]) -> str:
    """One line for each model and lever."""
    rows = [["model", "lever", "without it", "ms without it", "time with / without it: median (min - max)"]]
    for name, found in result.items():
        for lever, ratio in found["ratios"].items():
            shown = f"{ratio['median']:.3f} ({ratio['min']:.3f} - {ratio['max']:.3f})"
            rows.append([name, lever, PLAIN[lever], f"{found['milliseconds'][PLAIN[lever]]:.1f}", shown])
    return harness.table(rows)


def main() -> None:
    """Measures, prints the table and writes the json."""
    args, settings = harness.arguments_of_models(__doc__, list(MODELS), steps=20, warmup=3, batch_size=4)
    harness.restart_with_steady_malloc()
    device = start_distributed(600.0)
    result = {}
    for name in args.models:
        images = torch.randn(args.batch_size, 3, args.image_size, args.image_size, device=device)
        result[name] = measure(name, {} if args.full else MODELS[name], images, args.warmup, args.steps)
        print(json.dumps({name: result[name]["milliseconds"]}), file=sys.stderr)
    print(report(result))
    harness.save("levers", settings, result, args.results)


if __name__ == "__main__":
    main()
