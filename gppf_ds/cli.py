"""The command line: one entry point, one sub-command per job, each imported only when it is asked for."""

from __future__ import annotations

import difflib
import sys
from importlib import import_module

from gppf_ds.errors import UserError
from gppf_ds.train.faults import first_of_launch

COMMANDS = {
    "train": ("gppf_ds.train.commands:train", "train a recipe; run again, it resumes"),
    "finetune": ("gppf_ds.train.commands:finetune", "train new tasks from a finished run: dynamic, fixed path, grow"),
    "verify": ("gppf_ds.train.commands:verify", "compare a few steps of a recipe with the single-process reference"),
    "evaluate": ("gppf_ds.train.commands:evaluate", "evaluate a run's last checkpoint on every task"),
    "predict": ("gppf_ds.transfer.commands:predict", "run tasks on images; what their paths share runs once"),
    "export": ("gppf_ds.transfer.commands:export", "write each task's path as a plain model"),
    "extract": ("gppf_ds.transfer.commands:extract", "the sub-network of some tasks as a run of its own, and its cost"),
    "cost": ("gppf_ds.transfer.commands:cost", "what a recipe's network costs: parameters that learn, are used; FLOPs"),
    "advise": ("gppf_ds.transfer.commands:advise", "rank a run's paths for new data, before training"),
    "convert": ("gppf_ds.transfer.commands:convert", "turn a DeepSpeed checkpoint into one plain safetensors file"),
    "analyze": ("gppf_ds.analysis.commands:analyze", "draw routes, or how alike layers see images (CKA)"),
    "report": ("gppf_ds.analysis.commands:report", "a run as one html file: curves, routes, time, predictions"),
    "summary": ("gppf_ds.analysis.commands:summary", "a run's metrics before and after, and what it wrote"),
    "runs": ("gppf_ds.train.runs:runs", "the runs below a folder: state, step, last metrics"),
    "plan": ("gppf_ds.train.plan:plan", "what a recipe's steps will take here, and how to balance them"),
    "check-data": ("gppf_ds.train.commands:check_data", "what of a recipe's data is there, complete and sound"),
    "reproduce": ("gppf_ds.train.commands:reproduce", "our results beside the published rows"),
    "grid": ("gppf_ds.train.grid:grid", "train every cell of a grid of settings, with any number of workers"),
    "study": ("gppf_ds.study.commands:study", "compare recipes over seeds: run what is missing, tables and figures"),
    "prepare-data": ("gppf_ds.data.commands:prepare_data", "write the annotations of a UODB set as COCO json"),
    "demo-data": ("gppf_ds.data.commands:demo_data", "make the demo data sets from bundled real images"),
    "doctor": ("gppf_ds.doctor:main", "what is installed here, and what would not work and why"),
}


def main(argv: list[str] | None = None) -> int:
    """Runs a sub-command and returns the exit code: 0, or 2 for what the user has to mend."""
    # The deepspeed launcher adds --local_rank; the environment says the same.
    arguments = [a for a in (sys.argv[1:] if argv is None else argv) if not a.startswith("--local_rank")]
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_help())
        return 0
    if arguments[0] == "--version":
        import gppf_ds

        print(gppf_ds.__version__)
        return 0
    name, *rest = arguments
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, 1)
        hint = f": did you mean {near[0]!r}?" if near else f": choose from {', '.join(COMMANDS)}."
        print(f"error: there is no command {name!r}{hint}", file=sys.stderr)
        return 2
    module, function = COMMANDS[name][0].split(":")
    try:
        return int(getattr(import_module(module), function)(rest) or 0)
    except UserError as error:
        if first_of_launch(str(error)):
            print(f"error: {error}", file=sys.stderr)
        return 2


def _help() -> str:
    width = max(map(len, COMMANDS)) + 2
    lines = [f"  {name:<{width}}{text}" for name, (_, text) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: gppf-ds COMMAND [options]",
            "",
            "Trains one vision backbone on many data sets and many kinds of task at once.",
            "",
            *lines,
            "",
            "gppf-ds COMMAND --help says more. On several devices: deepspeed --module gppf_ds train ...",
        ]
    )
