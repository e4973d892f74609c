"""``gppf-ds doctor``: what is here, what training will use, and what would not work and why; on all machines of a job
with a hostfile."""

from __future__ import annotations

import argparse
from pathlib import Path

from gppf_ds.doctor.table import Row, verdict


def main(arguments: list[str]) -> int:
    """Prints what is installed here, and what would not work and why. Exit code 0: training can run; 1: it cannot.

    With a hostfile it looks at every machine of a job instead, over ssh, and lets all of them talk to each other.
    """
    parser = argparse.ArgumentParser(prog="gppf-ds doctor", description=main.__doc__)
    parser.add_argument("--hostfile", type=Path, help="check the machines that it names")
    parser.add_argument(
        "--recipe", type=Path, help="with a hostfile: also that they have its data and share its output"
    )
    options = parser.parse_args(arguments)
    if options.hostfile is not None:
        from gppf_ds.doctor.hosts import examine

        return examine(options.hostfile, options.recipe)
    if options.recipe is not None:
        parser.error("--recipe needs --hostfile; on this machine alone use gppf-ds check-data")

    from gppf_ds.doctor.machine import report

    rows = report()
    width = max(len(row.name) for row in rows)
    for row in rows:
        print(f"{row.mark} {row.name:<{width}}  {row.value}")
    return verdict(rows)


__all__ = ["Row", "main"]
