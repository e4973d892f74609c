"""The tables of a study, as Markdown."""

from __future__ import annotations

import json
from typing import Any

from gppf_ds.study import figures
from gppf_ds.study.plan import Study, Table
from gppf_ds.study.results import Measure, Results, Spread, as_json, differences, furthest, spread
from gppf_ds.train.table import markdown


def render(plan: Study, results: Results) -> str:
    """Writes ``study.md``, ``study.json`` and the figures into the study's folder.

    Returns:
        The tables, and the names of the files.
    """
    raw = as_json(plan, results)
    parts = [f"# {plan.config.title}", plan.config.question, _budget(plan, results)]
    parts += [_section(table, plan, results, raw) for table in plan.config.tables]
    text = "\n\n".join(part for part in parts if part)
    plan.output.mkdir(parents=True, exist_ok=True)
    files = [plan.output / "study.md", plan.output / "study.json"]
    files[0].write_text(f"{text}\n")
    files[1].write_text(json.dumps(raw, indent=1) + "\n")
    files += figures.draw(plan, results)
    return "\n".join([text, "", *map(str, files)])


def _section(table: Table, plan: Study, results: Results, raw: dict[str, Any]) -> str:
    """A table and its title; costs go into the raw numbers too."""
    match table:
        case "metrics":
            return _metrics(results)
        case "differences":
            return f"More than {plan.baseline}, of the same seed\n\n{_differences(plan, results)}"
        case "curves":
            return f"Losses: the furthest from {plan.baseline}'s of the same seed\n\n{_curves(plan, results)}"
        case "costs":
            from gppf_ds.study.costs import of_arms, rows

            raw["costs"] = of_arms(plan)
            return f"What an arm's network costs (GFLOPs of an image)\n\n{markdown(rows(raw['costs']))}"


def _budget(plan: Study, results: Results) -> str:
    """What has been trained so far."""
    every = [one for by_seed in results.by_arm.values() for one in by_seed.values()]
    finished = sum(one.finished for one in every)
    hours = sum(one.seconds for one in every) / 3600
    images = sum(one.images for one in every)
    seeds = ", ".join(map(str, plan.config.seeds))
    return f"{finished} of {len(every)} results, seeds {seeds}; {images:,} images in {hours:.1f} hours of training."


def _metrics(results: Results) -> str:
    rows = [("arm", *map(_title, results.measures))]
    for arm, by_seed in results.by_arm.items():
        seeds, failed = len(by_seed), sum(one.failed for one in by_seed.values())
        cells = [spread(list(results.values(arm, measure).values())) for measure in results.measures]
        rows.append((f"{arm} ({failed} failed)" if failed else arm, *(_cell(cell, seeds) for cell in cells)))
    return markdown(rows)


def _title(measure: Measure) -> str:
    return f"{measure.task} {measure.metric} {'↑' if measure.higher_is_better else '↓'}"


def _cell(found: Spread | None, seeds: int, sign: str = "") -> str:
    if found is None:
        return "-"
    deviation = "" if found.deviation is None else f" ± {found.deviation:.4f}"
    return f"{found.mean:{sign}.4f}{deviation}" + (f" ({found.count} of {seeds})" if found.count < seeds else "")


def _differences(plan: Study, results: Results) -> str:
    rows = [("arm", *map(_title, results.measures))]
    for arm, by_seed in results.by_arm.items():
        if arm != plan.baseline:
            cells = [spread(differences(results, arm, plan.baseline, measure)) for measure in results.measures]
            rows.append((arm, *(_cell(cell, len(by_seed), "+") for cell in cells)))
    return markdown(rows)


def _curves(plan: Study, results: Results) -> str:
    rows = [("arm", "relative distance", "at step")]
    for arm in results.by_arm:
        if arm != plan.baseline:
            found = furthest(results, arm, plan.baseline)
            rows.append((arm, "-", "-") if found is None else (arm, f"{found[0]:.1e}", str(found[1])))
    return markdown(rows)
