"""What a study compares: a YAML file of arms and seeds, and the runs that they come to."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import yaml
from jsonargparse import ArgumentParser

from gppf_ds.errors import UserError
from gppf_ds.train import record
from gppf_ds.train.inherit import Content, laid_over, resolve

Table = Literal["metrics", "differences", "curves", "costs"]
_NAME = re.compile(r"\w[\w .,+=-]*")
_RUN_OF = re.compile(r"\{([^{}/]+)(?:/([^{}/]+))?\}")
"""A value that stands for the folder of another arm's run of the same seed: {ARM}, {ARM/TASK}."""


@dataclass(kw_only=True)
class ArmConfig:
    """One of the ways that a study compares."""

    recipe: str | None = None
    """A recipe, relative to the study's file; the study's own if left out."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Laid over the recipe. A value "{ARM}" is the folder of that arm's run of the same seed, which runs first;
    "{ARM/TASK}" where it has a run for each task."""
    each_task: bool = False
    """A run for every task by itself, whose metrics stand side by side."""
    ranks: int = 1
    shown: bool = True
    """Whether it has a line in the tables; an arm may be there only for others to start from."""


@dataclass(kw_only=True)
class StudyConfig:
    """A study's file."""

    title: str
    question: str = ""
    """What it is to show, for the head of the tables."""
    output: str
    """Folder of all its runs."""
    recipe: str | None = None
    """What arms inherit that name no recipe of their own."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Laid over the recipe of every arm, below its own settings."""
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    baseline: str | None = None
    """The arm that the others' differences are taken from, seed by seed; the first that is shown if left out."""
    metrics: dict[str, list[str]] = field(default_factory=dict)
    """Of each task, by name; its headline for tasks that are left out."""
    tables: list[Table] = field(default_factory=lambda: ["metrics", "differences"])
    """metrics: mean and deviation over the seeds. differences: from the baseline, paired by seed. curves: how far the
    losses leave the baseline's of the same seed. costs: parameters and FLOPs of each arm's network."""
    arms: dict[str, ArmConfig] = field(default_factory=dict)


@dataclass(frozen=True)
class Run:
    """One run of a study, and those that have to be finished before it."""

    arm: str
    task: str | None
    """Where the arm has a run for each."""
    seed: int
    folder: Path
    content: Content
    """Its recipe, with nothing left to inherit."""
    ranks: int
    needs: tuple[Run, ...]

    @property
    def steps(self) -> int:
        """That it makes."""
        return int(self.content["steps"])

    @property
    def evaluation(self) -> Path:
        """The metrics of all its tasks, where some are frozen."""
        return self.folder / "evaluation.json"

    @property
    def recipe(self) -> Path:
        """Where the study writes its recipe."""
        return self.folder.with_name(f"{self.folder.name}.yaml")


