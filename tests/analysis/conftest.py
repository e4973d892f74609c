"""A real run, short, of two tasks that import nothing heavy."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from distributed.ranks import environment

STEPS = 6


@pytest.fixture(scope="session")
def short_run(demo_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of one process with two devices, trained for :data:`STEPS` steps."""
    folder = tmp_path_factory.mktemp("short")
    run = folder / "two <tasks>"
    data = {"digits": str(demo_data / "classification"), "distance": str(demo_data / "scenes")}
    recipe = {
        "output": str(run),
        "steps": STEPS,
        "log_every": 2,
        "evaluate_every": 3,
        "routes_every": 2,
        "backbone": {"options": {"layers": [1, 1, 1, 1], "channels": [8, 8, 16, 16]}, "units": [2, 2, 3, 1, 2]},
        "controller": {"learning_rate": 0.2},
        "schedule": {"kind": "stratified"},
        "optimizer": {"learning_rate": 0.01},
        "loader": {"workers": 0},
        "engine": {"timeout": 60, "devices_per_rank": 2},
        "tasks": {
            "digits": {
                "class_path": "gppf_ds.tasks.classification.Classification",
                "init_args": {"data": data["digits"], "batch_size": 4, "image_size": 64},
            },
            "distance": {
                "class_path": "gppf_ds.tasks.depth.Depth",
                "init_args": {
                    "data": data["distance"],
                    "batch_size": 2,
                    "input_size": [64, 64],
                    "head_channels": 32,
                    "max_depth": 20.0,
                },
            },
        },
    }
    config = folder / "recipe.yaml"
    config.write_text(yaml.safe_dump(recipe))
    command = [sys.executable, "-m", "gppf_ds", "train", "--config", str(config)]
    done = subprocess.run(
        command,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return run
