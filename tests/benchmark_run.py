"""Benchmarks in processes of their own, as a user starts them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from distributed.ranks import ROOT, environment

BENCHMARKS = ROOT / "benchmarks"


def run(name: str, *arguments: str, limit: float = 300) -> str:
    """What the benchmark printed; fails with all it said where its exit code is not 0, or after ``limit`` seconds."""
    command = [sys.executable, str(BENCHMARKS / f"{name}.py"), *arguments]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=limit)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def results(name: str, folder: Path, *arguments: str, limit: float = 300) -> dict[str, Any]:
    """The whole json that it wrote, "result" and all; and as "printed" what it printed."""
    printed = run(name, "--results", str(folder), *arguments, limit=limit)
    return json.loads((folder / f"{name}.json").read_text()) | {"printed": printed}
