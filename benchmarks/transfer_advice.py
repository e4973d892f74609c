"""Does `gppf-ds advise` name the path from which fine-tuning goes best?

    python benchmarks/transfer_advice.py

Every path of the multi-task pre-training of transfer_table.py is fine-tuned on every new task (fixed path), and the
ranking that comes out is compared with the one that `gppf-ds advise` gave beforehand. Run again, it goes on where it
was; with --finished it trains nothing and compares what there is.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import advise_ranking
import harness
import transfer_runs
from transfer_runs import TARGETS, Plan, Run, Target, Workplace


def main() -> None:
    """Trains what is missing, prints the table and writes the json."""
    parser = transfer_runs.arguments(__doc__)
    parser.add_argument("--samples", type=int, default=300, help="images of each split that advise reads (%(default)s)")
    options = parser.parse_args()
    work, plans = transfer_runs.start(options)
    found = {
        name: [one for plan in plans if (one := ranking(work, plan, TARGETS[name], options))]
        for name in options.targets
    }
    print(report(found))
    settings = {key: getattr(options, key) for key in ("targets", "seeds", "pretrain_steps", "steps", "samples")}
    result = {"rankings": found, "summary": {name: summary(own) for name, own in found.items() if own}}
    harness.save("transfer_advice", {"ranks": 1, **settings}, result, options.results)


def ranking(work: Workplace, plan: Plan, target: Target, options: argparse.Namespace) -> dict[str, Any] | None:
    """The advised ranking of the paths of one pre-training beside the true one; None where runs are missing."""
    source = plan.pretrained()
    if not options.finished:
        work.metrics(source)
    advice = advised(work, plan, target, source, options)
    if advice is None:
        return None
    tuned, better = {}, True
    for row in advice["rows"]:
        name = target.kin if target.kin in row["tasks"] else row["tasks"][0]
        run = plan.fixed(target, name)
        metrics = work.finished(run) if options.finished else work.metrics(run)
        if metrics is None:
            return None
        metric, better = work.headline(run, target.name)
        tuned[name] = [metrics[target.name][metric]]
    if len(tuned) < 2:
        return None
    return {"seed": plan.seed, "metric": metric, **advise_ranking.compare(advice["rows"], tuned, better)}


def advised(
    work: Workplace, plan: Plan, target: Target, source: Run, options: argparse.Namespace
) -> dict[str, Any] | None:
    """What ``gppf-ds advise`` says of a new task; None where it has not been asked and nothing is to be run."""
    name = f"seed{plan.seed}/advice_{target.name}"
    file = work.folder / name / "advise.json"
    if not file.is_file():
        if options.finished:
            return None
        recipe = work.write(f"{name}.yaml", plan.recipe(target) | {"seed": plan.seed})
        command = ["advise", "--run", source.name, "--config", recipe, "--output", name]
        work.command(*command, "--samples", str(options.samples), log=work.folder / f"{name}.log")
    advice: dict[str, Any] = json.loads(file.read_text())["targets"][target.name]
    return advice


def summary(rankings: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Means over rankings of different seeds; a correlation that is not defined (all paths equal) does not count."""
    known = [one["spearman"] for one in rankings if not math.isnan(one["spearman"])]
    return {
        "rankings": len(rankings),
        "spearman": statistics.mean(known) if known else math.nan,
        "best named": statistics.mean(float(one["regret"] == 0) for one in rankings),
        "by chance": statistics.mean(1 / len(one["paths"]) for one in rankings),
        "regret": statistics.mean(one["regret"] for one in rankings),
        "spread": statistics.mean(_spread(one["paths"]) for one in rankings),
    }


def _spread(paths: Sequence[Mapping[str, Any]]) -> float:
    """From the worst to the best path."""
    values = [path["tuned"]["mean"] for path in paths]
    return max(values) - min(values)


def report(found: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """One line for each new task."""
    rows = [["new task", "rankings", "Spearman", "best path named (by chance)", "behind the best", "worst to best"]]
    for name, rankings in found.items():
        if not rankings:
            rows.append([name, "0", *["-"] * 4])
            continue
        one = summary(rankings)
        named = f"{one['best named']:.0%} ({one['by chance']:.0%})"
        points = [f"{100 * one[key]:.1f} points" for key in ("regret", "spread")]
        rows.append([name, str(one["rankings"]), f"{one['spearman']:.2f}", named, *points])
    return harness.table(rows)


if __name__ == "__main__":
    main()
