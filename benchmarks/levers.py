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
from backbones import MODELS, Step

from gppf_ds.backbone import convnext, resnet
from gppf_ds.backbone.controller import Controller
from gppf_ds.backbone.lego import LegoBackbone, Pass
from gppf_ds.backbone.lockstep import has_batch_norm
from gppf_ds.backbone.norm import NormPolicy
from gppf_ds.config import BackboneConfig
from gppf_ds.simt.job import start_distributed

PLAIN = {
    "channels last": "fp32",
    "bf16": "fp32",
    "bf16, channels last": "bf16",
    "compiled": "fp32",
    "bf16, compiled": "bf16",
    "fused": "AdamW",
}
"""Every lever and the arm without it."""


def arms(name: str, options: Mapping[str, Any], images: torch.Tensor) -> dict[str, Step]:
    """The steps of one model that are not compiled."""
    backbone = _backbone(name, options, images.device)
    found = {
        "fp32": _step(backbone, images, False, False),
        "bf16": _step(backbone, images, True, False),
        "AdamW": _optimizer(_backbone(name, options, images.device), False),
        "fused": _optimizer(_backbone(name, options, images.device), True),
    }
    if backbone.family is resnet.FAMILY or backbone.family is convnext.FAMILY:
        found["channels last"] = _step(backbone, images, False, True)
        found["bf16, channels last"] = _step(backbone, images, True, True)
    return found


def compiled_arms(name: str, options: Mapping[str, Any], images: torch.Tensor) -> tuple[dict[str, Step], list[str]]:
    """The steps whose units torch compiles, and the arms that its compiler fails at; none where batch norms part."""
    backbone = _backbone(name, options, images.device)
    units = [unit for layer in backbone.layers for unit in layer.units.values()]
    if any(map(has_batch_norm, units)):
        return {}, []
    torch._dynamo.config.recompile_limit = 1000  # the units share their code, and each counts
    for unit in units:
        unit.compile(dynamic=False)
    found, failed = {}, []
    for arm, bf16 in (("compiled", False), ("bf16, compiled", True)):
        step = _step(backbone, images, bf16, False)
        try:
            step(0)
        except RuntimeError as error:
            print(f"{name}, {arm}: {str(error).splitlines()[0]}", file=sys.stderr)
            failed.append(arm)
        else:
            found[arm] = step
    return found, failed


def _backbone(name: str, options: Mapping[str, Any], device: torch.device) -> LegoBackbone:
    return LegoBackbone(BackboneConfig(name=name, options=dict(options), units=1)).to(device).train()


def _step(backbone: LegoBackbone, images: torch.Tensor, bf16: bool, channels_last: bool) -> Step:
    """Forward and backward, a gradient coming back from every map as heads send it."""
    route = Controller(["task"], backbone.units).to(images.device).fixed_route("task")

    def run(number: int) -> None:
        backbone.channels_last = lambda kind: channels_last  # type: ignore[method-assign]
        with torch.autocast(images.device.type, torch.bfloat16, enabled=bf16):
            maps = backbone([Pass(images, route, (0, number, 0))], NormPolicy())[0]
        torch.stack([x.float().square().mean() for x in maps]).sum().backward()
        backbone.zero_grad()

    return run


def _optimizer(backbone: LegoBackbone, fused: bool) -> Step:
    """AdamW's step alone."""
    optimizer = torch.optim.AdamW(backbone.parameters(), lr=1e-6, fused=fused or None)
    for parameter in backbone.parameters():
        parameter.grad = torch.randn_like(parameter)
    return lambda number: optimizer.step()


def measure(name: str, options: Mapping[str, Any], images: torch.Tensor, warmup: int, steps: int) -> dict[str, Any]:
    """Milliseconds of every arm, the ratio of each lever, and what does not compile, of one model."""
    compiled, failed = compiled_arms(name, options, images)
    seconds = harness.interleaved({**arms(name, options, images), **compiled}, images.device, warmup, steps)
    ratios = {
        lever: harness.spread([a / b for a, b in zip(seconds[lever], seconds[plain], strict=True)])
        for lever, plain in PLAIN.items()
        if lever in seconds
    }
    milliseconds = {arm: 1000 * statistics.median(own) for arm, own in seconds.items()}
    return {"milliseconds": milliseconds, "ratios": ratios, "failed": failed}


def report(result: Mapping[str, Any]) -> str:
    """One line for each model and lever."""
    rows = [["model", "lever", "without it", "ms without it", "time with / without it: median (min - max)"]]
    for name, found in result.items():
        for lever, ratio in found["ratios"].items():
            shown = f"{ratio['median']:.3f} ({ratio['min']:.3f} - {ratio['max']:.3f})"
            rows.append([name, lever, PLAIN[lever], f"{found['milliseconds'][PLAIN[lever]]:.1f}", shown])
        rows += [
            [name, arm, PLAIN[arm], f"{found['milliseconds'][PLAIN[arm]]:.1f}", "fails"] for arm in found["failed"]
        ]
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
