"""``gppf-ds demo-data`` and ``gppf-ds prepare-data``."""

from __future__ import annotations

import argparse
import sys
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


def prepare_data(arguments: list[str]) -> int:
    """Reads a public detection set in its own format, once, and writes what training reads: one COCO json per split."""
    parser = argparse.ArgumentParser(prog="gppf-ds prepare-data", description=prepare_data.__doc__)
    parser.add_argument("source", help="name of the set, for example uodb_kitti")
    parser.add_argument("root", type=Path, help="its folder, unpacked as its authors pack it")
    parser.add_argument("--faults", type=int, default=5, help="broken entries to print per split at most")
    options = parser.parse_args(arguments)

    from gppf_ds.data.sets.uodb import prepare

    every = 100 if sys.stderr.isatty() else 10_000

    def progress(split: str, images: int) -> None:
        if images % every == 0:
            print(f"{split}: {images} images", end="\r" if every == 100 else "\n", file=sys.stderr, flush=True)

    for summary in prepare(options.source, options.root, progress):
        print(summary)
        for fault in summary.faults[: options.faults]:
            print(f"  {fault}")
    return 0
