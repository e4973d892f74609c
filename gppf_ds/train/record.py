"""The run's own record: what ran, with what, from which command."""

from __future__ import annotations

import json
import platform
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

import gppf_ds

_OF_A_MACHINE = ("metrics_address", "metrics_port")
"""Keys of a recipe that may differ from machine to machine."""
PACKAGES = ("torch", "torchvision", "timm", "deepspeed", "onedl-mmdetection", "onedl-mmsegmentation", "numpy")


def versions() -> dict[str, str]:
    """Versions of what a run's numbers depend on."""
    found = {}
    for package in PACKAGES:
        try:
            found[package.replace("-", "_")] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def fingerprint(config: str) -> dict[str, str]:
    """What has to be the same on every rank before a model is there: versions, and every key of the recipe.

    Args:
        config: the resolved recipe as YAML.
    """
    facts = {package.replace("_", "-"): version for package, version in versions().items()}
    recipe = dict(_flatten("", yaml.safe_load(config)))
    return {"gppf-ds": gppf_ds.__version__, **facts, **{k: v for k, v in recipe.items() if k not in _OF_A_MACHINE}}


def _flatten(prefix: str, value: Any) -> Iterator[tuple[str, str]]:
    if not isinstance(value, dict):
        yield prefix, json.dumps(value)
        return
    for key, inner in value.items():
        yield from _flatten(f"{prefix}.{key}".lstrip("."), inner)


def write_record(folder: Path, config: str, seed: int) -> None:
    """Writes ``config.yaml`` (the resolved configuration) and appends this launch to ``launches.jsonl``."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(config)
    launch = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": sys.argv,
        "host": socket.gethostname(),
        "python": platform.python_version(),
        "gppf_ds": gppf_ds.__version__,
        "versions": versions(),
        "git": _git_state(),
        "seed": seed,
    }
    with (folder / "launches.jsonl").open("a") as file:
        file.write(json.dumps(launch) + "\n")


def _git_state() -> str | None:
    """Commit of the checkout the package runs from, or None for an installed package."""
    try:
        answer = subprocess.run(
            ["git", "describe", "--always", "--dirty"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            timeout=10,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.strip() or None
