"""What do lego layers cost, next to a static network and next to timm's own model?

All arms live in one process and take turns, step by step; a ratio is that of two neighbouring steps. A step is forward
and backward of the backbone in training (evaluation: forward alone) on one batch of random images.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import harness
import timm
import torch
from torch import Tensor, nn

from gppf_ds.backbone.controller import Controller, Route
from gppf_ds.backbone.lego import LegoBackbone, Pass
from gppf_ds.backbone.norm import NormPolicy
from gppf_ds.config import BackboneConfig
from gppf_ds.simt.job import start_distributed
from gppf_ds.transfer.extract import ChosenPath

MODELS: dict[str, dict[str, Any]] = {
    "resnet50": {"layers": [1, 2, 2, 1], "channels": [32, 64, 96, 128]},
    "swin_tiny_patch4_window7_224": {"embed_dim": 48, "depths": [1, 1, 2, 1], "num_heads": [2, 4, 8, 16]},
    "vit_tiny_patch16_224": {"depth": 4},
}
"""Narrow ones, for a CPU; ``--full`` takes the models as timm has them."""

AIMS = {
    "soft N=2 / static": (0.0, 2 * 1.03),
    "soft N=3 / static": (0.0, 3 * 1.03),
    "hard N=2 / static": (0.0, 1.1),
    "sparse N=3 / static": (0.0, 1.02),
    "exported path / timm, training": (0.97, 1.03),
    "exported path / timm, evaluation": (0.97, 1.03),
}
"""The comparisons, and where the median ratio of step times is to lie."""

MEBI = 2**20

Step = Callable[[int], None]
"""Given its number."""

Routing = Literal["soft", "hard", "fixed"]
"""As in a run; ``fixed`` where there is nothing to choose."""


@dataclass
class Bench:
    """The arms of one model."""

    name: str
    options: Mapping[str, Any]
    images: Tensor

    def lego(self, units: int, routing: Routing, checkpoint: bool = False) -> tuple[LegoBackbone, Step]:
        """A lego backbone in training, and its step."""
        backbone = LegoBackbone(self._config(units, checkpoint))
        return backbone, self._step(backbone, Controller(["task"], backbone.units), routing)

    def sparse_phase(self) -> Step:
        """A step after the controllers have settled, of three units per layer: two tasks in turn along their paths.

        The first task takes unit 0 everywhere, the second 0, 1, 2, 0, ...: each layer has lost one or two units.
        """
        settled = Controller(["first", "second"], self.lego(3, "fixed")[0].units)
        for layer, logits in enumerate(settled.logits["second"].data):
            logits[layer % 3] = 1.0
        return self._step(LegoBackbone(self._config(3), kept=settled.units_on_paths()), settled, "fixed")

    def _config(self, units: int, checkpoint: bool = False) -> BackboneConfig:
        return BackboneConfig(name=self.name, options=dict(self.options), units=units, checkpoint=checkpoint)

    def _step(self, backbone: LegoBackbone, controller: Controller, routing: Routing) -> Step:
        """Forward and backward of one device, the controller's tasks taking turns."""
        backbone.to(self.images.device).train()
        controller.to(self.images.device)
        tasks = list(controller.logits)

        def route(task: str, number: int) -> Route:
            if routing == "fixed":
                return controller.fixed_route(task)
            chosen = controller.hard_route if routing == "hard" else controller.soft_route
            return chosen(task, controller.noise(0, number, 0), 1.0)

        def step(number: int) -> None:
            passing = Pass(self.images, route(tasks[number % len(tasks)], number), (0, number, 0))
            _backward(backbone([passing], NormPolicy())[0][-1], backbone, controller)

        return step

    def timm_steps(self) -> dict[str, Step]:
        """timm's own model, and another of the same class that an exported path was loaded into."""
        backbone, _ = self.lego(2, "soft")
        state = ChosenPath(backbone, [number % 2 for number in range(len(backbone.layers))]).state()
        own, exported = (timm.create_model(self.name, **backbone.timm_options) for _ in range(2))
        exported.load_state_dict(state, strict=True)
        steps = {}
        for arm, model in {"timm": own, "exported path": exported}.items():
            for mode in ("training", "evaluation"):
                steps[f"{arm}, {mode}"] = _plain_step(model.to(self.images.device), self.images, mode == "training")
        return steps

    def memory(self, checkpoint: bool) -> int:
        """Bytes that a training step holds for backward (GPU: its peak), soft, N = 2."""
        backbone, step = self.lego(2, "soft", checkpoint)
        if self.images.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            step(0)
            return torch.cuda.max_memory_allocated() - before
        saved = harness.SavedActivations(backbone)
        with saved.counting():
            step(0)
        return saved.peak


