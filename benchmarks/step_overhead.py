"""What does a SIMT step cost, next to torch DDP on the same mixed tasks and next to plain DeepSpeed on one task?

Both arms of a comparison live in one process group and take turns, step by step; a ratio is that of two neighbouring
steps, each as long as its slowest rank. Batches are random tensors that lie on the device: only steps are measured.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import harness

SMALL = '{"layers": [1, 1, 1, 1], "channels": [16, 32, 64, 64]}'

AIMS = {
    "mixed tasks, DDP": 1.0,
    "mixed tasks, clipped, DDP": 1.0,
    "one task, DeepSpeed ZeRO-0": 1.03,
    "one task, DeepSpeed ZeRO-1": 1.03,
}
"""The comparisons, and what the median ratio of step times (ours over theirs) is to stay below."""

MEBI = 2**20


def main() -> None:
    """Starts the ranks, prints the table and writes the json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2, help="processes (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=30, help="measured steps of every arm (default: %(default)s)")
    parser.add_argument("--warmup", type=int, default=5, help="steps before them (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=8, help="images per rank (default: %(default)s)")
    parser.add_argument("--image-size", type=int, default=96, help="a multiple of 32 (default: %(default)s)")
    parser.add_argument("--options", type=json.loads, default=SMALL, help="of timm's resnet50 (default: %(default)s)")
    parser.add_argument("--limit", type=float, default=1800.0, help="seconds for everything (default: %(default)s)")
    parser.add_argument("--results", type=Path, default=harness.RESULTS, help="folder for the json")
    args = parser.parse_args()
    if min(args.ranks, args.steps, args.batch_size) < 1 or args.image_size % 32:
        parser.error("--ranks, --steps and --batch-size start at 1; --image-size is a multiple of 32")

    names = ("ranks", "steps", "warmup", "batch_size", "image_size", "options")
    settings = {name: getattr(args, name) for name in names}
    script = harness.HERE / "step_overhead_rank.py"
    result = harness.result_of_ranks(script, json.dumps(settings), args.ranks, args.limit)
    print(f"{args.ranks} ranks, {args.steps} steps of {args.batch_size} images of {args.image_size} px; batch norm is")
    print("the product's cross-task batch norm in all arms (torch.nn.SyncBatchNorm has no CPU version)\n")
    print(report(result))
    harness.save("step_overhead", settings, result, args.results)


def report(result: Mapping[str, Any]) -> str:
    """One line for each comparison."""
    head = ["ours against", "ours ms", "theirs ms", "time ratio: median (min - max)", "aim", ""]
    memory = ["memory ours MiB", "theirs MiB", "memory ratio"]
    rows: list[Sequence[str]] = [[*head, *memory]]
    for name, found in result["comparisons"].items():
        ratio = found["ratio"]
        ours, theirs = found["ours"], found["theirs"]
        rows.append(
            [
                name,
                *(f"{1000 * arm['seconds']['median']:.1f}" for arm in (ours, theirs)),
                f"{ratio['median']:.3f} ({ratio['min']:.3f} - {ratio['max']:.3f})",
                f"< {AIMS[name]:.2f}",
                "met" if ratio["median"] < AIMS[name] else "not met",
                *(f"{arm['memory'] / MEBI:.2f}" for arm in (ours, theirs)),
                f"{ours['memory'] / theirs['memory']:.3f}",
            ]
        )
    return f"{harness.table(rows)}\n\nmemory: {result['memory']}, on the rank that has most"


if __name__ == "__main__":
    main()
