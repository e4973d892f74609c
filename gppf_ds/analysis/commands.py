"""``gppf-ds analyze``, ``gppf-ds report`` and ``gppf-ds summary``."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from gppf_ds.errors import UserError
from gppf_ds.train import recipe
from gppf_ds.train.table import aligned


def analyze(arguments: list[str]) -> int:
    """Draws what a run learnt: its routes, its use of experts, or how alike its layers see a task's images."""
    parser = argparse.ArgumentParser(prog="gppf-ds analyze", description=analyze.__doc__)
    kinds = parser.add_subparsers(dest="kind", required=True)
    routes = kinds.add_parser("routes", help="the units that tasks choose: map, learning curves, certainty, tree")
    routes.add_argument("run", type=Path, metavar="RUN", help="the run's output folder")
    routes.add_argument("--checkpoint", type=Path, help="a checkpoint folder (default: the run's last)")
    routes.add_argument("--output", type=Path, help="folder for pictures and numbers (default: RUN/analysis)")
    cka = kinds.add_parser("cka", help="minibatch CKA between layers, within a path and across two")
    cka.add_argument("run", type=Path, nargs="+", metavar="RUN", help="one run's output folder, or two")
    cka.add_argument("--task", required=True, help="the task of the first run whose val images all see")
    cka.add_argument(
        "--path", nargs="+", metavar="TASK", help="whose path to take, of each run, or two of one run (default: --task)"
    )
    cka.add_argument("--images", type=int, default=1000, help="at most (%(default)s); chosen at random")
    cka.add_argument("--batch", type=int, default=32, help="images of a minibatch (%(default)s)")
    cka.add_argument("--output", type=Path, help="folder for pictures and numbers (default: the first RUN/analysis)")
    experts = kinds.add_parser("experts", help="token-level experts: the share of each task's choices, by layer")
    experts.add_argument("run", type=Path, metavar="RUN", help="the run's output folder")
    experts.add_argument("--checkpoint", type=Path, help="a checkpoint folder (default: the run's last)")
    experts.add_argument(
        "--images",
        type=int,
        default=0,
        help="count the choices of at most so many val images of each task (default: 0, the shares kept in training)",
    )
    experts.add_argument("--output", type=Path, help="folder for pictures and numbers (default: RUN/analysis)")
    options = parser.parse_args(arguments)
    return {"routes": _routes, "cka": _cka, "experts": _experts}[options.kind](options)


def _experts(options: argparse.Namespace) -> int:
    run = recipe.read_run(options.run)

    import numpy as np
    import torch

    from gppf_ds.analysis import experts
    from gppf_ds.analysis.style import save
    from gppf_ds.backbone.moe.selections import as_array, running
    from gppf_ds.train.calibration import count_selections
    from gppf_ds.train.restore import load_trained

    trained = load_trained(options.run, options.checkpoint, run)
    layout = trained.model.backbone.layout
    if layout is None:
        raise UserError(f"{options.run} has no token-level experts (backbone.moe): see gppf-ds analyze routes.")
    if options.images:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        trained.model.to(device)
        trained.controller.to(device)
        selections = count_selections(trained, list(run.tasks), options.images, device)
    else:
        selections = running(trained.model.named_buffers(), layout)
    shares, tasks, layers = as_array(selections, layout)
    folder = options.output or options.run / "analysis"
    there = np.array([[e in layout.experts[layer] for e in range(shares.shape[-1])] for layer in layers])
    files = save(experts.usage_matrix(np.where(there, shares, np.nan), tasks, layers), folder / "experts")
    files += save(experts.mutual_information_by_layer(shares, layers), folder / "experts_information")
    numbers = folder / "experts.json"
    content: dict[str, object] = {"step": trained.step, "images": options.images, "tasks": tasks, "layers": layers}
    figures = {"shares": shares, "mutual_information": experts.mutual_information(shares)}
    content |= {name: np.where(np.isnan(values), np.array(None), values).tolist() for name, values in figures.items()}
    text = json.dumps(content, indent=1)
    numbers.write_text(text + "\n")
    print(*files, numbers, sep="\n")
    return 0


