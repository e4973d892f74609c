"""``gppf-ds demo-data``."""

from __future__ import annotations

import argparse
from pathlib import Path


def demo_data(arguments: list[str]) -> int:
    """Makes the demo data sets: handwritten digits standing on photographs, labelled for four kinds of task."""
    parser = argparse.ArgumentParser(prog="gppf-ds demo-data", description=demo_data.__doc__)
    parser.add_argument("folder", type=Path, help="where to write")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--overwrite", action="store_true", help="replace what is there")
    options = parser.parse_args(arguments)

    from gppf_ds.data.demo import make_demo_data

    make_demo_data(options.folder, seed=options.seed, overwrite=options.overwrite)
    print(options.folder)
    return 0
