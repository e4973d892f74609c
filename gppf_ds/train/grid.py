"""``gppf-ds grid``: one recipe at 56 pairs of learning rate and weight decay, by any number of workers."""

from __future__ import annotations

import argparse
import shlex
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from gppf_ds.errors import UserError
from gppf_ds.train import recipe
from gppf_ds.train.claims import result, work

RATES = tuple(10 ** (-4 + step / 2) for step in range(7))
DECAYS = (0.0, *(10 ** (-6 + step / 2) for step in range(7)))
"""7 learning rates in [1e-4, 1e-1]; 7 weight decays in [1e-6, 1e-3], and none (GPPF appendix D.2, after Kornblith et
al. 2019). A run gets the decay divided by the learning rate: a step of SGD then shrinks the weights by this much."""


@dataclass(frozen=True)
class Cell:
    """One run of the grid."""

    rate: float
    decay: float
    """Before it is divided by the learning rate."""
    folder: Path

    @property
    def overrides(self) -> list[str]:
        """What the command line lays over the recipe."""
        decay = self.decay / self.rate
        return [
            f"--output={self.folder}",
            f"--optimizer.learning_rate={self.rate:.6g}",
            f"--optimizer.weight_decay={decay:.6g}",
        ]


def grid(arguments: list[str]) -> int:
    """Trains a recipe of one task at 7 learning rates x 8 weight decays and prints a table of its headline metric.

    Every run has a folder of its own inside the recipe's output. Start the same command as often as there are GPUs, on
    any machine that sees the folder: each worker takes runs that no other has, and a run that was cut off is resumed by
    whoever takes it next. All other arguments are those of gppf-ds train.

    The table shows the split that the task calls val, which is the test split of the ten classification sets: the paper
    does not say by what it chose, and the best cell of a test split is an optimistic number.
    """
    parser = argparse.ArgumentParser(
        prog="gppf-ds grid",
        description=grid.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    launch = f"{sys.executable} -m gppf_ds"
    parser.add_argument("--launch", default=launch, help="what starts gppf-ds for one run (default: one process)")
    parser.add_argument("--table", action="store_true", help="print the table and train nothing")
    options, rest = parser.parse_known_args(arguments)
    run = recipe.read(rest, "gppf-ds grid")
    if len(run.tasks) != 1:
        raise UserError(f"gppf-ds grid takes a recipe of one task, not of {len(run.tasks)} ({', '.join(run.tasks)}).")
    cells = grid_cells(Path(run.config.output))
    failed = False
    if not options.table:
        recipe.check(run)
        for cell in cells:
            command = [*shlex.split(options.launch), "train", *rest, *cell.overrides]
            failed |= work(cell.folder, partial(_missing, cell, run.config.steps, command)) == "failed"
    ((name, task),) = run.tasks.items()
    print(table(cells, run.config.steps, name, task.headline))
    return int(failed)


def grid_cells(output: Path) -> list[Cell]:
    """The 56 runs below the recipe's output folder."""
    return [Cell(rate, decay, output / f"lr{rate:.2g}_wd{decay:.2g}") for rate in RATES for decay in DECAYS]


def _missing(cell: Cell, steps: int, command: list[str]) -> list[list[str]]:
    return [command] if result(cell.folder, steps) is None else []


def table(cells: list[Cell], steps: int, task: str, headline: str) -> str:
    """Learning rates down, weight decays across, in percent; a dash where a run has not come to its end."""
    values: dict[tuple[float, float], float] = {}
    for cell in cells:
        if (metrics := result(cell.folder, steps)) is not None and headline in metrics[task]:
            values[cell.rate, cell.decay] = metrics[task][headline]
    lines = [f"{task}: {headline} in percent after {steps} steps, {len(values)} of {len(cells)} runs"]
    lines.append("rate \\ decay" + "".join(f"{decay:>9.2g}" for decay in DECAYS))
    for rate in RATES:
        row = [values.get((rate, decay)) for decay in DECAYS]
        lines.append(
            f"{rate:<12.2g}" + "".join(f"{'-' if value is None else f'{100 * value:.2f}':>9}" for value in row)
        )
    if values:
        rate, decay = max(values, key=lambda key: values[key])
        lines.append(
            f"best: {100 * values[rate, decay]:.2f} at learning rate {rate:.3g}, weight decay {decay:.3g} / rate"
        )
    return "\n".join(lines)
