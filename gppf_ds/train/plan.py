"""``gppf-ds plan``: what a recipe's steps will take on this hardware, and how to lose less time waiting."""

from __future__ import annotations

import argparse
import datetime
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from gppf_ds.config import RunConfig, ScheduleConfig
from gppf_ds.data.catalogue import SOURCES
from gppf_ds.errors import UserError
from gppf_ds.simt.schedule import Schedule
from gppf_ds.tasks.task import Task
from gppf_ds.train import cost_file, faults, rebalance, recipe
from gppf_ds.train.simulation import Costs, Forecast, Layout, Tasks, simulate
from gppf_ds.train.table import ruled

AIM = 0.9
"""The busy share that --balance is after."""
SIMULATED = 200
"""Steps of the schedule to go through."""
REPEATS = 7
"""Steps of each task, and of each of its two batch sizes, to take the median of."""
BY_WEIGHT = ("iid", "stratified", "balanced", "per_batch")
"""Kinds of schedule that give every task its share."""
DAY = 86400.0
GIBI = 2**30


def plan(arguments: list[str]) -> int:
    """Says what a recipe's steps will take: the share of the time that ranks are busy, images per task and day, epochs,
    effective learning rates, and when it will be done.

    Each task's step time and memory are measured on this machine with the recipe's own data (start it under the
    launcher to measure with several ranks and their communication), or told in a file. Then the schedule is simulated.
    All other arguments are those of gppf-ds train.
    """
    parser = argparse.ArgumentParser(prog="gppf-ds plan", description=plan.__doc__, allow_abbrev=False)
    parser.add_argument("recipe", type=Path, metavar="RECIPE")
    parser.add_argument("--devices", type=int, required=True, metavar="N", help="GPUs (ranks) that the run will have")
    parser.add_argument("--costs", type=Path, metavar="FILE", help="seconds and memory by task, to be used unmeasured")
    parser.add_argument("--save-costs", type=Path, metavar="FILE", help="write what was measured, for --costs")
    parser.add_argument(
        "--balance", type=Path, metavar="FILE", help=f"write a recipe whose ranks are busy for more than {AIM:.0%}%"
    )
    options, rest = parser.parse_known_args(arguments)
    if options.devices < 1:
        raise UserError(f"--devices must be at least 1, not {options.devices}: it is the number of GPUs (ranks).")
    if options.balance and rest:
        raise UserError(f"--balance writes a recipe that inherits RECIPE: put {rest[0]} into that instead.")
    run = recipe.read(["--config", str(options.recipe), *rest], "gppf-ds plan")
    tasks = run.config.trained(run.tasks)
    if options.costs:
        costs = cost_file.read(options.costs, {name: task.batch_size for name, task in tasks.items()})
        sizes, origin = official_sizes(tasks), f"told by {options.costs}"
    else:
        costs, sizes, origin = _measure(run)
    if os.environ.get("RANK", "0") != "0":
        return 0
    if options.save_costs:
        cost_file.write(options.save_costs, costs)
    forecast, layout = foresee(run.config, tasks, costs, options.devices)
    print(f"{options.recipe.name}: schedule.kind {run.config.schedule.kind}, {_devices(layout)}; costs {origin}\n")
    print(report(run.config, tasks, costs, forecast, sizes))
    if options.balance:
        print(f"\n{balance(run.config, tasks, costs, layout, options.recipe, options.balance, forecast)}")
    return 0


def foresee(config: RunConfig, tasks: Mapping[str, Task], costs: Costs, ranks: int) -> tuple[Forecast, Layout]:
    """Simulates the recipe's own schedule.

    Args:
        config: of the run.
        tasks: that it trains.
        costs: of these.
        ranks: that it will have.

    Raises:
        UserError: the schedule does not suit the tasks.
    """
    layout = Layout(ranks, config.engine.devices_per_rank, config.engine.accumulation)
    steps = range(min(SIMULATED, config.steps))
    forecast = simulate(_schedule(config, tasks, config.schedule, layout), costs, layout, steps)
    if config.schedule.kind in BY_WEIGHT:  # the expectation, which some steps only come near
        total = sum(task.weight for task in tasks.values())
        devices = {name: layout.devices * task.weight / total for name, task in tasks.items()}
        forecast = replace(forecast, devices=devices)
    return forecast, layout


def _schedule(config: RunConfig, tasks: Mapping[str, Task], settings: ScheduleConfig, layout: Layout) -> Tasks:
    weights = {name: task.weight for name, task in tasks.items()}
    schedule = Schedule.from_weights(weights, settings, config.seed, layout.per_rank, layout.groups)
    return lambda step: schedule(step, layout.devices)


def balance(
    config: RunConfig,
    tasks: Mapping[str, Task],
    costs: Costs,
    layout: Layout,
    base: Path,
    file: Path,
    before: Forecast,
) -> str:
    """Compares ways to balance a recipe, writes the best as a recipe, and returns the comparison as a table.

    Raises:
        UserError: a kind of schedule without shares by weight, a file that is there already, or too little memory.
    """
    if config.schedule.kind not in set(BY_WEIGHT) - {"per_batch"}:
        raise UserError(
            f"--balance keeps the shares that the weights give, but schedule.kind {config.schedule.kind} has none of "
            "them: set it to iid, stratified or balanced."
        )
    steps = range(min(SIMULATED, config.steps))
    proposals = rebalance.propose(costs, layout, lambda kind, at: _schedule(config, tasks, kind, at), steps)
    best = rebalance.choose(proposals, AIM)
    why = f"By gppf-ds plan for {layout.ranks} ranks: busy share {before.busy:.0%} -> {best.forecast.busy:.0%}."
    sizes = {name: task.batch_size for name, task in tasks.items()}
    rebalance.write_recipe(file, base, f"{config.output}-balanced", best, sizes, why)
    rows: list[tuple[str, ...]] = [("", "devices/rank", "batch sizes", "busy", "ms", "images/s", "GiB")]
    rows.append(("as it is", *_summary(layout, before)))
    for proposal in proposals:
        verdict = "taken" if proposal is best else "" if proposal.fits else "too big"
        rows.append((verdict, *_summary(proposal.layout, proposal.forecast)))
    reached = "" if best.forecast.busy >= AIM else f"; no proposal reaches {AIM:.0%}"
    return f"{ruled(rows)}\n\n{file} written: busy {before.busy:.1%} -> {best.forecast.busy:.1%}{reached}"


