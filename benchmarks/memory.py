"""What does a rank hold, at which ZeRO stage, with and without checkpointing, with one device and with several?

Nothing is computed from a formula: parameters, optimizer state and gradients are the storages of the tensors that lie
there, each once; activations are what autograd saves for backward; the peak is that of one step, parameters and
optimizer state included, by torch's account on a GPU and by an account of every storage on a CPU.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import harness

SMALL = '{"layers": [1, 1, 2, 2], "channels": [32, 64, 128, 256]}'

KINDS = (
    "parameters",
    "fp32 copies",
    "optimizer state",
    "gradients, stepped",
    "gradients, summed",
    "DeepSpeed's bucket",
    "activations",
    "peak",
)

SHARED = {"parameters": 3, "optimizer state": 1, "gradients, stepped": 2}
"""What the ranks share out among them, and from which stage on."""

SLACK = 1.15
"""A rank's share may be this many times 1 / ranks: parts are padded, and one that is cut is held whole by both."""

MEBI = 2**20


def shares(result: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The arms, each with the ratios of what is shared to what a rank holds at stage 0; none without that."""
    whole = {(one["checkpoint"], one["devices per rank"]): one["bytes"] for one in result if one["stage"] == 0}
    found = []
    for one in result:
        alone = whole.get((one["checkpoint"], one["devices per rank"]))
        ratios = {kind: one["bytes"][kind] / alone[kind] for kind in SHARED} if alone else {}
        found.append({**one, "over ZeRO-0": ratios})
    return found


def report(result: Sequence[Mapping[str, Any]], ranks: int) -> str:
    """One line for each arm; ratios in brackets."""
    rows: list[Sequence[str]] = [["ZeRO", "checkpointing", "devices", *KINDS, ""]]
    for one in result:
        held, ratios = one["bytes"], one["over ZeRO-0"]
        near = [ratios[kind] <= SLACK / ranks for kind, first in SHARED.items() if ratios and one["stage"] >= first]
        cells = [_cell(held.get(kind), ratios.get(kind)) for kind in KINDS]
        verdict = ("met" if all(near) else "not met") if near else ""
        facts = [str(one["stage"]), "on" if one["checkpoint"] else "off", str(one["devices per rank"])]
        rows.append([*facts, *cells, verdict])
    return harness.table(rows)


def _cell(held: int | None, ratio: float | None) -> str:
    if held is None:
        return "-"
    return f"{held / MEBI:.2f}" + ("" if ratio is None else f" ({ratio:.3f})")


def main() -> None:
    """Starts the ranks, prints the table and writes the json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2, help="processes (default: %(default)s)")
    parser.add_argument("--stages", type=int, nargs="+", choices=range(4), default=[0, 1, 2, 3], help="default: all")
    parser.add_argument(
        "--checkpointing", nargs="+", choices=["off", "on"], default=["off", "on"], help="default: both"
    )
    parser.add_argument("--devices-per-rank", type=int, nargs="+", default=[1, 2], help="default: %(default)s")
    parser.add_argument("--batch-size", type=int, default=2, help="images per device (default: %(default)s)")
    parser.add_argument("--image-size", type=int, default=64, help="a multiple of 32 (default: %(default)s)")
    parser.add_argument("--options", type=json.loads, default=SMALL, help="of timm's resnet50 (default: %(default)s)")
    parser.add_argument("--limit", type=float, default=1800.0, help="seconds for everything (default: %(default)s)")
    parser.add_argument("--results", type=Path, default=harness.RESULTS, help="folder for the json")
    args = parser.parse_args()
    if args.ranks < 2 or min(*args.devices_per_rank, args.batch_size) < 1 or args.image_size % 32:
        parser.error("--ranks starts at 2, --devices-per-rank and --batch-size at 1; --image-size is a multiple of 32")

    names = ("ranks", "stages", "devices_per_rank", "batch_size", "image_size", "options")
    settings = {
        **{name: getattr(args, name) for name in names},
        "checkpoint": [one == "on" for one in args.checkpointing],
    }
    script = harness.HERE / "memory_rank.py"
    result = shares(harness.result_of_ranks(script, json.dumps(settings), args.ranks, args.limit))
    print(
        f"{args.ranks} ranks, {args.batch_size} images of {args.image_size} px per device, fp32, AdamW; MiB on the rank"
    )
    print(f"that has most; in brackets over ZeRO-0, where the aim is 1 / {args.ranks} for what a stage shares out\n")
    print(report(result, args.ranks))
    harness.save("memory", settings, result, args.results)


if __name__ == "__main__":
    main()