def _plain_step(model: Any, images: Tensor, training: bool) -> Step:
    def step(number: int) -> None:
        model.train(training)
        with torch.set_grad_enabled(training):
            out = model.forward_features(images)
        if training:
            _backward(out, model)

    return step


def _backward(out: Tensor, *modules: nn.Module) -> None:
    out.float().square().mean().backward()
    for module in modules:
        module.zero_grad()


def measure(bench: Bench, warmup: int, steps: int) -> dict[str, Any]:
    """Times, their ratios, and the memory of activation checkpointing, of one model."""
    arms = {
        "static": bench.lego(1, "fixed")[1],
        "soft N=2": bench.lego(2, "soft")[1],
        "soft N=3": bench.lego(3, "soft")[1],
        "hard N=2": bench.lego(2, "hard")[1],
        "sparse N=3": bench.sparse_phase(),
        **bench.timm_steps(),
    }
    seconds = harness.interleaved(arms, bench.images.device, warmup, steps)
    pairs = {comparison: _pair(comparison) for comparison in AIMS}
    ratios = {
        comparison: harness.spread([a / b for a, b in zip(seconds[one], seconds[other], strict=True)])
        for comparison, (one, other) in pairs.items()
    }
    return {
        "milliseconds": {name: 1000 * statistics.median(values) for name, values in seconds.items()},
        "ratios": ratios,
        "memory": {"plain": bench.memory(False), "checkpoint": bench.memory(True)},
    }


def _pair(comparison: str) -> tuple[str, str]:
    """The two arms of a comparison."""
    arms, _, mode = comparison.partition(", ")
    one, other = arms.split(" / ")
    return (f"{one}, {mode}", f"{other}, {mode}") if mode else (one, other)


def report(result: Mapping[str, Any]) -> str:
    """One line for each model and comparison."""
    rows = [["model", "comparison", "time ratio: median (min - max)", "aim", ""]]
    for name, found in result.items():
        for comparison, ratio in found["ratios"].items():
            low, high = AIMS[comparison]
            met = "met" if low <= ratio["median"] <= high else "not met"
            aim = f"{low:.2f} - {high:.2f}" if low else f"<= {high:.2f}"
            shown = f"{ratio['median']:.3f} ({ratio['min']:.3f} - {ratio['max']:.3f})"
            rows.append([name, comparison, shown, aim, met])
    memory = [["model", "activations MiB", "checkpointed MiB", "ratio"]]
    for name, found in result.items():
        plain, kept = found["memory"]["plain"], found["memory"]["checkpoint"]
        memory.append([name, f"{plain / MEBI:.1f}", f"{kept / MEBI:.1f}", f"{kept / plain:.3f}"])
    return f"{harness.table(rows)}\n\n{harness.table(memory)}"


def main() -> None:
    """Measures, prints the tables and writes the json."""
    args, settings = harness.arguments_of_models(__doc__, list(MODELS), steps=20, warmup=3, batch_size=4)
    harness.restart_with_steady_malloc()
    device = start_distributed(600.0)
    result = {}
    for name in args.models:
        images = torch.randn(args.batch_size, 3, args.image_size, args.image_size, device=device)
        bench = Bench(name, {} if args.full else MODELS[name], images)
        result[name] = measure(bench, args.warmup, args.steps)
        print(json.dumps({name: result[name]["milliseconds"]}), file=sys.stderr)
    print(report(result))
    harness.save("backbones", settings, result, args.results)


if __name__ == "__main__":
    main()
