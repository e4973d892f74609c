"""The run's own record: what ran, with what, from which command, how far it is, and what was decided on the way."""

from __future__ import annotations

import json
import os
import platform
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import yaml

import gppf_ds
from gppf_ds.train import history

STATE, DECISIONS, LAUNCHES = "status.json", "decisions.jsonl", "launches.jsonl"
State = Literal["starting", "running", "finished", "stopped", "failed"]
_ENVIRONMENT = ("CUDA_", "DS_", "GLOO_", "MASTER_", "MKL_", "NCCL_", "OMP_", "PYTHON", "SLURM_JOB_", "TORCH", "WORLD_")
"""Beginnings of the names of variables that numbers or speed may depend on; none of them holds a secret."""
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


def write_record(folder: Path, config: str, seed: int, step: int = 0, ranks: int = 1) -> None:
    """Writes ``config.yaml`` (the resolved configuration), and what this launch is and changes.

    Args:
        folder: of the run.
        config: the resolved recipe as YAML.
        seed: of the run.
        step: optimizer steps done.
        ranks: of this launch.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if step:
        decide(folder, step, "resume", f"on {ranks} ranks, host {socket.gethostname()}")
        for change in _changes(folder / "config.yaml", config):
            decide(folder, step, "setting", change)
    pending = folder / "config.yaml.tmp"
    pending.write_text(config)
    pending.replace(folder / "config.yaml")
    launch = {
        "time": _now(),
        "command": sys.argv,
        "host": socket.gethostname(),
        "python": platform.python_version(),
        "gppf_ds": gppf_ds.__version__,
        "versions": versions(),
        "git": _git_state(),
        "seed": seed,
        "step": step,
        "ranks": ranks,
        "environment": {k: v for k, v in sorted(os.environ.items()) if k.startswith(_ENVIRONMENT)},
    }
    history.append(folder / LAUNCHES, launch)


def _changes(before: Path, config: str) -> Iterator[str]:
    """The settings that differ from those of the launch before, as KEY: OLD -> NEW."""
    if not before.is_file():
        return
    for key, old, new in differences(before.read_text(), config):
        yield f"{key}: {old} -> {new}"


def differences(before: str, now: str) -> Iterator[tuple[str, str, str]]:
    """The keys that two recipes (YAML) do not have alike, by name, each with both values as json, or "absent"."""
    old, new = (dict(_flatten("", yaml.safe_load(text))) for text in (before, now))
    for key in sorted({*old, *new}):
        if old.get(key) != new.get(key):
            yield key, old.get(key, "absent"), new.get(key, "absent")


def decide(folder: Path, step: int | None, kind: str, text: str) -> None:
    """Appends a decision to ``decisions.jsonl``.

    Args:
        folder: of the run.
        step: optimizer steps done, where it is known.
        kind: resume, setting, restart, skip, sparse, capacity, stop or failure.
        text: what was decided, and why.
    """
    line = {"time": _now(), "step": step, "kind": kind, "text": text}
    history.append(folder / DECISIONS, line)


def write_state(folder: Path, state: State) -> None:
    """What the run is doing, for :func:`read_state`; a folder that cannot be written hides nothing else."""
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        pending = folder / f".{STATE}.{os.getpid()}"
        pending.write_text(
            json.dumps({"state": state, "time": _now(), "host": socket.gethostname(), "process": os.getpid()})
        )
        pending.replace(folder / STATE)


def read_state(folder: Path) -> dict[str, Any]:
    """What :func:`write_state` wrote last: state, time, host, process; empty where there is nothing."""
    try:
        found = json.loads((folder / STATE).read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")


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
