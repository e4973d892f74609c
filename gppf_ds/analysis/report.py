"""``gppf-ds report``: a run as one html file, which needs neither network nor server."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import torch

from gppf_ds.analysis import curves, html
from gppf_ds.analysis.route_section import routes_section
from gppf_ds.analysis.run_files import RunFiles, read_files
from gppf_ds.analysis.samples import sample_pictures
from gppf_ds.analysis.style import COLOURS
from gppf_ds.errors import UserError
from gppf_ds.train.restore import Trained, load_trained

SAMPLES = 3
"""Pictures of each task."""
EVALUATIONS = 7
"""Columns of the tables of all metrics, from the first evaluation to the last."""
_KINDS = {
    "compute": "computing",
    "straggler_wait": "waiting for slower ranks",
    "communication": "communication",
    "step": "optimizer steps",
    "data": "waiting for data",
    "data_wait": "waiting for data",
    "evaluation": "evaluations",
    "checkpoint": "saving checkpoints",
}


def build(folder: Path, device: torch.device) -> str:
    """The report of a run; a section says so where the run left nothing to show.

    Args:
        folder: of the run.
        device: for the sample predictions.

    Raises:
        UserError: the folder is no run, or a record in it is damaged.
    """
    run = read_files(folder)
    sections = [
        ("Results", _results(run)),
        ("Curves", _curves(run)),
        ("Routes", routes_section(run.routes)),
        ("Time", _time(run)),
        ("Predictions", _predictions(run, device)),
        ("Recipe", _recipe(run)),
    ]
    return html.page(f"Run {folder.resolve().name}", _subtitle(run), sections)


def _subtitle(run: RunFiles) -> str:
    config, done = run.recipe.config, run.results[-1]["step"] if run.results else 0
    units = config.backbone.units
    parts = [
        f"{len(run.recipe.tasks)} tasks",
        f"{done:,} of {config.steps:,} steps evaluated",
        f"{config.backbone.name}, {units if isinstance(units, int) else 'up to ' + str(max(units))} units per layer",
    ]
    if run.launches:
        parts.append(f"first started {run.launches[0]['time'][:10]}")
    return " · ".join(parts)


def _results(run: RunFiles) -> str:
    rows, details = [], []
    for name, task in run.recipe.tasks.items():
        headline = run.headline(name)
        steps, values = run.metric(name, headline)
        if not values:
            continue
        best = int(np.argmax(values) if task.higher_is_better else np.argmin(values))
        metric = f"{headline} {'↑' if task.higher_is_better else '↓'}"
        rows.append((name, metric, values[0], values[-1], values[best], steps[best], type(task).__name__))
        details.append(html.folded(f"{name}: all metrics", _all_metrics(run, name)))
    if not rows:
        return html.note("The run has not been evaluated yet.")
    first, last = run.results[0]["step"], run.results[-1]["step"]
    head = ("task", "metric", f"step {first:,}", f"step {last:,}", "best", "at step", "kind")
    explained = html.note("Validation data; ↑ higher is better, ↓ lower is better.")
    return explained + html.table(head, rows) + "".join(details)


def _all_metrics(run: RunFiles, task: str) -> str:
    entries = [entry for entry in run.results if task in entry["metrics"]]
    shown = np.unique(np.linspace(0, len(entries) - 1, min(EVALUATIONS, len(entries))).round().astype(int))
    columns = [entries[index] for index in shown]
    names = list(dict.fromkeys(name for entry in columns for name in entry["metrics"][task]))
    rows = [(name, *(entry["metrics"][task].get(name, float("nan")) for entry in columns)) for name in names]
    return html.table(("metric", *(f"step {entry['step']:,}" for entry in columns)), rows)


def _curves(run: RunFiles) -> str:
    if not run.metrics:
        return html.note("There is no metrics.jsonl yet: the first line comes after log_every steps.")
    blocks = []
    for name, task in run.recipe.config.trained(run.recipe.tasks).items():
        steps, losses = run.losses(name)
        charts = [html.chart(partial(curves.draw_loss, steps=steps, losses=losses), f"training loss of {name} by step")]
        headline = run.headline(name)
        steps, values = run.metric(name, headline)
        draw = partial(
            curves.draw_metric, steps=steps, values=values, name=headline, higher_is_better=task.higher_is_better
        )
        charts.append(html.chart(draw, f"{headline} of {name} by step"))
        blocks.append(f"<div><h3>{name}</h3>{''.join(charts)}</div>")
    if run.routes is not None:
        temperature = html.chart(partial(curves.draw_temperature, lines=run.metrics), "temperature by step")
        blocks.append(f"<div><h3>controllers</h3>{temperature}</div>")
    return html.note("Points are single steps of the main rank, lines their mean over a window.") + html.grid(blocks)


def _time(run: RunFiles) -> str:
    total = sum(run.seconds.values())
    if not total:
        return html.note("There is no time.jsonl: the run is older than this record, or has not begun.")
    kinds = [kind for kind in _KINDS if kind in run.seconds]
    shares = [(_KINDS[kind], run.seconds[kind], colour) for kind, colour in zip(kinds, COLOURS, strict=False)]
    bar = "".join(f'<div style="flex:{part / total:.6f};background:{colour}"></div>' for _, part, colour in shares)
    legend = "".join(
        f'<span><i style="background:{colour}"></i>{name}: {_duration(part)} ({part / total:.1%})</span>'
        for name, part, colour in shares
    )
    steps, rates = run.pace()
    charts = [html.chart(partial(curves.draw_throughput, steps=steps, rates=rates), "images per second by step")]
    steps, parts = run.step_parts()
    if steps:
        named = {_KINDS[kind]: values for kind, values in parts.items()}
        charts.append(html.chart(partial(curves.draw_step_parts, steps=steps, parts=named), "seconds per step by part"))
    training = total - run.seconds.get("evaluation", 0.0) - run.seconds.get("checkpoint", 0.0)
    return (
        f"<p>{_duration(total)} of the main rank, starting up left out; {run.images:,} images in "
        f"{_duration(training)} of training: {run.images / max(training, 1e-9):.1f} images per second.</p>"
        f'<div class="bar">{bar}</div><div class="legend">{legend}</div>{html.grid(charts)}'
    )


def _duration(seconds: float) -> str:
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s"
    hours, minutes = divmod(whole // 60, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {whole % 60} s"


def _predictions(run: RunFiles, device: torch.device) -> str:
    try:
        trained = load_trained(run.folder, None, run.recipe)
    except UserError as error:
        return html.note(str(error))
    trained.model.to(device)
    blocks = [f"<h3>{name}</h3>{_pictures(trained, name, device)}" for name in run.recipe.tasks]
    return html.note(f"Validation images, at step {trained.step:,}: not chosen by hand.") + "".join(blocks)


def _pictures(trained: Trained, task: str, device: torch.device) -> str:
    try:
        pictures = sample_pictures(trained, task, SAMPLES, device)
    except (UserError, OSError) as error:
        return html.note(f"No pictures: {error}")
    return html.grid(html.image(address, f"{name} and what {task} finds in it") for name, address in pictures)


def _recipe(run: RunFiles) -> str:
    parts = []
    if run.launches:
        last = run.launches[-1]
        facts = [
            ("launches", str(len(run.launches))),
            ("last launch", last["time"]),
            ("command", " ".join(["gppf-ds", *map(str, last["command"][1:])])),
            ("gppf_ds", f"{last['gppf_ds']}, checkout {last['git'] or 'none'}"),
            ("seed", str(last["seed"])),
            *((name, version) for name, version in last["versions"].items()),
        ]
        parts.append(f'<div class="facts">{html.table(("", ""), facts)}</div>')
    parts.append(html.folded("the resolved recipe (config.yaml)", html.preformatted(_text(run))))
    return "".join(parts)


def _text(run: RunFiles) -> str:
    return (run.folder / "config.yaml").read_text()


def write(folder: Path, target: Path, device: torch.device) -> Path:
    """Writes the report of a run to a file; see :func:`build`."""
    content = build(folder, device)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(content, encoding="utf-8")
    return target
