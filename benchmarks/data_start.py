"""How long does a data set with a big annotation file take to open, the first time and then?

A json in COCO format is written, with as many images and boxes as asked for. Every start is a group of new processes:
with mmdet alone, with an empty cache (the first start parses and keeps), and again (the second start maps).
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import harness

ARMS = ("mmdet alone", "first start", "second start")

AIM = 2.0
"""Seconds that the second start may take."""

MEBI = 2**20


def write_annotations(place: Path, images: int, boxes: int) -> None:
    """A COCO json with random boxes of 80 classes (``boxes`` per image), as old as a file that one trains on."""
    chance = random.Random(0)
    with place.open("w") as file:
        entries = (f'{{"id":{i},"file_name":"{i:012}.jpg","width":640,"height":480}}' for i in range(images))
        file.write(f'{{"images":[{",".join(entries)}],"annotations":[')
        for i in range(images):
            found = [_box(chance, i, i * boxes + number) for number in range(boxes)]
            file.write(("," if i else "") + ",".join(found))
        categories = [{"id": number + 1, "name": f"class {number}"} for number in range(80)]
        file.write(f'],"categories":{json.dumps(categories)}}}')
    hour = time.time() - 3600
    os.utime(place, (hour, hour))


def _box(chance: random.Random, image: int, number: int) -> str:
    x, y = round(600 * chance.random(), 2), round(440 * chance.random(), 2)
    w, h = round(1 + 38 * chance.random(), 2), round(1 + 38 * chance.random(), 2)
    label = chance.randrange(1, 81)
    return (
        f'{{"id":{number + 1},"image_id":{image},"category_id":{label},"bbox":[{x},{y},{w},{h}],"area":{w * h},'
        '"iscrowd":0}'
    )


def measure(settings: Mapping[str, Any], limit: float) -> dict[str, Any]:
    """Every arm ``repeats`` times, in turns; each number is that of the rank that has most of it."""
    found: dict[str, list[dict[str, float]]] = {arm: [] for arm in ARMS}
    with tempfile.TemporaryDirectory() as folder:
        annotations, cache = Path(folder) / "annotations.json", Path(folder) / "cache"
        write_annotations(annotations, settings["images"], settings["boxes"])
        os.environ["XDG_CACHE_HOME"] = str(cache)
        for _ in range(settings["repeats"]):
            shutil.rmtree(cache, ignore_errors=True)
            for arm in ARMS:
                argument = json.dumps({"annotations": str(annotations), "cached": arm != ARMS[0]})
                script = harness.HERE / "data_start_rank.py"
                result = harness.result_of_ranks(script, argument, settings["ranks"], limit)
                found[arm].append({key: max(one[key] for one in result) for key in result[0]})
        sizes = {"json": annotations.stat().st_size, "kept": sum(x.stat().st_size for x in cache.rglob("*.records"))}
    arms = {arm: {key: harness.spread([one[key] for one in runs]) for key in runs[0]} for arm, runs in found.items()}
    ratios = [a["seconds"] / b["seconds"] for a, b in zip(found[ARMS[0]], found[ARMS[2]], strict=True)]
    return {"arms": arms, "speed-up of the second start": harness.spread(ratios), "bytes": sizes}


def report(result: Mapping[str, Any]) -> str:
    """One line for each arm, and the verdict."""
    head = ["start", "seconds: median (min - max)", "peak MiB", "own MiB, then", "us per record"]
    rows: list[Sequence[str]] = [head]
    for arm, found in result["arms"].items():
        seconds = found["seconds"]
        shown = f"{seconds['median']:.3f} ({seconds['min']:.3f} - {seconds['max']:.3f})"
        memory = [f"{found[key]['median'] / MEBI:.0f}" for key in ("peak", "own")]
        rows.append([arm, shown, *memory, f"{1e6 * found['record']['median']:.0f}"])
    last, ratio = result["arms"][ARMS[2]]["seconds"]["median"], result["speed-up of the second start"]
    verdict = "met" if last < AIM else "not met"
    return (
        f"{harness.table(rows)}\n\nsecond start against mmdet alone: {ratio['median']:.0f} times as fast "
        f"({ratio['min']:.0f} - {ratio['max']:.0f}); aim: below {AIM:.0f} s, {verdict}\n"
        f"json {result['bytes']['json'] / MEBI:.0f} MiB, records kept {result['bytes']['kept'] / MEBI:.0f} MiB"
    )


def main() -> None:
    """Measures, prints the table and writes the json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2, help="processes that start together (default: %(default)s)")
    parser.add_argument("--images", type=int, default=100_000, help="default: %(default)s")
    parser.add_argument("--boxes", type=int, default=10, help="per image (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="of every start (default: %(default)s)")
    parser.add_argument("--limit", type=float, default=1800.0, help="seconds for one start (default: %(default)s)")
    parser.add_argument("--results", type=Path, default=harness.RESULTS, help="folder for the json")
    args = parser.parse_args()
    if min(args.ranks, args.images, args.boxes, args.repeats) < 1:
        parser.error("--ranks, --images, --boxes and --repeats start at 1")
    settings = {name: getattr(args, name) for name in ("ranks", "images", "boxes", "repeats")}
    result = measure(settings, args.limit)
    print(f"{args.images} images with {args.boxes} boxes each, {args.ranks} processes at once\n")
    print(report(result))
    harness.save("data_start", settings, result, args.results)


if __name__ == "__main__":
    main()
