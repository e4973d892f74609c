"""Does every parameter get the task average? Ours, torch DDP and plain DeepSpeed on one step of mixed tasks.

Rank 0 runs task A, the others run B, nobody runs C. An arm's ratio for a group of parameters is what SGD was given for
it over what it should have been given: the projection on the gradient that plain PyTorch computes in one process with
all batches, averaged over the ranks that used the group. The relative error stands beside it, for a ratio says nothing
of what else got in. Then AdamW, 30 steps in which only B runs: what nobody uses must not move.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import harness

ARMS: dict[str, dict[str, Any]] = {
    **{f"ours, ZeRO-{stage}": {"kind": "simt", "stage": stage} for stage in range(4)},
    "DDP, find_unused_parameters=True": {"kind": "ddp"},
    "DDP, zero dummy loss": {"kind": "ddp", "dummy": True},
    **{f"DeepSpeed ZeRO-{stage}": {"kind": "deepspeed", "stage": stage} for stage in range(3)},
    **{f"DeepSpeed ZeRO-{s}, other heads": {"kind": "deepspeed", "stage": s, "classes": [5, 7, 9]} for s in (1, 2)},
}
"""Heads have equal shapes, but in the last two arms, where they differ in their number of classes."""

VERDICTS = {"aborts": "aborts", "hangs": "hangs (timeout)"}


def main() -> None:
    """Runs every arm in a group of processes of its own; prints the table and writes the json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=3, help="processes; from 2 on (default: %(default)s)")
    parser.add_argument("--drift-steps", type=int, default=30, help="AdamW steps (default: %(default)s)")
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS), help="default: all")
    parser.add_argument("--limit", type=float, default=180.0, help="seconds for an arm (default: %(default)s)")
    parser.add_argument("--results", type=Path, default=harness.RESULTS, help="folder for the json")
    args = parser.parse_args()
    if args.ranks < 2:
        parser.error("--ranks must be at least 2: one rank has no other task to mix with")

    result: dict[str, Any] = {}
    for name in args.arms:
        task = json.dumps({"drift_steps": args.drift_steps, **ARMS[name]})
        outcome = harness.run_ranks(harness.HERE / "exactness_rank.py", task, args.ranks, args.limit)
        result[name] = {"verdict": outcome.verdict, **(outcome.result or {"reason": outcome.reason})}
        print(f"{name}: {outcome.verdict} {outcome.reason}".rstrip(), flush=True)
    print(f"\nObtained / true task average (relative error), {args.ranks} ranks; drift over {args.drift_steps} steps\n")
    print(report(result))
    settings = {"ranks": args.ranks, "drift_steps": args.drift_steps, "limit": args.limit}
    harness.save("exactness", settings, result, args.results)


def report(result: Mapping[str, Mapping[str, Any]]) -> str:
    """The table: groups with a true gradient, then the idle head and the drift."""
    rows = [["arm", "trunk", "head A", "head B", "idle C moved", "drift of A", "drift of C"]]
    for name, found in result.items():
        if found["verdict"] != "ends":
            rows.append([name, VERDICTS[found["verdict"]], *[""] * 5])
            continue
        cells = [f"{found[group]['ratio']:.4f} ({found[group]['error']:.0e})" for group in ("trunk", "A", "B")]
        rows.append([name, *cells, *(f"{100 * found[key]:.2f} %" for key in ("idle", "drift_a", "drift_c"))])
    return harness.table(rows)


if __name__ == "__main__":
    main()
