"""Does fixed-path fine-tuning cost more than training timm's own model?

One process, in which the arms take turns, step by step; a ratio is that of two neighbouring steps. A step is a whole
one: forward, loss, backward and optimizer, on one batch of random images. On a CPU the arms have one thread, and time
is the CPU time of the process, which other jobs on the machine disturb little.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import harness
import timm
import torch
import torch.nn.functional as F
from backbones import MODELS
from torch import Tensor, nn

from gppf_ds.backbone.lego import LegoBackbone, Pass
from gppf_ds.config import BackboneConfig, EngineConfig, OptimizerConfig, RunConfig
from gppf_ds.simt.engine import SimtEngine
from gppf_ds.simt.job import start_distributed
from gppf_ds.simt.model import Job
from gppf_ds.simt.optimizer import learning_rate
from gppf_ds.tasks.classification import Classification
from gppf_ds.tasks.task import Batch
from gppf_ds.train.restore import build_model
from gppf_ds.transfer.extract import ChosenPath

TASK, CLASSES = "new", 100
AIM = 1.03
POOLING = {"vit_tiny_patch16_224": {"global_pool": "avg"}}
"""Options of timm's models that do not average the last map of themselves."""
AGREEMENT = 1e-4
"""Largest relative difference between the arms' first losses: they do the same."""


@dataclass
class Bench:
    """The arms of one model."""

    name: str
    options: Mapping[str, Any]
    batch: Batch

    @property
    def device(self) -> torch.device:
        """Of the batch."""
        return self.batch.images.device

    def config(self) -> RunConfig:
        """Of a fine-tuning run; all arms follow it."""
        return RunConfig(
            output="unused",
            steps=10**6,
            backbone=BackboneConfig(name=self.name, options=dict(self.options), units=2),
            optimizer=OptimizerConfig(name="adamw", learning_rate=1e-4),
            engine=EngineConfig(precision="fp32"),
        )

    def arms(self) -> dict[str, Callable[[int], float]]:
        """The step of each arm, which returns the loss; all start from the same weights."""
        config = self.config()
        task = Classification("unused", len(self.batch.images), classes=CLASSES)
        path = [number % 2 for number in range(_layers(config))]
        model, controller = build_model(config.backbone, {TASK: task}, 0, [[unit] for unit in path], paths_fixed=True)
        with torch.no_grad():
            for layer, unit in enumerate(path):
                controller.logits[TASK][layer, unit] = 1.0
        state = {name: value.clone() for name, value in ChosenPath(model.backbone, path).state().items()}
        linear: Any = model.heads.bank[TASK]
        options = {**model.backbone.timm_options, **POOLING.get(self.name, {}), "num_classes": CLASSES}
        plain = {
            arm: _loaded(timm.create_model(self.name, **options), state, linear.linear) for arm in ("timm", "again")
        }
        ours = SimtEngine(model, controller, config, self.device)
        return {"ours": self._ours(ours), **{arm: self._plain(net, config) for arm, net in plain.items()}}

    def _ours(self, engine: SimtEngine) -> Callable[[int], float]:
        def step(number: int) -> float:
            passing = Pass(self.batch.images, engine.route(TASK, number, 0), (0, number, 0))
            report = engine.step(number, [TASK], [[Job(0, TASK, self.batch, passing)]])
            return sum(report.losses[0].terms.values())

        return step

    def _plain(self, model: nn.Module, config: RunConfig) -> Callable[[int], float]:
        model.to(self.device).train()
        decayed = [p for p in model.parameters() if p.dim() > 1]
        others = [p for p in model.parameters() if p.dim() <= 1]
        settings = config.optimizer
        groups = [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": others, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, lr=settings.learning_rate, betas=settings.betas, eps=settings.epsilon)

        def step(number: int) -> float:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(number, config)
            optimizer.zero_grad()
            loss = F.cross_entropy(model(self.batch.images), self.batch.targets)
            loss.backward()
            optimizer.step()
            return float(loss.detach())

        return step


def _layers(config: RunConfig) -> int:
    return len(LegoBackbone(config.backbone).layers)


def _loaded(model: Any, state: Mapping[str, Tensor], linear: nn.Linear) -> nn.Module:
    """timm's classifier with the weights of a path and of a linear layer."""
    classifier = next(name for name, module in model.named_modules() if module is model.get_classifier())
    own = {f"{classifier}.weight": linear.weight, f"{classifier}.bias": linear.bias}
    model.load_state_dict({**state, **own}, strict=True)
    found: nn.Module = model
    return found


def measure(bench: Bench, warmup: int, steps: int) -> dict[str, Any]:
    """Times of every arm and their ratios to timm's."""
    arms = bench.arms()
    first = {arm: step(0) for arm, step in arms.items()}
    if abs(first["ours"] / first["timm"] - 1) > AGREEMENT:
        sys.exit(f"{bench.name}: the arms do not compute the same: {first}")
    timed: dict[str, Callable[[int], None]] = {arm: _silent(step) for arm, step in arms.items()}
    clock = time.perf_counter if bench.device.type == "cuda" else time.process_time
    seconds = harness.interleaved(timed, bench.device, warmup, steps, clock)
    ratios = {
        f"{arm} / timm": harness.spread([a / b for a, b in zip(seconds[arm], seconds["timm"], strict=True)])
        for arm in ("ours", "again")
    }
    return {
        "milliseconds": {arm: 1000 * statistics.median(values) for arm, values in seconds.items()},
        "ratios": ratios,
    }


def _silent(step: Callable[[int], float]) -> Callable[[int], None]:
    def run(number: int) -> None:
        step(number)

    return run


def report(result: Mapping[str, Any]) -> str:
    """One line for each model."""
    rows = [["model", "timm ms", "ours / timm: median (min - max)", f"aim <= {AIM}", "timm again / timm"]]
    for name, found in result.items():
        ours, again = (found["ratios"][f"{arm} / timm"] for arm in ("ours", "again"))
        shown = f"{ours['median']:.3f} ({ours['min']:.3f} - {ours['max']:.3f})"
        met = "met" if ours["median"] <= AIM else "not met"
        rows.append([name, f"{found['milliseconds']['timm']:.1f}", shown, met, f"{again['median']:.3f}"])
    return harness.table(rows)


def main() -> None:
    """Measures, prints the table and writes the json."""
    args, settings = harness.arguments_of_models(__doc__, list(MODELS), steps=40, warmup=5, batch_size=8)
    harness.restart_with_steady_malloc()
    device = start_distributed(600.0)
    if device.type == "cpu":
        torch.set_num_threads(1)
    result = {}
    for name in args.models:
        torch.manual_seed(0)
        images = torch.randn(args.batch_size, 3, args.image_size, args.image_size, device=device)
        labels = torch.randint(CLASSES, (args.batch_size,), device=device)
        result[name] = measure(
            Bench(name, {} if args.full else MODELS[name], Batch(images, labels)), args.warmup, args.steps
        )
        print(json.dumps({name: result[name]["milliseconds"]}), file=sys.stderr)
    print(report(result))
    harness.save("fixed_path", settings, result, args.results)


if __name__ == "__main__":
    main()
