"""What does watching a run cost?

A recipe's steps are taken twice by the product's own trainer: once bare, once with the collectives timed and everything
told that metrics.jsonl, routes.jsonl and Prometheus get. The two take turns on the same batches.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import harness
from data_wait import demo_recipe

AIM = 0.005
"""The share of a step that watching may cost."""


def measure(recipe: Path, settings: Mapping[str, Any], folder: Path, limit: float) -> dict[str, Any]:
    """Seconds of both arms, their differences, and the CPU time that telling took."""
    steps = settings["warmup"] + settings["steps"]
    overrides = [f"--steps={steps}", f"--output={folder}/run", "--optimizer.warmup_steps=1", "--evaluate_every=0"]
    # In a run of some length routes.jsonl gets a line less often than metrics.jsonl.
    overrides += [f"--routes_every={settings['log_every']}", f"--log_every={settings['log_every']}"]
    arguments = ["--config", str(recipe), *overrides]
    argument = json.dumps({"arguments": arguments, "warmup": settings["warmup"], "rounds": settings["steps"]})
    found = harness.result_of_ranks(harness.HERE / "metrics_cost_rank.py", argument, settings["ranks"], limit)
    differences = [watched - bare for bare, watched in zip(found["bare"], found["watched"], strict=True)]
    step = statistics.median(found["bare"])
    return {
        "bare": harness.spread(found["bare"]),
        "watched": harness.spread(found["watched"]),
        "difference": harness.spread(differences),
        # Half of the pairs lie between these: how far the median can be trusted.
        "quartiles": statistics.quantiles(differences, n=4)[::2],
        "told": {"mean": statistics.fmean(found["told"]), "share": sum(found["told"]) / sum(found["alone"])},
        "share": statistics.median(differences) / step,
        "scrape": found["scrape"],
    }


def report(found: Mapping[str, Any]) -> str:
    """The arms, and the two shares."""
    rows = [["", "ms: median (min - max)"]]
    for name in ("bare", "watched", "difference"):
        spread = found[name]
        rows.append([name, f"{1000 * spread['median']:.2f} ({1000 * spread['min']:.2f} - {1000 * spread['max']:.2f})"])
    low, high = (1000 * value for value in found["quartiles"])
    told = found["told"]
    return "\n\n".join(
        [
            harness.table(rows),
            f"median difference of neighbouring steps: {found['share']:.2%} of a step (quartiles {low:.2f} to "
            f"{high:.2f} ms)\n"
            f"telling alone, in CPU time: {1000 * told['mean']:.3f} ms, {told['share']:.2%} of a step: "
            f"{'met' if told['share'] < AIM else 'not met'} (aim: < {AIM:.1%})\n"
            f"an answer to Prometheus: {1000 * found['scrape']['seconds']:.1f} ms, "
            f"{found['scrape']['bytes'] / 1024:.0f} KiB",
        ]
    )


def main() -> None:
    """Measures, prints the table and writes the json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, help="a recipe with its data in place (default: the demo's)")
    parser.add_argument("--ranks", type=int, default=2, help="processes (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=100, help="measured pairs of steps (default: %(default)s)")
    parser.add_argument("--warmup", type=int, default=4, help="pairs before them (default: %(default)s)")
    parser.add_argument("--log-every", type=int, default=10, help="log_every of the recipe (default: %(default)s)")
    parser.add_argument("--limit", type=float, default=1800.0, help="seconds for the run (default: %(default)s)")
    parser.add_argument("--results", type=Path, default=harness.RESULTS, help="folder for the json")
    args = parser.parse_args()
    if min(args.ranks, args.warmup, args.log_every) < 1 or args.steps < 2:
        parser.error("--ranks, --warmup and --log-every start at 1, --steps at 2")
    settings = {name: getattr(args, name) for name in ("ranks", "steps", "warmup", "log_every")}
    settings["recipe"] = args.config.name if args.config else "demo.yaml"
    with tempfile.TemporaryDirectory() as folder:
        recipe = args.config or demo_recipe(Path(folder))
        found = measure(recipe, settings, Path(folder), args.limit)
    print(f"{settings['recipe']}, {args.ranks} ranks, {args.steps} pairs of steps\n")
    print(report(found))
    harness.save("metrics_cost", settings, found, args.results)


if __name__ == "__main__":
    main()
