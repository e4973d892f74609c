"""Does `gppf-ds advise` rank the paths as fine-tuning does?

    gppf-ds advise --run runs/pretrained --config new.yaml --output advice
    python benchmarks/advise_ranking.py advice/advise.json camvid --run objects=runs/camvid_from_objects \
        --run digits=runs/camvid_from_digits/seed0 --run digits=runs/camvid_from_digits/seed1

Every run was fine-tuned on the new task from the path of one pre-training task; several from one path are averaged.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import harness
from scipy.stats import kendalltau, spearmanr

from gppf_ds.train import recipe


def main() -> None:
    """Prints the table and the correlations, and writes the json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("advice", type=Path, help="advise.json")
    parser.add_argument("task", help="the new task, in advise.json and in the runs")
    parser.add_argument("--run", action="append", required=True, metavar="PATH=FOLDER", help="a fine-tuned run")
    parser.add_argument("--metric", help="of results.json (default: the task's headline)")
    parser.add_argument("--results", type=Path, default=harness.RESULTS, help="folder for the json")
    args = parser.parse_args()

    targets = json.loads(args.advice.read_text())["targets"]
    if args.task not in targets:
        sys.exit(f"{args.advice} has no task {args.task}: choose from {', '.join(targets)}")
    runs: dict[str, list[Path]] = {}
    for pair in args.run:
        name, _, folder = pair.partition("=")
        runs.setdefault(name, []).append(Path(folder))
    task = recipe.read_run(next(iter(runs.values()))[0]).tasks[args.task]
    metric = args.metric or task.headline
    tuned = {name: [final(folder, args.task, metric) for folder in folders] for name, folders in runs.items()}
    found = compare(targets[args.task]["rows"], tuned, task.higher_is_better)
    print(report(found, targets[args.task]["measure"], metric))
    folders = {name: [folder.name for folder in found] for name, found in runs.items()}
    settings = {"ranks": 1, "task": args.task, "metric": metric, "runs": folders}
    harness.save("advise_ranking", settings, found, args.results)


def final(folder: Path, task: str, metric: str) -> float:
    """The last value of a task's metric in a run's results.json."""
    return float(json.loads((folder / "results.json").read_text())[-1]["metrics"][task][metric])


def compare(
    rows: Sequence[Mapping[str, Any]], tuned: Mapping[str, Sequence[float]], higher_is_better: bool
) -> dict[str, Any]:
    """Rank correlations of probe scores and fine-tuned metrics, and what following the advice costs.

    Args:
        rows: of a target in advise.json.
        tuned: metrics of the runs, by a task that has the path. Runs of tasks with the same path belong together.
        higher_is_better: of the metric.

    Returns:
        "paths" (best score first), "spearman", "kendall" (1: the same ranking), and "regret": how far the fine-tuned
        metric of the advised path stays behind the best, in the metric's unit.
    """
    if unknown := tuned.keys() - {name for row in rows for name in row["tasks"]}:
        sys.exit(f"advise.json has no path of {', '.join(sorted(unknown))}")
    paths = []
    for row in rows:
        values = [value for name in row["tasks"] for value in tuned.get(name, ())]
        if values:
            deviation = statistics.stdev(values) if len(values) > 1 else None
            spread = {"mean": statistics.mean(values), "deviation": deviation, "runs": len(values)}
            paths.append({"tasks": row["tasks"], "score": row["score"], "error": row["error"], "tuned": spread})
    if len(paths) < 2:
        sys.exit("a ranking needs fine-tuned runs of at least two different paths")
    sign = 1 if higher_is_better else -1
    scores = [path["score"] for path in paths]
    goods = [sign * path["tuned"]["mean"] for path in paths]
    return {
        "paths": paths,
        "spearman": float(spearmanr(scores, goods).statistic),
        "kendall": float(kendalltau(scores, goods).statistic),
        "regret": max(goods) - goods[0],
    }


def report(found: Mapping[str, Any], measure: str, metric: str) -> str:
    """The table and the three numbers."""
    rows = [["path of", measure, f"fine-tuned {metric}", "runs"]]
    for path in found["paths"]:
        tuned = path["tuned"]
        deviation = "" if tuned["deviation"] is None else f" +- {tuned['deviation']:.4f}"
        score = f"{path['score']:.3f} +- {path['error']:.3f}"
        rows.append([", ".join(path["tasks"]), score, f"{tuned['mean']:.4f}{deviation}", str(tuned["runs"])])
    numbers = ", ".join(f"{key} {found[key]:.3f}" for key in ("spearman", "kendall"))
    return f"{harness.table(rows)}\n{numbers}; the advised path stays {found['regret']:.4f} behind the best"


if __name__ == "__main__":
    main()
