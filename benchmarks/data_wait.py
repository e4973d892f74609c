"""What share of a step does training wait for data?

A recipe is trained for a few steps by the product's own trainer, once for each number of worker processes. With none,
reading and augmentation happen in the training process, so their whole cost shows as waiting: from it follows how many
workers keep up with the rest of the step.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import harness

from gppf_ds import shipped_configs
from gppf_ds.data.demo import make_demo_data

AIM = 0.02
"""The share of the steps' time that may be waiting."""


def demo_recipe(folder: Path) -> Path:
    """The demo's recipe with its data in this folder."""
    make_demo_data(folder / "demo-data", train_scenes=64, val_scenes=2, train_crops=640, val_crops=20)
    text = (shipped_configs() / "recipes" / "demo.yaml").read_text()
    text = text.replace("demo-data/", f"{folder}/demo-data/").replace("ds_configs/", f"{shipped_configs()}/")
    (folder / "demo.yaml").write_text(text)
    return folder / "demo.yaml"


def measure(recipe: Path, settings: Mapping[str, Any], folder: Path, limit: float) -> dict[str, Any]:
    """Every number of workers: waiting, step times and shares on the rank that waits most."""
    result = {}
    for workers in settings["workers"]:
        steps = settings["warmup"] + settings["steps"]
        overrides = [f"--loader.workers={workers}", f"--steps={steps}", f"--output={folder}/run-{workers}"]
        overrides += ["--optimizer.warmup_steps=1", "--evaluate_every=0", f"--checkpoint.every={steps}"]
        argument = json.dumps(["--config", str(recipe), *overrides])
        ranks = harness.result_of_ranks(harness.HERE / "data_wait_rank.py", argument, settings["ranks"], limit)
        counted = [rank[settings["warmup"] :] for rank in ranks]
        result[str(workers)] = max((_summary(rank) for rank in counted), key=lambda found: found["share"])
    return result


def _summary(steps: Sequence[tuple[float, float]]) -> dict[str, Any]:
    """Of one rank: (waited, whole step) in seconds."""
    waits, seconds = zip(*steps, strict=True)
    shares = [wait / whole for wait, whole in steps]
    found = {"wait": waits, "step": seconds, "share of a step": shares}
    return {"share": sum(waits) / sum(seconds), **{name: harness.spread(values) for name, values in found.items()}}


def report(result: Mapping[str, Any]) -> str:
    """One line for each number of workers, and how many keep up."""
    head = ["workers", "step ms", "waiting ms: median (min - max)", "of all steps", "of a step: median (min - max)", ""]
    rows: list[Sequence[str]] = [head]
    for workers, found in result.items():
        wait, shares = found["wait"], found["share of a step"]
        rows.append(
            [
                workers,
                f"{1000 * found['step']['median']:.0f}",
                f"{1000 * wait['median']:.1f} ({1000 * wait['min']:.1f} - {1000 * wait['max']:.1f})",
                f"{found['share']:.2%}",
                f"{shares['median']:.2%} ({shares['min']:.2%} - {shares['max']:.2%})",
                "" if workers == "0" else f"{'met' if found['share'] < AIM else 'not met'} (aim: < {AIM:.0%})",
            ]
        )
    lines = [harness.table(rows)]
    if "0" in result:
        alone = result["0"]["wait"]["median"]
        rest = result["0"]["step"]["median"] - alone
        lines.append(
            f"reading takes {1000 * alone:.0f} ms of one process per step and rank, the rest of the step "
            f"{1000 * rest:.0f} ms; workers per rank that keep up, on cores of their own: {math.ceil(alone / rest)}"
        )
    return "\n\n".join(lines)


def main() -> None:
    """Measures, prints the table and writes the json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, help="a recipe with its data in place (default: the demo's)")
    parser.add_argument("--ranks", type=int, default=2, help="processes (default: %(default)s)")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2], help="per rank (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=20, help="measured steps (default: %(default)s)")
    parser.add_argument("--warmup", type=int, default=4, help="steps before them (default: %(default)s)")
    parser.add_argument("--limit", type=float, default=1800.0, help="seconds for each run (default: %(default)s)")
    parser.add_argument("--results", type=Path, default=harness.RESULTS, help="folder for the json")
    args = parser.parse_args()
    if min(args.ranks, args.steps, args.warmup) < 1 or min(args.workers) < 0:
        parser.error("--ranks, --steps and --warmup start at 1, --workers at 0")
    settings = {name: getattr(args, name) for name in ("ranks", "workers", "steps", "warmup")}
    settings["recipe"] = args.config.name if args.config else "demo.yaml"
    with tempfile.TemporaryDirectory() as folder:
        recipe = args.config or demo_recipe(Path(folder))
        result = measure(recipe, settings, Path(folder), args.limit)
    print(f"{settings['recipe']}, {args.ranks} ranks, {args.steps} steps; the rank that waits most\n")
    print(report(result))
    harness.save("data_wait", settings, result, args.results)


if __name__ == "__main__":
    main()
