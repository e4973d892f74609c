"""How many bytes does a step hand to collectives, over the bytes of the parameters that somebody used in it?

Every collective of a step is counted where it leaves Python, by the code that starts it: gradients of backbone, heads
and controllers, statistics of cross-task batch norm, the agreement on valid devices, and DeepSpeed's own. The devices
run three tasks, two or one, so that heads are left over; DDP sends what it always sends.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import harness

SMALL = '{"layers": [1, 1, 1, 1], "channels": [16, 32, 64, 64]}'

ARMS: dict[str, Any] = {
    f"ours, {routing}, ZeRO-{stage}": (routing, stage) for routing in ("soft", "hard") for stage in (0, 1, 2, 3)
} | {"DDP, find_unused_parameters=True": None}
"""Routes and ZeRO stage of ours."""

KINDS = ("gradients", "batch norm", "agreement", "DeepSpeed", "other")

AIM = 1.05
"""The bytes of gradients over those of used parameters."""

KIBI, MEBI = 2**10, 2**20


def summary(steps: Sequence[Mapping[str, int]]) -> dict[str, Any]:
    """Of the steps of one case: bytes of used parameters, and by kind bytes and calls, all in a step; and the ratio."""
    mean = {kind: sum(step.get(kind, 0) for step in steps) / len(steps) for kind in ("used", *KINDS)}
    calls = {kind: sum(step.get(f"{kind}, calls", 0) for step in steps) / len(steps) for kind in KINDS}
    ratio = harness.spread([step.get("gradients", 0) / step["used"] for step in steps])
    return {"bytes": mean, "calls": calls, "gradients over used": ratio}


def report(result: Mapping[str, Any]) -> str:
    """One line for each arm and case."""
    rows: list[Sequence[str]] = [
        ["arm", "case", "used MiB", "gradients MiB", "over used: median (min - max)", "aim", ""]
        + [f"{kind}, KiB (calls)" for kind in KINDS[1:]]
    ]
    for arm, cases in result.items():
        for case, found in cases.items():
            sent, calls, ratio = found["bytes"], found["calls"], found["gradients over used"]
            rows.append(
                [
                    arm,
                    case,
                    *(f"{sent[kind] / MEBI:.3f}" for kind in ("used", "gradients")),
                    f"{ratio['median']:.3f} ({ratio['min']:.3f} - {ratio['max']:.3f})",
                    f"<= {AIM:.2f}",
                    "met" if ratio["max"] <= AIM else "not met",
                    *(f"{sent[kind] / KIBI:.2f} ({calls[kind]:.0f})" for kind in KINDS[1:]),
                ]
            )
    return harness.table(rows)


def main() -> None:
    """Starts the ranks, prints the table and writes the json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2, help="processes (default: %(default)s)")
    parser.add_argument("--devices-per-rank", type=int, default=2, help="of our arms (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=4, help="counted steps of every case (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=2, help="images per device (default: %(default)s)")
    parser.add_argument("--image-size", type=int, default=64, help="a multiple of 32 (default: %(default)s)")
    parser.add_argument("--options", type=json.loads, default=SMALL, help="of timm's resnet50 (default: %(default)s)")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), metavar="ARM", help="default: all")
    parser.add_argument("--limit", type=float, default=1800.0, help="seconds for everything (default: %(default)s)")
    parser.add_argument("--results", type=Path, default=harness.RESULTS, help="folder for the json")
    args = parser.parse_args()
    if min(args.devices_per_rank, args.steps, args.batch_size) < 1 or args.image_size % 32:
        parser.error("--devices-per-rank, --steps and --batch-size start at 1; --image-size is a multiple of 32")
    if args.ranks < 2 or args.ranks * args.devices_per_rank < 3:
        parser.error("there must be 2 ranks or more, and 3 devices or more for the three tasks")

    names = ("ranks", "devices_per_rank", "steps", "batch_size", "image_size", "options", "arms")
    settings = {name: getattr(args, name) for name in names}
    script = harness.HERE / "communication_rank.py"
    found = harness.result_of_ranks(script, json.dumps(settings), args.ranks, args.limit)
    result = {arm: {case: summary(steps) for case, steps in cases.items()} for arm, cases in found.items()}
    print(f"{args.ranks} ranks with {args.devices_per_rank} devices each (DDP: 1), {args.steps} steps of every case\n")
    print(report(result))
    harness.save("communication", settings, result, args.results)


if __name__ == "__main__":
    main()
