"""The runs behind transfer_table.py and transfer_advice.py: pre-training on the demo, fine-tuning on other data.

Every run is a recipe of benchmarks/transfer with a few settings laid over it, given to ``gppf-ds`` as a user would. A
run that has come to its end is not run again, and one that was cut off goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import harness
import yaml

from gppf_ds.train import claims, recipe

RECIPES = harness.HERE / "transfer"
PRETRAINED = ("digits", "objects", "regions", "distance")
ALONE = {"schedule": {"kind": "iid", "static": []}, "engine": {"devices_per_rank": 1}}
"""One task in place of the pre-training's four, one on each virtual device."""


@dataclass(frozen=True)
class Target:
    """A new task, in the recipe of its name."""

    name: str
    kin: str
    """The task of the pre-training that is of its kind."""
    data: tuple[str, str]
    """The argument that names its data, and their place in the data pack."""


TARGETS = {
    target.name: target
    for target in (
        Target("clothing", "digits", ("data", "classification/clothing")),
        Target("cells", "objects", ("data_root", "detection/bccd")),
        Target("streets", "regions", ("data_root", "segmentation/camvid")),
    )
}


@dataclass(frozen=True)
class Settings:
    """What the runs of a folder have in common."""

    pretrain_steps: int
    steps: int


@dataclass(frozen=True)
class Run:
    """One run, and those that have to be finished before it."""

    name: str
    command: str
    """Of gppf-ds: train or finetune."""
    content: Mapping[str, Any]
    """Its recipe."""
    after: tuple[Run, ...] = ()