def _summary(layout: Layout, forecast: Forecast) -> tuple[str, ...]:
    images = sum(map(forecast.images, forecast.devices)) / forecast.step_seconds
    return (
        str(layout.per_rank),
        " ".join(map(str, forecast.batch_sizes.values())),
        f"{forecast.busy:.1%}",
        f"{1000 * forecast.step_seconds:.1f}",
        f"{images:.1f}",
        _gib(forecast.memory),
    )


def _measure(run: recipe.Recipe) -> tuple[Costs, dict[str, int], str]:
    recipe.check(run)
    # torch and DeepSpeed are imported only for a recipe that can run.
    import torch
    import torch.distributed as dist

    from gppf_ds.simt.agreement import agree
    from gppf_ds.simt.job import start_distributed
    from gppf_ds.train.measure import measure
    from gppf_ds.train.record import fingerprint

    try:
        device = start_distributed(run.config.engine.timeout)
        agree(fingerprint(run.text))
        costs, sizes = measure(run, device, REPEATS)
        ranks = dist.get_world_size()
    except BaseException as error:
        faults.fail(error)
    dist.destroy_process_group()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    return costs, sizes, f"measured on {ranks} rank{'s' * (ranks > 1)} ({name})"


def official_sizes(tasks: Mapping[str, Task]) -> dict[str, int]:
    """Training images of the tasks' public data sets; a task with data of its own is left out."""
    found = {}
    for name, task in tasks.items():
        counts = SOURCES[task.source].counts if task.source in SOURCES else {}
        images = sum(count for what, count in counts.items() if what.startswith(("train", "aug")))
        if images:
            found[name] = images
    return found


def report(
    config: RunConfig, tasks: Mapping[str, Task], costs: Costs, forecast: Forecast, sizes: Mapping[str, int]
) -> str:
    """A table of the tasks, and a summary of the step and the run.

    Args:
        config: of the run.
        tasks: that it trains.
        costs: of these.
        forecast: of the run's steps.
        sizes: of the training sets that are known.
    """
    devices = sum(forecast.devices.values())
    rate = config.optimizer.learning_rate
    rows = [("task", "batch", "ms", "GiB", "devices", "images/day", "epochs", "rate shared", "rate own")]
    for name, task in tasks.items():
        cost, images = costs.tasks[name], forecast.images(name)
        epochs = f"{config.steps * images / sizes[name]:.2f}" if name in sizes else "?"
        # With accumulate the gradients of the tasks' means are added up, otherwise averaged over all devices.
        share = 1.0 if config.schedule.kind == "accumulate" else forecast.devices[name] / devices
        shared, own = share * task.loss_weight * rate, forecast.present[name] * task.loss_weight * rate
        day = images * DAY / forecast.step_seconds
        parts = "" if len(cost.seconds) == 1 else f" ({' + '.join(f'{1000 * part:.1f}' for part in cost.seconds)})"
        rows.append(
            (
                name,
                str(task.batch_size),
                f"{1000 * sum(cost.seconds):.1f}{parts}",
                _gib(cost.memory),
                f"{forecast.devices[name]:.2f}",
                f"{day:,.0f}",
                epochs,
                f"{shared:.2e}",
                f"{own:.2e}",
            )
        )
    return f"{ruled(rows)}\n\n{_of_the_run(config, costs, forecast)}"


def _of_the_run(config: RunConfig, costs: Costs, forecast: Forecast) -> str:
    images = sum(map(forecast.images, forecast.devices)) / forecast.step_seconds
    left = datetime.timedelta(seconds=round(config.steps * forecast.step_seconds))
    done = datetime.datetime.now() + left
    alike = costs.alike(config.engine.accumulation)
    room = "" if costs.capacity is None else f" of {costs.capacity / GIBI:.1f}"
    return "\n".join(
        [
            f"step: {1000 * forecast.step_seconds:.1f} ms ({1000 * alike:.1f} ms of it on every rank alike), "
            f"{images:.1f} images/s",
            f"busy: {forecast.busy:.1%} (for {1 - forecast.busy:.1%} of the time a rank waits for a slower one)",
            f"memory: {_gib(forecast.memory)}{room} GiB on the fullest rank "
            f"({_gib(costs.memory)} GiB of it between steps)",
            f"finish: {config.steps:,} steps take {left}, started now until {done:%Y-%m-%d %H:%M}; evaluations, "
            "checkpoints and waiting for data come on top",
        ]
    )


def _gib(count: float) -> str:
    return f"{count / GIBI:.2f}" if count else "?"


def _devices(layout: Layout) -> str:
    parts = f"{layout.ranks} ranks x {layout.per_rank} devices"
    return f"{parts} x {layout.groups} groups" if layout.groups > 1 else parts
