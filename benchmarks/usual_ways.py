"""Is SIMT faster than the usual ways to train several tasks with DDP?

All arms live in one process group and take turns, round by round; a ratio is that of two arms in the same round, each
as long as its slowest rank. In a round every rank sees one batch of each of two tasks, one light and one dense: arms
differ in how many optimizer steps they make of it. Batches are random tensors that lie on the device.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import harness

SMALL = '{"layers": [1, 1, 1, 1], "channels": [16, 32, 64, 64]}'

STEPS = {
    "DDP, find_unused_parameters=True": 2,
    "DDP, dummy loss": 2,
    "DDP, one task per iteration": 2,
    "DDP, every task in every step": 1,
    "ours": 2,
    "ours, 2 devices per rank, batches / 2": 2,
    "ours, every task in every step": 1,
}
"""The arms, and the optimizer steps in which each has seen the images of a round."""

GRADIENTS = {
    "DDP, find_unused_parameters=True": "sum over the ranks / ranks, of heads and controllers too: not / users",
    "DDP, dummy loss": "the same; heads that nobody uses decay and keep their momentum",
    "DDP, one task per iteration": "one task's mean over the ranks (all use it), another task's in the next step",
    "DDP, every task in every step": "sum over the tasks of each task's mean over the ranks (all use it)",
    "ours": "task average: sum over the users / users",
    "ours, 2 devices per rank, batches / 2": "task average, of as many images",
    "ours, every task in every step": "sum over the tasks of each task's mean (schedule.kind accumulate)",
}
"""What every arm gives its optimizer."""

COMPARISONS = (
    ("DDP, find_unused_parameters=True", "ours", "but for heads, controllers"),
    ("DDP, dummy loss", "ours", "but for heads, controllers"),
    ("DDP, one task per iteration", "ours", "no"),
    ("DDP, find_unused_parameters=True", "ours, 2 devices per rank, batches / 2", "but for heads, controllers"),
    ("DDP, dummy loss", "ours, 2 devices per rank, batches / 2", "but for heads, controllers"),
    ("DDP, one task per iteration", "ours, 2 devices per rank, batches / 2", "no"),
    ("DDP, every task in every step", "ours, every task in every step", "but for batch statistics"),
)
"""Theirs, ours, and whether both compute the same update. Ours is to be faster where they do."""

MEBI = 2**20


def main() -> None:
    """Starts the ranks, prints the tables and writes the json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2, help="processes, an even number (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=20, help="measured rounds of every arm (default: %(default)s)")
    parser.add_argument("--warmup", type=int, default=3, help="rounds before them (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=8, help="an even number of images (default: %(default)s)")
    parser.add_argument("--image-size", type=int, default=96, help="a multiple of 32 (default: %(default)s)")
    parser.add_argument("--options", type=json.loads, default=SMALL, help="of timm's resnet50 (default: %(default)s)")
    parser.add_argument("--limit", type=float, default=1800.0, help="seconds for everything (default: %(default)s)")
    parser.add_argument("--results", type=Path, default=harness.RESULTS, help="folder for the json")
    args = parser.parse_args()
    if min(args.ranks, args.batch_size) < 2 or args.ranks % 2 or args.batch_size % 2:
        parser.error("--ranks and --batch-size are even: there are two tasks, and one arm halves the batches")
    if args.rounds < 1 or args.image_size % 32:
        parser.error("--rounds start at 1; --image-size is a multiple of 32")

    settings = {name: getattr(args, name) for name in ("ranks", "warmup", "batch_size", "image_size", "options")}
    settings["steps"] = args.rounds
    script = harness.HERE / "usual_ways_rank.py"
    found = harness.result_of_ranks(script, json.dumps(settings), args.ranks, args.limit)
    result = summary(found, 2 * args.ranks * args.batch_size)
    print(f"{args.ranks} ranks, {args.rounds} rounds: {args.batch_size} images of {args.image_size} px of each task")
    print("on every rank; batch norm is the product's cross-task batch norm in all arms\n")
    print(report(result))
    harness.save("usual_ways", settings, result, args.results)


def summary(found: Mapping[str, Any], images: int) -> dict[str, Any]:
    """Times, images per second and memory of every arm, and the ratios of theirs over ours.

    Args:
        found: by the ranks.
        images: of a round, over all ranks.
    """
    arms = {}
    for name, one in found["arms"].items():
        seconds = harness.spread(one["seconds"])
        arms[name] = {"seconds": seconds, "images/s": images / seconds["median"], "memory": one["memory"]}
    ratios: dict[str, dict[str, Any]] = {}
    for theirs, ours, _ in COMPARISONS:
        pairs = zip(found["arms"][theirs]["seconds"], found["arms"][ours]["seconds"], strict=True)
        ratios.setdefault(theirs, {})[ours] = harness.spread([a / b for a, b in pairs])
    return {"arms": arms, "ratios": ratios, "memory": found["memory"]}


def report(result: Mapping[str, Any]) -> str:
    """One line for each arm, and one for each comparison."""
    rows = [["arm", "round ms", "images/s", "steps", "memory MiB", "gradient"]]
    for name, one in result["arms"].items():
        numbers = [f"{1000 * one['seconds']['median']:.1f}", f"{one['images/s']:.1f}", str(STEPS[name])]
        rows.append([name, *numbers, f"{one['memory'] / MEBI:.2f}", GRADIENTS[name]])
    pairs = [["theirs", "ours", "time theirs / ours: median (min - max)", "same update", "aim", ""]]
    for theirs, ours, same in COMPARISONS:
        ratio = result["ratios"][theirs][ours]
        shown = f"{ratio['median']:.3f} ({ratio['min']:.3f} - {ratio['max']:.3f})"
        verdict = ["-", ""] if same == "no" else ["> 1.00", "met" if ratio["median"] > 1 else "not met"]
        pairs.append([theirs, ours, shown, same, *verdict])
    notes = f"steps: optimizer steps in a round\nmemory: {result['memory']}, on the rank that has most"
    return f"{harness.table(rows)}\n\n{harness.table(pairs)}\n\n{notes}"


if __name__ == "__main__":
    main()
