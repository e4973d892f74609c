"""What does bookkeeping cost per step, for 8 to 16,384 devices?

Every rank computes the schedule of all devices, how many devices use each parameter, and which samples its own devices
read: in every step, in Python. ``gppf-ds plan`` goes through the same schedule; the table has its time for one
simulated step too. One process, no ranks.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import harness
import numpy as np
from busy_share import SECONDS, WEIGHTS, schedule

from gppf_ds.simt.sampler import Sampler
from gppf_ds.simt.usage import Owner, usage_counts
from gppf_ds.train.feed import Feed
from gppf_ds.train.provenance import Provenance, Record
from gppf_ds.train.simulation import Cost, Costs, Layout, simulate

AIM = 1e-3
"""Seconds of a step."""
LAYERS, UNITS = 17, 2
"""Of the lego ResNet-50."""
PER_RANK = 4
"""Devices of a rank, and so of a group of the balanced schedule."""


def pieces(devices: int) -> dict[str, Callable[[int], object]]:
    """By what is computed, a function of the step."""
    layout = Layout(devices // PER_RANK, PER_RANK, 1)
    of_kind = {kind: schedule(kind, layout, SECONDS) for kind in ("iid", "stratified", "balanced")}
    balanced = of_kind["balanced"]
    found: dict[str, Callable[[int], object]] = {}
    for kind, one in of_kind.items():
        feed = cast(Feed, SimpleNamespace(schedule=one))
        found[f"tasks, {kind}"] = lambda step, feed=feed: Feed.tasks(feed, step, devices)  # type: ignore[misc]
    units: list[Owner] = [("unit", str(layer), str(unit)) for layer in range(LAYERS) for unit in range(UNITS)]
    owners: list[Owner] = [("all",), *(("task", name) for name in WEIGHTS), *units]
    names = Feed.tasks(cast(Feed, SimpleNamespace(schedule=balanced)), 0, devices)
    valid, each = np.ones(devices, dtype=bool), devices // len(WEIGHTS) // UNITS
    found["usage, soft"] = lambda step: usage_counts(owners, names, valid, {})
    chosen = {unit: dict.fromkeys(WEIGHTS, each) for unit in units}
    found["usage, hard"] = lambda step: usage_counts(owners, names, valid, chosen)
    provenance = Provenance(own=[Record("", 0, name, None, "", "", 1) for name in WEIGHTS])
    found["provenance"] = lambda step: provenance.add(names, valid, chosen, owners)
    sampler = Sampler(balanced, [100_000] * len(WEIGHTS), [8] * len(WEIGHTS))
    found["samples"] = lambda step: sampler.requests(step, [10**6] * len(WEIGHTS), range(PER_RANK), devices)
    costs = Costs({name: Cost(8, (seconds,), (0.0,), 0.0) for name, seconds in SECONDS.items()})
    found["plan, a step"] = lambda step: simulate(lambda number: balanced(number, devices), costs, layout, [step])
    return found


def measure(devices: int, steps: int) -> dict[str, dict[str, float]]:
    """Seconds of CPU time of every piece; nothing here waits, so that on an idle machine it is the time that passes."""
    result = {}
    for name, piece in pieces(devices).items():
        piece(0)
        seconds = []
        for step in range(steps):
            started = time.thread_time()
            piece(step)
            seconds.append(time.thread_time() - started)
        result[name] = harness.spread(seconds)
    return result


def report(result: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    """One line for each number of devices, one column for each piece."""
    first = next(iter(result.values()))
    rows = [["devices", *first]]
    for devices, found in result.items():
        cells = [f"{1e6 * spread['median']:.0f} ({1e6 * spread['min']:.0f})" for spread in found.values()]
        rows.append([f"{int(devices):,}", *cells])
    most = {name: max(found[name]["median"] for found in result.values()) for name in first if name != "samples"}
    late = [name for name, seconds in most.items() if seconds >= AIM]
    verdict = f"not met by {', '.join(late)}" if late else "met"
    aim = f"aim for every piece but the samples, which no number of devices changes: below {AIM * 1e6:.0f}, {verdict}"
    return f"{harness.table(rows)}\n\n{aim}"


def main() -> None:
    """Measures, prints the table and writes the json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = [8, 64, 512, 4096, 16384]
    parser.add_argument("--devices", type=int, nargs="+", default=sizes, help="in a step (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=50, help="measured steps (default: %(default)s)")
    parser.add_argument("--results", type=Path, default=harness.RESULTS, help="folder for the json")
    args = parser.parse_args()
    if min(args.devices) < PER_RANK or any(devices % PER_RANK for devices in args.devices) or args.steps < 1:
        parser.error(f"--devices are multiples of {PER_RANK}; --steps starts at 1")
    settings: dict[str, Any] = {"ranks": 1, "devices": args.devices, "steps": args.steps}
    result = {str(devices): measure(devices, args.steps) for devices in args.devices}
    print("microseconds of CPU time of a step: median (min)\n")
    print(report(result))
    harness.save("scale", settings, result, args.results)


if __name__ == "__main__":
    main()
