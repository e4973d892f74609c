"""Recipes: YAML and command line in, a checked configuration and the tasks out."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import NoReturn

import yaml
from jsonargparse import ActionConfigFile, ArgumentParser, Namespace, set_parsing_settings
from torch import nn

from gppf_ds.config import RunConfig
from gppf_ds.errors import UserError
from gppf_ds.simt.deepspeed_config import deepspeed_config
from gppf_ds.simt.schedule import Schedule
from gppf_ds.tasks.task import Task

set_parsing_settings(docstring_parse_attribute_docstrings=True)

RESERVED = {*dir(nn.ModuleDict()), *dir(nn.ParameterDict())}
"""Names that torch's containers, which hold the tasks' heads and controllers, keep for themselves (train, keys ...)."""


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
    made = _Parser(prog=program, description="Trains a recipe. Several --config files are merged from left to right.")
    made.add_argument("--config", action=ActionConfigFile, help="a recipe (YAML)")
    made.add_class_arguments(RunConfig, None)
    made.add_argument(
        "--tasks", type=dict[str, Task], required=True, help="the tasks by name, each with class_path and init_args"
    )
    return made


def read(arguments: list[str], program: str = "gppf-ds train") -> Recipe:
    """The recipe that the command line names.

    Raises:
        UserError: one sentence that names the key and the remedy.
    """
    made = parser(program)
    try:
        parsed = made.parse_args(arguments)
    except UserError:
        _judge_tasks_one_by_one(arguments)
        raise
    settings = made.instantiate(Namespace(**{k: v for k, v in parsed.items() if k not in ("config", "tasks")}))
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


def _judge_tasks_one_by_one(arguments: list[str]) -> None:
    """Raises a sentence that names the task, if one of the tasks in the files is what the parser stumbled over."""
    single = _Parser()
    single.add_argument("--task", type=Task)
    for option, path in pairwise(arguments):
        if option != "--config":
            continue
        try:
            content = yaml.safe_load(Path(path).read_text())
        except (OSError, yaml.YAMLError):
            continue
        tasks = content.get("tasks") if isinstance(content, dict) else None
        for name, specification in tasks.items() if isinstance(tasks, dict) else ():
            try:
                single.parse_object({"task": specification})
            except UserError as error:
                raise UserError(f"tasks.{name}: {error}") from error


def read_run(folder: Path) -> Recipe:
    """The recipe that a run folder was made with."""
    path = folder / "config.yaml"
    if not path.is_file():
        raise UserError(f"{folder} is no run: it has no config.yaml (give the folder that training wrote).")
    return read(["--config", str(path)])


def check(recipe: Recipe) -> None:
    """Everything that can be judged before a process group exists: settings against each other, then the data.

    Raises:
        UserError: one sentence that names the key or the file, and the remedy.
    """
    Schedule.from_weights({n: t.weight for n, t in recipe.tasks.items()}, recipe.config.schedule, recipe.config.seed)
    deepspeed_config(recipe.config, "fp32")
    for name, task in recipe.tasks.items():
        try:
            task.check()
        except UserError as error:
            raise UserError(f"tasks.{name}: {error}") from error