class Plan:
    """All runs of one seed.

    Args:
        seed: of every run.
        settings: of every run.
        pack: the folder of the data pack.
    """

    def __init__(self, seed: int, settings: Settings, pack: Path) -> None:
        self.seed, self.settings, self.pack = seed, settings, pack

    def pretrained(self, task: str | None = None) -> Run:
        """The pre-training on all tasks, or on one alone (as many batches of it) with one unit per layer."""
        steps = self.settings.pretrain_steps
        if task is None:
            return self._run("pretrained", "train", "pretrain", steps, {})
        others: dict[str, Any] = {"tasks": {name: None for name in PRETRAINED if name != task}}
        return self._run(
            f"pretrained_{task}", "train", "pretrain", steps, {**ALONE, **others, "backbone": {"units": 1}}
        )

    def scratch(self, target: Target) -> Run:
        """The plain network, not pre-trained."""
        return self._tuned(target, "scratch", {"backbone": {"units": 1}})

    def single(self, target: Target) -> Run:
        """The plain network after pre-training on the task of the target's kind alone."""
        source = self.pretrained(target.kin)
        return self._tuned(target, "single", {"finetune": {"mode": "fixed", "path": target.kin}}, source)

    def fixed(self, target: Target, path: str) -> Run:
        """The plain network on the path of one of the tasks of the multi-task pre-training."""
        return self._tuned(target, f"from_{path}", {"finetune": {"mode": "fixed", "path": path}}, self.pretrained())

    def dynamic(self, target: Target) -> Run:
        """All units of the multi-task pre-training, and a new controller."""
        return self._tuned(target, "dynamic", {"finetune": {"mode": "dynamic"}}, self.pretrained())

    def retrain(self, target: Target) -> Run:
        """The plain network on the path that :meth:`dynamic` found, from the weights of the pre-training."""
        dynamic = self.dynamic(target)
        section = {"mode": "retrain", "path": dynamic.name}
        return self._tuned(target, "retrain", {"finetune": section}, self.pretrained(), dynamic)

    def recipe(self, target: Target) -> dict[str, Any]:
        """The target's recipe, its data in the data pack."""
        argument, place = target.data
        data = {argument: str((self.pack / place).resolve())}
        return {"inherit": str(RECIPES / f"{target.name}.yaml"), "tasks": {target.name: {"init_args": data}}}

    def _tuned(self, target: Target, arm: str, changes: dict[str, Any], *after: Run) -> Run:
        content = {**self.recipe(target), **changes}
        if after:
            content["finetune"]["source"] = after[0].name
        name, command = f"{target.name}_{arm}", "finetune" if after else "train"
        return self._run(name, command, target.name, self.settings.steps, content, after)

    def _run(
        self, name: str, command: str, base: str, steps: int, content: dict[str, Any], after: Sequence[Run] = ()
    ) -> Run:
        output = f"seed{self.seed}/{name}"
        own = {"inherit": str(RECIPES / f"{base}.yaml"), "output": output, "seed": self.seed, "steps": steps}
        warm_up = {"optimizer": {"warmup_steps": steps // 10}}
        return Run(output, command, {**own, **warm_up, **content}, tuple(after))


class Workplace:
    """The folder where the runs are.

    Args:
        folder: made where it is missing; the demo data go there, too.
        settings: of its runs; other ones need another folder.
        limit: seconds that a run may take.
    """

    def __init__(self, folder: Path, settings: Settings, limit: float) -> None:
        self.folder, self.limit = folder, limit
        folder.mkdir(parents=True, exist_ok=True)
        kept = folder / "settings.json"
        if kept.is_file() and json.loads(kept.read_text()) != asdict(settings):
            sys.exit(f"{folder} holds runs with other settings ({kept.read_text()}): name another --folder.")
        kept.write_text(json.dumps(asdict(settings)))

    def metrics(self, run: Run) -> dict[str, dict[str, float]]:
        """The metrics by task at a run's end; whatever has to be trained for that is trained."""
        if (found := self.finished(run)) is not None:
            return found
        for earlier in run.after:
            self.metrics(earlier)
        file = self.write(f"{run.name}.yaml", run.content)
        self.command(run.command, "--config", file, log=self.folder / f"{run.name}.log")
        done = self.finished(run)
        if done is None:
            sys.exit(f"{run.name} ended before its last step, see {self.folder / run.name}.log")
        return done

    def write(self, name: str, recipe: Mapping[str, Any]) -> str:
        """Writes a recipe into the folder, where commands find it by its name, and returns that."""
        file = self.folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(yaml.safe_dump(dict(recipe), sort_keys=False))
        return name

    def finished(self, run: Run) -> dict[str, dict[str, float]] | None:
        """The metrics by task of a run that has come to its end, else None."""
        return claims.result(self.folder / run.name, run.content["steps"])

    def headline(self, run: Run, task: str) -> tuple[str, bool]:
        """The name of a task's main metric, and whether more of it is better."""
        found = recipe.read_run(self.folder / run.name).tasks[task]
        return found.headline, found.higher_is_better

    def command(self, *arguments: str, log: Path) -> None:
        """Runs ``gppf-ds`` in the folder, in a process of its own."""
        print(f"gppf-ds {' '.join(arguments)}", flush=True)
        checkout = os.pathsep.join([str(harness.HERE.parent), os.environ.get("PYTHONPATH", "")])
        environment = {**os.environ, "PYTHONPATH": checkout}
        with log.open("w") as out:
            done = subprocess.run(
                [sys.executable, "-m", "gppf_ds", *arguments],
                cwd=self.folder, env=environment, stdout=out, stderr=subprocess.STDOUT, timeout=self.limit, check=False,
            )  # fmt: skip
        if done.returncode:
            sys.exit(f"gppf-ds {' '.join(arguments)} ended with code {done.returncode}, see {log}")


def arguments(description: str | None) -> argparse.ArgumentParser:
    """What both benchmarks can be told."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pack", type=Path, default=harness.HERE.parents[1] / "shared/data", help="the data pack")
    parser.add_argument("--folder", type=Path, default=Path("runs/transfer_table"), help="of the runs (%(default)s)")
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--pretrain-steps", type=int, default=240, help="(%(default)s)")
    parser.add_argument("--steps", type=int, default=100, help="of every fine-tuning (%(default)s)")
    parser.add_argument("--finished", action="store_true", help="train nothing, show what there is")
    parser.add_argument("--limit", type=float, default=1800, help="seconds for one run (%(default)s)")
    parser.add_argument("--results", type=Path, default=harness.RESULTS, help="folder for the json")
    return parser


def start(options: argparse.Namespace) -> tuple[Workplace, list[Plan]]:
    """The folder, with the demo data in it, and the plan of every seed."""
    if not options.pack.is_dir():
        sys.exit(f"{options.pack} is no folder: give the data pack with --pack.")
    settings = Settings(options.pretrain_steps, options.steps)
    work = Workplace(options.folder, settings, options.limit)
    if not (options.folder / "demo-data").is_dir():
        work.command("demo-data", "demo-data", log=options.folder / "demo-data.log")
    return work, [Plan(seed, settings, options.pack) for seed in options.seeds]