def _routes(options: argparse.Namespace) -> int:
    run = recipe.read_run(options.run)

    import numpy as np

    from gppf_ds.analysis import route_figures
    from gppf_ds.analysis.routes import as_numbers, paths
    from gppf_ds.analysis.style import save
    from gppf_ds.train.restore import load_trained
    from gppf_ds.train.route_record import read_routes

    record = read_routes(options.run)
    trained = load_trained(options.run, options.checkpoint, run)
    folder = options.output or options.run / "analysis"
    tasks, backbone = list(run.tasks), trained.model.backbone
    layers = [str(layer.name) for layer in backbone.layers]
    values = np.stack([trained.controller.probabilities(task).detach().double().numpy() for task in tasks])
    files = save(route_figures.selection_map(values, tasks, layers, backbone.units), folder / "selection")
    if len(tasks) > 1:
        files += save(route_figures.tree(paths(values), tasks), folder / "task_tree")
    if record is not None:
        record = record.ordered(tasks)
        files += save(route_figures.selection_curves(record), folder / "selection_curves")
        files += save(route_figures.certainty(record), folder / "certainty")
    numbers = folder / "routes.json"
    numbers.write_text(json.dumps({"step": trained.step, **as_numbers(values, tasks, layers)}, indent=1) + "\n")
    print(*files, numbers, sep="\n")
    if record is None:
        print(f"{options.run} has no routes.jsonl: there are no curves over time to draw")
    return 0


def _cka(options: argparse.Namespace) -> int:
    pairs = _sides(options)

    import torch

    from gppf_ds.analysis import compare
    from gppf_ds.analysis.style import save
    from gppf_ds.train.restore import load_trained

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    loaded = {folder: load_trained(folder, None, recipe.read_run(folder)) for folder in options.run}
    for trained in loaded.values():
        trained.model.to(device)
    sides = [compare.Side(folder.resolve().name, loaded[folder], path) for folder, path in pairs]
    for side in sides:
        side.trained.require_tasks([side.path])
    first = loaded[options.run[0]]
    first.require_tasks([options.task])
    config = first.recipe.config
    images = compare.Images(
        options.task, first.recipe.tasks[options.task], options.images, options.batch, config.seed, config.loader
    )
    estimator, values = compare.compare(sides, images, device)
    seen = f"{estimator.images} val images of {options.task}, in batches of {estimator.images // estimator.batches}"
    stem = (options.output or options.run[0] / "analysis") / f"cka_{options.task}"
    files = save(compare.heat_maps(sides, values, seen), stem)
    numbers = stem.with_suffix(".json")
    numbers.write_text(json.dumps(compare.as_numbers(sides, values, seen), indent=1) + "\n")
    print(*files, numbers, sep="\n")
    return 0


def _sides(options: argparse.Namespace) -> list[tuple[Path, str]]:
    """The run and the path of each of the one or two sides."""
    runs, named = options.run, options.path or [options.task]
    if len(runs) > 2 or len(named) > 2:
        raise UserError("--run and --path take one or two names each: compare more in pairs.")
    if options.batch < 4 or options.images < 4:
        raise UserError("--batch and --images must be at least 4: the unbiased estimator takes that many images.")
    count = max(len(runs), len(named))
    return list(zip((runs * count)[:count], (named * count)[:count], strict=True))


def report(arguments: list[str]) -> int:
    """Writes a run as one html file: results, curves, routes, time, sample predictions, recipe."""
    parser = argparse.ArgumentParser(prog="gppf-ds report", description=report.__doc__)
    parser.add_argument("run", type=Path, metavar="RUN", help="the run's output folder")
    parser.add_argument("--output", type=Path, help="the file to write (default: RUN/report.html)")
    options = parser.parse_args(arguments)

    import torch

    from gppf_ds.analysis import report as reporting

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(reporting.write(options.run, options.output or options.run / "report.html", device))
    return 0


def summary(arguments: list[str]) -> int:
    """Prints a run's headline metrics before and after training, and the paths of what it wrote."""
    parser = argparse.ArgumentParser(prog="gppf-ds summary", description=summary.__doc__)
    parser.add_argument("--run", type=Path, required=True, help="the run's output folder")
    options = parser.parse_args(arguments)
    run = recipe.read_run(options.run)

    from gppf_ds.train import checkpoint

    path = options.run / "results.json"
    if not path.is_file():
        raise UserError(f"{options.run} has no results.json: train it first.")
    entries = json.loads(path.read_text())
    before, after = entries[0], entries[-1]
    rows: list[tuple[str, ...]] = [("task", "metric", f"step {before['step']}", f"step {after['step']}")]
    for name, task in run.tasks.items():
        values = [entry["metrics"][name][task.headline] for entry in (before, after)]
        arrow = "" if task.higher_is_better else " (lower is better)"
        rows.append((name, task.headline + arrow, *(f"{value:.4f}" for value in values)))
    print(*aligned(rows), "", sep="\n")
    saved = checkpoint.complete(options.run / "checkpoints")
    written = [
        *saved[-1:],
        *sorted(options.run.glob("report.html")),
        *sorted(options.run.glob("analysis/*.png")),
        *sorted(options.run.glob("exports/*/*.safetensors")),
    ]
    for item in written:
        print(item)
    return 0
