"""Does multi-task pre-training help a new task? Fine-tuning in every mode, beside other starts, at equal steps.

    python benchmarks/transfer_table.py
    python benchmarks/transfer_table.py --seeds 0 --targets streets --steps 500

The pre-training is the demo's four tasks, the new tasks are real images that it never saw: pieces of clothing, cells,
streets. Run again, it goes on where it was; with --finished it trains nothing and prints what there is.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import harness
import transfer_runs
from transfer_runs import TARGETS, Plan, Run, Target, Workplace

ARMS: dict[str, Callable[[Plan, Target], Run]] = {
    "scratch": Plan.scratch,
    "single-task": Plan.single,
    "fixed path": lambda plan, target: plan.fixed(target, target.kin),
    "dynamic": Plan.dynamic,
    "retrain": Plan.retrain,
}
"""Where fine-tuning starts from."""

Values = Mapping[str, Mapping[int, float]]
"""A metric by arm and seed."""


def main() -> None:
    """Trains what is missing, prints the tables and writes the json."""
    parser = transfer_runs.arguments(__doc__)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    options = parser.parse_args()
    work, plans = transfer_runs.start(options)
    if not options.finished:
        for plan in plans:
            for target in options.targets:
                for arm in options.arms:
                    work.metrics(ARMS[arm](plan, TARGETS[target]))
    found = {name: of_target(work, plans, TARGETS[name], options.arms) for name in options.targets}
    print(report(found))
    settings = {key: getattr(options, key) for key in ("targets", "arms", "seeds", "pretrain_steps", "steps")}
    harness.save("transfer_table", {"ranks": 1, **settings}, found, options.results)


def of_target(work: Workplace, plans: Sequence[Plan], target: Target, arms: Sequence[str]) -> dict[str, Any]:
    """The metric of one target by arm and seed, as far as its runs are finished."""
    values: dict[str, dict[int, float]] = {arm: {} for arm in arms}
    metric = ""
    for plan in plans:
        for arm in arms:
            run = ARMS[arm](plan, target)
            if (metrics := work.finished(run)) is not None:
                metric = metric or work.headline(run, target.name)[0]
                values[arm][plan.seed] = metrics[target.name][metric]
    return {"metric": metric, "values": values, **summary(values)}


def summary(values: Values) -> dict[str, Any]:
    """Mean and deviation of every arm, and of how much more it has than scratch, seed by seed.

    Args:
        values: may lack seeds.
    """
    base = values.get("scratch", {})
    gains = {
        arm: [value - base[seed] for seed, value in own.items() if seed in base]
        for arm, own in values.items()
        if arm != "scratch"
    }
    return {
        "arms": {arm: spread(list(own.values())) for arm, own in values.items() if own},
        "gains": {arm: spread(own) for arm, own in gains.items() if own},
    }


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Mean and sample deviation; of a single value there is no deviation."""
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.mean(values), "deviation": deviation, "seeds": len(values)}


def report(found: Mapping[str, Mapping[str, Any]]) -> str:
    """Both tables, in percent."""
    parts = []
    for key, title in (("arms", "percent"), ("gains", "more than scratch, of the same seed, in points")):
        arms = [arm for arm in ARMS if any(arm in one[key] for one in found.values())]
        rows = [[f"({title})", *arms]]
        for name, one in found.items():
            rows.append([f"{name}, {one['metric']}", *(_cell(one[key].get(arm)) for arm in arms)])
        parts.append(harness.table(rows))
    return "\n\n".join(parts)


def _cell(one: Mapping[str, Any] | None) -> str:
    if one is None:
        return "-"
    deviation = "" if one["deviation"] is None else f" +- {100 * one['deviation']:.1f}"
    return f"{100 * one['mean']:.1f}{deviation} ({one['seeds']})"


if __name__ == "__main__":
    main()
