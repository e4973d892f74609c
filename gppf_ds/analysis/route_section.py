"""The report's part about routes: the selection map with its slider, learning curves, certainty and the tree."""

from __future__ import annotations

from functools import partial
from html import escape
from typing import Any

import numpy as np

from gppf_ds.analysis import html, route_figures
from gppf_ds.analysis.routes import paths
from gppf_ds.analysis.style import COLOURS
from gppf_ds.train.route_record import RouteRecord

POSITIONS = 120
"""Of the slider, at most."""


def routes_section(record: RouteRecord | None) -> str:
    """Everything about the controllers of a run.

    Args:
        record: of the run, if it has one.
    """
    if record is None:
        return html.note("There is no routes.jsonl: layers have one unit each, or the run is older than this record.")
    chosen = paths(record.probabilities[-1])
    panels = [(layer, unit) for layer, n in enumerate(record.units) if n > 1 for unit in route_figures.shown_units(n)]
    charts = [
        html.chart(
            partial(route_figures.draw_selection_curve, record=record, layer=layer, unit=unit),
            f"probability of unit {unit} in {record.layers[layer]} by step, a line per task",
        )
        for layer, unit in panels
    ]
    size = (4.4, max(2.75, 1.2 + 0.22 * len(record.layers)))
    overview = [
        html.chart(partial(_with_legend, record), "units that each task still chooses among, by step"),
        html.chart(
            partial(route_figures.draw_units_in_use, probabilities=record.probabilities[-1], layers=record.layers),
            "units that the tasks' paths use, by layer",
            size,
        ),
    ]
    if len(record.tasks) > 1:
        size = (4.4, 1.5 + 0.3 * len(record.tasks))
        draw = partial(route_figures.draw_tree, chosen=chosen, tasks=record.tasks)
        overview.append(html.chart(draw, "tree of the tasks by the share of layers in which their units differ", size))
    return (
        f"{_map(record)}<h3>Certainty and sharing</h3>{html.grid(overview)}"
        f"<h3>Selection learning curves</h3>{html.line_legend(record.tasks)}{html.grid(charts)}"
    )


def _with_legend(record: RouteRecord, axes: Any) -> None:
    route_figures.draw_certainty_curve(axes, record)
    if len(record.tasks) <= 6:
        axes.legend(frameon=False, fontsize=9)


def _map(record: RouteRecord) -> str:
    """The table at the last record, for paper and pages without scripts, and what the slider needs to change it."""
    positions = np.unique(np.linspace(0, len(record.steps) - 1, min(POSITIONS, len(record.steps))).round().astype(int))
    probabilities = record.probabilities[positions]
    units = paths(probabilities)
    percent = (100 * probabilities.max(-1)).round().astype(int)
    data = {
        "steps": record.steps[positions].tolist(),
        "units": record.units,
        "chosen": units.reshape(len(positions), -1).tolist(),
        "percent": percent.reshape(len(positions), -1).tolist(),
        "colours": COLOURS,
        "least": route_figures.LEAST_STRENGTH,
    }
    head = "".join(f'<th scope="col">{escape(layer)}</th>' for layer in record.layers)
    rows = []
    for row, task in enumerate(record.tasks):
        cells = "".join(
            f'<td style="background:{route_figures.cell_colour(record.probabilities[-1, row, layer], count)}">'
            f"<b>{units[-1, row, layer]}</b><span>{percent[-1, row, layer]} %</span></td>"
            for layer, count in enumerate(record.units)
        )
        rows.append(f'<tr><th scope="row">{escape(task)}</th>{cells}</tr>')
    legend = "".join(
        f'<span><i style="background:{COLOURS[unit % len(COLOURS)]}"></i>unit {unit}</span>'
        for unit in range(max(record.units))
    )
    last = len(positions) - 1
    return (
        html.note("The unit each task would choose in each lego layer and its probability; stronger is more certain.")
        + '<div class="slider"><button id="route-play" type="button">play</button>'
        f'<input id="route-step" type="range" min="0" max="{last}" value="{last}" aria-label="optimizer step">'
        f'<output id="route-shown">step {record.steps[-1]:,}</output></div>'
        f'<div class="scroll map"><table id="route-map"><thead><tr><th></th>{head}</tr></thead>'
        f'<tbody>{"".join(rows)}</tbody></table></div><div class="legend">{legend}</div>{html.embedded("routes", data)}'
    )
