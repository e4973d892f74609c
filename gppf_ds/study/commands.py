"""``gppf-ds study``."""

from __future__ import annotations

import argparse
import shlex
import sys
from functools import partial
from pathlib import Path

from gppf_ds.errors import UserError
from gppf_ds.study.plan import Run, Study, write_recipes
from gppf_ds.train import recipe
from gppf_ds.train.claims import Outcome, result, work


def study(arguments: list[str]) -> int:
    """Runs what is missing of a study (arms x seeds) and renders its tables and figures.

    Start the same command on as many machines as see the output folder, or several times on one: each worker takes
    runs that no other has, and a run that was cut off is resumed by whoever takes it next.
    """
    parser = argparse.ArgumentParser(prog="gppf-ds study", description=study.__doc__, allow_abbrev=False)
    parser.add_argument("file", type=Path, metavar="FILE", help="the study: arms, seeds, metrics (YAML)")
    parser.add_argument("--table", action="store_true", help="train nothing, render what there is")
    parser.add_argument(
        "--launch", help="what starts gppf-ds for one run, {ranks} standing for their number (default: see the docs)"
    )
    options = parser.parse_args(arguments)
    plan = Study(options.file)
    runs = plan.runs
    write_recipes(runs)
    failed: list[Run] = []
    if not options.table:
        _check(plan)
        failed = _train(runs, options.launch)

    from gppf_ds.study.results import collect
    from gppf_ds.study.tables import render

    print(render(plan, collect(plan)))
    return int(bool(failed))


def _check(plan: Study) -> None:
    """Judges the recipe and the data of every arm's first runs, but for those that start from runs still to come."""
    for arm in plan.config.arms:
        for run in plan.of(arm, plan.config.seeds[0]):
            if any(result(need.folder, need.steps) is None for need in run.needs):
                continue
            if result(run.folder, run.steps) is None:
                try:
                    recipe.check(recipe.read(["--config", str(run.recipe)]))
                except UserError as error:
                    raise UserError(f"{plan.path}: arms.{arm}: {error}") from error


def _train(runs: list[Run], launch: str | None) -> list[Run]:
    """Goes over the runs until a round brings nothing new, and returns those that failed here."""
    outcomes: dict[Path, Outcome] = {}
    while True:
        news = False
        for run in runs:
            if outcomes.get(run.folder) in ("done", "failed"):
                continue
            if any(result(need.folder, need.steps) is None for need in run.needs):
                continue
            outcomes[run.folder] = work(run.folder, partial(_missing, run, launch))
            news |= outcomes[run.folder] != "taken"
        if not news:
            return [run for run in runs if outcomes.get(run.folder) == "failed"]


def _missing(run: Run, launch: str | None) -> list[list[str]]:
    """The commands that a run still lacks: training, and evaluation of all tasks where it has frozen ones."""
    commands = []
    section = run.content.get("finetune") or {}
    if result(run.folder, run.steps) is None:
        words = [("finetune" if section.get("source") else "train"), "--config", str(run.recipe)]
        commands.append([*_launcher(run, launch), *words])
    if (run.content.get("frozen_tasks") or section.get("mode") == "grow") and not run.evaluation.is_file():
        words = ["evaluate", "--run", str(run.folder), "--output", str(run.evaluation)]
        commands.append([*_launcher(run, launch), *words])
    return commands


def _launcher(run: Run, launch: str | None) -> list[str]:
    if launch is not None:
        return [word.replace("{ranks}", str(run.ranks)) for word in shlex.split(launch)]
    if run.ranks == 1:
        return [sys.executable, "-m", "gppf_ds"]
    from gppf_ds.simt.rendezvous import free_port

    launcher = str(Path(sys.executable).with_name("deepspeed"))
    own = f"--master_port={free_port()}"  # two workers on one machine need two
    return [launcher, f"--num_accelerators={run.ranks}", own, "--module", "gppf_ds"]
