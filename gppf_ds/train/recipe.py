"""Recipes: YAML and command line in, a checked configuration and the tasks out."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NoReturn

import yaml
from jsonargparse import ActionConfigFile, ArgumentParser, Namespace, set_parsing_settings
from torch import nn

from gppf_ds.config import FinetuneConfig, MoePlan, RunConfig
from gppf_ds.errors import UserError
from gppf_ds.simt.deepspeed_config import deepspeed_config
from gppf_ds.simt.schedule import Schedule
from gppf_ds.tasks.task import Task
from gppf_ds.train.finetune import settle
from gppf_ds.train.inherit import resolve
from gppf_ds.train.moe_plan import as_mapping

set_parsing_settings(docstring_parse_attribute_docstrings=True)

RESERVED = {*dir(nn.ModuleDict()), *dir(nn.ParameterDict())}
"""Names that torch's containers, which hold the tasks' heads and controllers, keep for themselves (train, keys ...)."""

SMOKE_DATA = "smoke-data"
"""Folder of a smoke run's data, inside the run's own; what is in it is named after the sources."""
SMOKE_HELP = "two steps on tiny imitations of the data, in a folder of its own beside the output: does the recipe work?"
RESTARTS_HELP = "launch the run, and again from its last checkpoint when it fails: so often without a new checkpoint"
LAUNCH_HELP = "with --restarts: what starts gppf-ds on every rank: 'deepspeed --module gppf_ds' (default: one process)"


@dataclass
class Recipe:
    """A run, ready to start."""

    config: RunConfig
    tasks: dict[str, Task]
    text: str
    """The resolved configuration as YAML."""


class _Parser(ArgumentParser):
    """Ends with one sentence instead of the whole usage."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        raise UserError(" ".join(message.split()).rstrip(".") + " (see gppf-ds train --help).")


def parser(program: str = "gppf-ds train") -> ArgumentParser:
    """The parser of a whole run: --config files (later ones win), then overrides on the line."""
    description = "Trains a recipe. Several --config files are merged from left to right."
    made = _Parser(prog=program, description=description)
    made.add_argument("--config", action=ActionConfigFile, help="a recipe (YAML); it may inherit another one")
    if program in ("gppf-ds train", "gppf-ds finetune"):
        made.add_argument("--smoke", action="store_true", help=SMOKE_HELP)
        made.add_argument("--restarts", type=int, help=RESTARTS_HELP)
        made.add_argument("--launch", help=LAUNCH_HELP)
    made.add_class_arguments(RunConfig, None)
    made.add_argument(
        "--tasks", type=dict[str, Task], required=True, help="the tasks by name, each with class_path and init_args"
    )
    return made


def read(arguments: list[str], program: str = "gppf-ds train") -> Recipe:
    """The recipe that the command line names.

    Raises:
        UserError: one sentence that names the file and the key, and the remedy.
    """
    files = argparse.ArgumentParser(prog=program, add_help=False, allow_abbrev=False)
    files.add_argument("--config", type=Path, action="append", default=[])
    options, rest = files.parse_known_args(arguments)
    resolved = resolve(options.config)
    for argument in rest:
        resolved.places.pop(argument.removeprefix("--").partition("=")[0], None)
    content, rest = _with_finetune(resolved.content, rest)
    try:
        return from_content(settle(content, smoke="--smoke" in rest), rest, program)
    except UserError as error:
        raise UserError(f"{error}{resolved.place(str(error))}") from error


def _with_finetune(content: dict[str, Any], arguments: list[str]) -> tuple[dict[str, Any], list[str]]:
    """The section ``finetune`` with what the command line says of it, which the rest of the recipe follows from.

    Returns:
        The content, and the other arguments.
    """
    flags = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in (field.name for field in fields(FinetuneConfig)):
        flags.add_argument(f"--finetune.{name}", dest=name, type=yaml.safe_load, default=argparse.SUPPRESS)
    for name in (field.name for field in fields(MoePlan)):
        flags.add_argument(
            f"--finetune.plan.{name}", dest=f"plan.{name}", type=yaml.safe_load, default=argparse.SUPPRESS
        )
    found, rest = flags.parse_known_args(arguments)
    given = vars(found)
    if not given:
        return content, arguments
    section = {**(content.get("finetune") or {}), **{key: value for key, value in given.items() if "." not in key}}
    if own := {key.removeprefix("plan."): value for key, value in given.items() if "." in key}:
        section["plan"] = {**as_mapping(section.get("plan")), **own}
    return {**content, "finetune": section}, rest


