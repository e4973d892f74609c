"""How much of the ranks' time is not spent waiting for the slowest of them?

The paper's setting (GPPF appendix D.1): eight tasks, their sampling weights and batch sizes, one device on each of 56
GPUs, tasks drawn independently. The seconds of a device's batch are estimates for a V100 in fp32, not measurements. The
product's own simulation goes through the schedules; nothing is timed. ``gppf-ds plan`` does the same for a recipe with
costs that it has measured.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import harness

from gppf_ds.config import ScheduleConfig
from gppf_ds.simt.schedule import Schedule
from gppf_ds.train.rebalance import propose
from gppf_ds.train.simulation import Cost, Costs, Forecast, Layout, simulate

AIM = 0.9

WEIGHTS = {
    "imagenet21k": 4.0,
    "coco": 2.5,
    "lvis": 2.5,
    "objects365": 4.0,
    "openimages": 4.0,
    "ade20k": 1.0,
    "voc2012aug": 1.0,
    "cocostuff164k": 2.0,
}
BATCHES = dict(zip(WEIGHTS, (96, 8, 8, 12, 12, 8, 8, 8), strict=True))
SECONDS = dict(zip(WEIGHTS, (0.27, 1.03, 1.03, 1.55, 1.55, 0.30, 0.30, 0.30), strict=True))


def schedule(kind: Any, layout: Layout, costs: Mapping[str, float | list[float]]) -> Schedule:
    """Of the paper's tasks."""
    config = ScheduleConfig(kind=kind, costs={**costs} if kind == "balanced" else {})
    return Schedule.from_weights(WEIGHTS, config, 0, layout.per_rank, layout.groups)


def forecasts(ranks: int, steps: int) -> dict[str, Forecast]:
    """By arm."""
    costs = Costs({name: Cost(BATCHES[name], (SECONDS[name],), (0.0,), 0.0) for name in WEIGHTS})
    layout = Layout(ranks, 1, 1)
    found = {}
    for kind, name in (("iid", "independent draws"), ("stratified", "stratified")):
        drawn = schedule(kind, layout, SECONDS)
        found[name] = simulate(lambda step, drawn=drawn: drawn(step, ranks), costs, layout, range(steps))  # type: ignore[misc]

    def balanced(settings: ScheduleConfig, at: Layout) -> Any:
        drawn = schedule("balanced", at, settings.costs)
        return lambda step: drawn(step, at.devices)

    for proposal in propose(costs, layout, balanced, range(steps)):
        per_rank = proposal.layout.per_rank
        if proposal.filled and per_rank == 1:
            found["balanced, 1 per rank, batches filled up"] = proposal.forecast
        elif per_rank > 1 and not proposal.filled:
            found[f"balanced, {per_rank} per rank, batches / {per_rank}"] = proposal.forecast
    return found


def report(result: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    """One line for each arm: busy share, and in brackets the time of a step relative to independent draws."""
    rows = [["arm", *(f"{ranks} ranks" for ranks in result)]]
    for arm in next(iter(result.values())):
        cells = [f"{found[arm]['busy']:.1%} ({found[arm]['step']:.2f})" for found in result.values()]
        rows.append([arm, *cells])
    best = min(max(one["busy"] for arm, one in found.items() if "/" in arm) for found in result.values())
    verdict = "met" if best > AIM else "not met"
    return f"{harness.table(rows)}\n\naim for the same images per step, divided differently: above {AIM:.0%}, {verdict}"


def main() -> None:
    """Simulates, prints the table and writes the json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[4, 8, 16, 56], help="(default: %(default)s)")
    parser.add_argument("--steps", type=int, default=200, help="simulated steps (default: %(default)s)")
    parser.add_argument("--results", type=Path, default=harness.RESULTS, help="folder for the json")
    args = parser.parse_args()
    if min(*args.ranks, args.steps) < 1:
        parser.error("--ranks and --steps start at 1")
    result = {}
    for ranks in args.ranks:
        found = forecasts(ranks, args.steps)
        alone = found["independent draws"].step_seconds
        result[str(ranks)] = {arm: {"busy": one.busy, "step": one.step_seconds / alone} for arm, one in found.items()}
    print(f"busy share (step time relative to independent draws), {args.steps} simulated steps\n")
    print(report(result))
    settings = {"ranks": max(args.ranks), "all ranks": args.ranks, "steps": args.steps}
    harness.save("busy_share", settings, result, args.results)


if __name__ == "__main__":
    main()