class Study:
    """A study, read and expanded into runs.

    Args:
        path: of its YAML file.

    Raises:
        UserError: one sentence that names what is wrong in it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = _read(path)
        self.output = Path(self.config.output)
        self._runs: dict[tuple[str, int], tuple[Run, ...]] = {}
        self._open: list[str] = []

    @property
    def shown(self) -> list[str]:
        """The arms of the tables."""
        return [name for name, arm in self.config.arms.items() if arm.shown]

    @property
    def baseline(self) -> str:
        """The arm that differences are taken from."""
        return self.config.baseline or self.shown[0]

    @cached_property
    def runs(self) -> list[Run]:
        """All runs, one seed after the other, each after those it needs."""
        ordered: dict[Path, Run] = {}
        for seed in self.config.seeds:
            for arm in self.config.arms:
                for run in self.of(arm, seed):
                    for one in _with_needs(run):
                        ordered.setdefault(one.folder, one)
        return list(ordered.values())

    def of(self, arm: str, seed: int) -> tuple[Run, ...]:
        """An arm's runs of one seed: one, or one for each task."""
        if (arm, seed) not in self._runs:
            if arm in self._open:
                raise UserError(f"{self.path}: arms.{arm} needs itself ({' -> '.join([*self._open, arm])}).")
            self._open.append(arm)
            self._runs[arm, seed] = tuple(self._expanded(arm, seed))
            self._open.pop()
        return self._runs[arm, seed]

    def _expanded(self, name: str, seed: int) -> Iterator[Run]:
        arm, place = self.config.arms[name], f"{self.path}: arms.{name}"
        recipe = arm.recipe or self.config.recipe
        if recipe is None:
            raise UserError(f"{place} names no recipe: give it one, or the study one for all arms.")
        file = self.path.parent / recipe
        needs: list[Run] = []
        content = resolve([file]).content
        for where, settings in ((f"{self.path}: settings", self.config.settings), (place, arm.settings)):
            content = laid_over(content, self._filled(settings, where, seed, needs), where)
        if "steps" not in content:
            raise UserError(f"{place}: {file} has no steps.")
        tasks: list[str | None] = list(content.get("tasks") or {}) if arm.each_task else [None]
        stem = self.output / name.replace(" ", "_")
        for task in tasks:
            folder = stem / (f"seed{seed}" if task is None else f"seed{seed}_{task}")
            own: Content = {"output": str(folder), "seed": seed}
            if task is not None:
                own["tasks"] = {other: None for other in tasks if other != task}
            yield Run(name, task, seed, folder, laid_over(content, own, place), arm.ranks, tuple(needs))

    def _filled(self, value: Any, place: str, seed: int, needs: list[Run]) -> Any:
        """The value with folders in the place of the arms it names; their runs are added to ``needs``."""
        if isinstance(value, dict):
            return {key: self._filled(inner, place, seed, needs) for key, inner in value.items()}
        if not isinstance(value, str) or (found := _RUN_OF.fullmatch(value)) is None:
            return value
        arm, task = found.groups()
        if arm not in self.config.arms:
            raise UserError(f"{place} starts from {value}, but the arms are {', '.join(self.config.arms)}.")
        for run in self.of(arm, seed):
            if run.task == task:
                needs.append(run)
                return str(run.folder)
        raise UserError(
            f"{place}: {value} is not one run: arms with each_task are named {{{arm}/TASK}}, others {{{arm}}}."
        )


def _with_needs(run: Run) -> Iterator[Run]:
    for need in run.needs:
        yield from _with_needs(need)
    yield run


def _read(path: Path) -> StudyConfig:
    content = resolve([path]).content
    for place, found, kind in [
        ("", content, StudyConfig),
        *((f"arms.{name}.", arm, ArmConfig) for name, arm in _mapping(content.get("arms")).items()),
    ]:
        known = [one.name for one in fields(kind)]
        for key in _mapping(found):
            if key not in known:
                raise UserError(f"{path}: there is no {place}{key} in a study: choose from {', '.join(known)}.")
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(StudyConfig, None)
    try:
        parsed = parser.instantiate(parser.parse_object(content))
    except Exception as error:
        raise UserError(f"{path}: {' '.join(str(error).split()).rstrip('.')}.") from error
    config = StudyConfig(**vars(parsed))
    _judge(path, config)
    return config


def _judge(path: Path, config: StudyConfig) -> None:
    shown = [name for name, arm in config.arms.items() if arm.shown]
    if not shown:
        raise UserError(f"{path}: a study needs arms to compare: name them below arms.")
    for name, arm in config.arms.items():
        if not _NAME.fullmatch(name):
            raise UserError(
                f"{path}: the name of arms.{name} becomes a folder: use letters, digits and . , + = - only."
            )
        if arm.ranks < 1:
            raise UserError(f"{path}: arms.{name}.ranks must be at least 1, not {arm.ranks}.")
    if config.baseline is not None and config.baseline not in shown:
        raise UserError(f"{path}: baseline is {config.baseline!r}, but the arms that are shown are {', '.join(shown)}.")
    if not config.seeds or len(set(config.seeds)) < len(config.seeds) or min(config.seeds) < 0:
        raise UserError(f"{path}: seeds must be different numbers from 0 on, unlike {config.seeds}.")


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def write_recipes(runs: Sequence[Run]) -> None:
    """Writes every run's recipe beside its folder.

    Raises:
        UserError: a run has begun with other settings.
    """
    for run in runs:
        text = yaml.safe_dump(run.content, sort_keys=False)
        before = run.recipe.read_text() if run.recipe.is_file() else text
        if before != text and (run.folder / "config.yaml").is_file():
            found = (f"{key}: {old} then, {new} now" for key, old, new in record.differences(before, text))
            raise UserError(
                f"{run.folder} has begun with other settings ({next(found, 'the order of its keys')}): remove that "
                "folder to train it again, or name another output."
            )
        run.recipe.parent.mkdir(parents=True, exist_ok=True)
        pending = run.recipe.with_name(f".{run.recipe.name}.{os.getpid()}")
        pending.write_text(text)
        pending.replace(run.recipe)