def from_content(content: dict[str, Any], overrides: Sequence[str] = (), program: str = "gppf-ds train") -> Recipe:
    """The recipe with this content, as :attr:`Recipe.text` has it.

    Args:
        content: by key.
        overrides: arguments of the command line.
        program: its name, for messages.

    Raises:
        UserError: one sentence that names the key and the remedy.
    """
    made = parser(program)
    text = ["--config", yaml.safe_dump(content, sort_keys=False)] if content else []
    try:
        parsed = made.parse_args([*text, *overrides])
    except UserError:
        _judge_tasks_one_by_one(content.get("tasks"))
        raise
    parsed = Namespace(**{k: v for k, v in parsed.items() if k not in ("config", "smoke", "restarts", "launch")})
    settings = made.instantiate(Namespace(**{k: v for k, v in parsed.items() if k != "tasks"}))
    tasks: dict[str, Task] = {}
    for name, specification in parsed.tasks.items():
        if not name.isidentifier():
            raise UserError(f"tasks.{name}: a task's name must be a plain identifier (letters, digits, underscores).")
        if name in RESERVED:
            raise UserError(f"tasks.{name}: a task cannot have this name, which torch uses itself: choose another.")
        try:
            tasks[name] = made.instantiate(Namespace(tasks={name: specification})).tasks[name]
        except UserError as error:
            raise UserError(f"tasks.{name}: {error}") from error
    return Recipe(RunConfig(**vars(settings)), tasks, made.dump(parsed, skip_none=False))


def _judge_tasks_one_by_one(tasks: Any) -> None:
    """Raises a sentence that names the task, if one of the tasks is what the parser stumbled over."""
    single = _Parser()
    single.add_argument("--task", type=Task)
    for name, specification in tasks.items() if isinstance(tasks, dict) else ():
        try:
            single.parse_object({"task": specification})
        except UserError as error:
            raise UserError(f"tasks.{name}: {error}") from error


def read_run(folder: Path) -> Recipe:
    """The recipe that a run folder was made with; of a smoke run also its tiny data."""
    path = folder / "config.yaml"
    if not path.is_file():
        raise UserError(f"{folder} is no run: it has no config.yaml (give the folder that training wrote).")
    run = from_content(resolve([path]).content)
    if (folder / SMOKE_DATA).is_dir():
        use_smoke_data(run, folder)
    return run


def use_smoke_data(recipe: Recipe, folder: Path) -> None:
    """Lets the tasks read the tiny imitations of their data in the folder of a smoke run."""
    for name, task in recipe.tasks.items():
        try:
            task.use_data(folder / SMOKE_DATA / str(task.source))
            task.shrink()
        except UserError as error:
            raise UserError(f"tasks.{name}: {error}") from error


def check(recipe: Recipe) -> None:
    """Everything that can be judged before a process group exists: settings against each other, then the data.

    Raises:
        UserError: one sentence that names the key or the file, and the remedy.
    """
    for name in recipe.config.frozen_tasks:
        if name not in recipe.tasks:
            raise UserError(f"frozen_tasks: there is no task {name!r}: choose from {', '.join(recipe.tasks)}.")
    tasks = recipe.config.trained(recipe.tasks)
    if not tasks:
        raise UserError("frozen_tasks leaves no task to train: take one out.")
    weights, engine = {name: task.weight for name, task in tasks.items()}, recipe.config.engine
    Schedule.from_weights(
        weights, recipe.config.schedule, recipe.config.seed, engine.devices_per_rank, engine.accumulation
    )
    deepspeed_config(recipe.config, "fp32")
    source = recipe.config.backbone.pretrained
    if source is not None and source.partition(":")[0] != "timm" and not Path(source).is_file():
        raise UserError(f"backbone.pretrained: there is no file {source}: name a checkpoint, or timm for its own.")
    for name, task in tasks.items():
        try:
            task.check()
        except UserError as error:
            raise UserError(f"tasks.{name}: {error}") from error
