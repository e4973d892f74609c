"""What does cross-task batch norm cost, next to none and to torch.nn.SyncBatchNorm, and how often do the ranks talk?

All arms live in one process group and take turns, step by step; a ratio is that of two arms in the same round, each as
long as its slowest rank. A step is forward and backward of a ResNet without heads, optimizer and gradient reduction,
with one and with two devices per rank.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import harness

SMALL = '{"layers": [1, 1, 1, 1], "channels": [16, 32, 64, 64]}'

OURS = "ours"

TORCH = "torch.nn.SyncBatchNorm"

AIM = 1.0
"""What the median ratio of step times, ours over torch's, is to stay at or below."""


def main() -> None:
    """Starts the ranks, prints the table and writes the json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2, help="processes (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=30, help="measured steps of every arm (default: %(default)s)")
    parser.add_argument("--warmup", type=int, default=5, help="steps before them (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=8, help="images per device (default: %(default)s)")
    parser.add_argument("--image-size", type=int, default=96, help="a multiple of 32 (default: %(default)s)")
    parser.add_argument("--units", type=int, default=1, help="per lego layer, soft routes (default: %(default)s)")
    parser.add_argument("--options", type=json.loads, default=SMALL, help="of timm's resnet50 (default: %(default)s)")
    parser.add_argument("--limit", type=float, default=1800.0, help="seconds for everything (default: %(default)s)")
    parser.add_argument("--results", type=Path, default=harness.RESULTS, help="folder for the json")
    args = parser.parse_args()
    if min(args.steps, args.batch_size, args.units) < 1 or args.ranks < 2 or args.image_size % 32:
        parser.error("--steps, --batch-size and --units start at 1, --ranks at 2; --image-size is a multiple of 32")

    names = ("ranks", "steps", "warmup", "batch_size", "image_size", "units", "options")
    settings = {name: getattr(args, name) for name in names}
    script = harness.HERE / "cross_task_bn_rank.py"
    result = summary(harness.result_of_ranks(script, json.dumps(settings), args.ranks, args.limit))
    print(f"{args.ranks} ranks, {args.steps} steps, {args.batch_size} images of {args.image_size} px on every device\n")
    print(report(result))
    harness.save("cross_task_bn", settings, result, args.results)


def summary(found: Mapping[str, Any]) -> dict[str, Any]:
    """By devices per rank, of every arm: times, what ours takes relative to it, and collectives for each position."""
    result: dict[str, Any] = {}
    for devices, arms in found.items():
        ours = arms[OURS]["seconds"]
        result[devices] = {
            name: {
                "seconds": harness.spread(one["seconds"]),
                "ratio": harness.spread([a / b for a, b in zip(ours, one["seconds"], strict=True)]),
                "collectives": one["collectives"],
            }
            for name, one in arms.items()
        }
    return result


def report(result: Mapping[str, Any]) -> str:
    """One line for each arm."""
    head = ["devices per rank", "batch norm", "ms", "time of ours / this: median (min - max)", "aim"]
    rows = [[*head, "collectives per position: forward, backward", "aim"]]
    for devices, arms in result.items():
        for name, one in arms.items():
            ratio, sent = one["ratio"], one["collectives"]
            shown = "" if name == OURS else f"{ratio['median']:.3f} ({ratio['min']:.3f} - {ratio['max']:.3f})"
            fast = _verdict(f"<= {AIM:.2f}", ratio["median"] <= AIM) if name == TORCH else ""
            few = _verdict("1, 1", set(sent.values()) == {1.0}) if name == OURS else ""
            number = f"{sent['forward']:g}, {sent['backward']:g}"
            rows.append([devices, name, f"{1000 * one['seconds']['median']:.1f}", shown, fast, number, few])
    if TORCH in result["1"]:
        note = f"{TORCH} with two devices per rank has them one after another, each with statistics of its own"
    else:
        note = f"{TORCH} has no CPU version: left out"
    return f"{harness.table(rows)}\n\n{note}"


def _verdict(aim: str, met: bool) -> str:
    return f"{aim}: {'met' if met else 'not met'}"


if __name__ == "__main__":
    main()
