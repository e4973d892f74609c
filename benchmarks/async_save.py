"""For how long does training stand still while a checkpoint is written beside it?

Three things are timed in turn, again and again: a row of training steps; steps while a checkpoint is written in the
background; and a checkpoint that is written while nothing else runs. Training stands still for the copy to host memory;
what the steps beside the writing take longer is what sharing the machine costs.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import harness

AIM = 0.1
"""The share of the time for writing for which training may stand still."""


def report(result: Mapping[str, Any]) -> str:
    """What a checkpoint costs, written in the foreground and in the background."""
    rows: list[Sequence[str]] = [["", "median", "min - max"]]
    for name, found in result.items():
        unit = 1 if name.startswith("share") else 1000
        values = [f"{unit * found[key]:.3f}" if unit == 1 else f"{unit * found[key]:.0f} ms" for key in found]
        rows.append([name, values[0], f"{values[1]} - {values[2]}"])
    share = result["share of writing that copying took"]["median"]
    verdict = "met" if share < AIM else "not met"
    return f"{harness.table(rows)}\n\nstanding still: {verdict} (aim: < {AIM:.0%} of the time for writing)"


def main() -> None:
    """Measures, prints the table and writes the json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=1, help="processes (default: %(default)s)")
    parser.add_argument("--mib", type=int, default=256, help="of the checkpoint, for each rank (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=7, help="of the three things (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=8, help="of the steps (default: %(default)s)")
    parser.add_argument("--folder", type=Path, help="where to write (default: a folder for temporary files)")
    parser.add_argument("--limit", type=float, default=1800.0, help="seconds for all (default: %(default)s)")
    parser.add_argument("--results", type=Path, default=harness.RESULTS, help="folder for the json")
    args = parser.parse_args()
    if min(args.ranks, args.mib, args.repeats, args.batch_size) < 1:
        parser.error("--ranks, --mib, --repeats and --batch-size start at 1")
    settings = {name: getattr(args, name) for name in ("ranks", "mib", "repeats", "batch_size")}
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        argument = json.dumps({**settings, "folder": folder})
        result = harness.result_of_ranks(harness.HERE / "async_save_rank.py", argument, args.ranks, args.limit)
    print(f"{args.ranks} ranks, a checkpoint of {args.mib} MiB each; rank 0\n")
    print(report(result))
    harness.save("async_save", settings, result, args.results)


if __name__ == "__main__":
    main()
