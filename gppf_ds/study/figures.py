"""The figures of a study: every seed's metrics beside each other, and the losses on the way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from gppf_ds.analysis.style import COLOURS, line_look, new_figure, save, tidy
from gppf_ds.study.plan import Study
from gppf_ds.study.results import Curve, Results

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw(plan: Study, results: Results) -> list[Path]:
    """Writes ``metrics`` and ``losses``, as far as there is something to draw."""
    files: list[Path] = []
    if results.measures:
        files += save(metrics(results), plan.output / "metrics")
    tasks = list(dict.fromkeys(t for arm in results.by_arm.values() for one in arm.values() for t in one.losses))
    if tasks:
        files += save(losses(results, tasks), plan.output / "losses")
    return files


def metrics(results: Results) -> Figure:
    """A panel for each column of the tables: a line of each arm, a dot for each seed, a stroke at their mean."""
    arms, count = list(results.by_arm), len(results.measures)
    figure = new_figure(1.6 + 2.4 * count, 0.9 + 0.32 * len(arms))
    panels = figure.subplots(1, count, squeeze=False, sharey=True)[0]
    for axes, measure in zip(panels, results.measures, strict=True):
        for row, arm in enumerate(arms):
            values = list(results.values(arm, measure).values())
            if values:
                axes.plot(values, [row] * len(values), "o", markersize=4, color=COLOURS[0], alpha=0.7)
                axes.plot([np.mean(values)], [row], "|", markersize=14, markeredgewidth=2, color=COLOURS[5])
        better = "higher" if measure.higher_is_better else "lower"
        tidy(axes, f"{measure.metric} ({better} is better)", "", measure.task)
    panels[0].set_yticks(range(len(arms)), arms)
    panels[0].set_ylim(len(arms) - 0.5, -0.5)
    return figure


def losses(results: Results, tasks: Sequence[str]) -> Figure:
    """A panel for each task: the mean over the seeds of every arm's training loss."""
    figure = new_figure(3.4 * len(tasks), 3.2)
    panels = figure.subplots(1, len(tasks), squeeze=False)[0]
    for axes, task in zip(panels, tasks, strict=True):
        for index, (arm, by_seed) in enumerate(results.by_arm.items()):
            curve = _mean([one.losses[task] for one in by_seed.values() if task in one.losses])
            if curve:
                axes.plot(list(curve), list(curve.values()), label=arm, linewidth=1.2, **line_look(index))
        tidy(axes, "optimizer step", "training loss", task)
    panels[0].legend(frameon=False, fontsize=7)
    return figure


def _mean(curves: Sequence[Curve]) -> Mapping[int, float]:
    """Over the seeds that have a step."""
    steps = sorted({step for curve in curves for step in curve})
    return {step: float(np.mean([curve[step] for curve in curves if step in curve])) for step in steps}
