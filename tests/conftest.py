"""What several tests need: small demo data, recipes that run on it in seconds, and a small network before a head."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import yaml
from distributed.ranks import environment
from torch import nn

from gppf_ds.tasks.task import FeatureInfo

torch.set_num_threads(1)

SHORT_STEPS = 6
"""Of :func:`short_run`."""


@pytest.fixture(scope="session")
def demo_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo data sets, small."""
    from gppf_ds.data.demo import make_demo_data

    folder = tmp_path_factory.mktemp("data") / "demo"
    make_demo_data(folder, train_scenes=16, val_scenes=5, train_crops=64, val_crops=20)
    return folder


@pytest.fixture(scope="session")
def backbone() -> nn.Module:
    """A small ResNet of timm, in evaluation mode: images to maps of the strides 2 to 32."""
    torch.manual_seed(0)
    return timm.create_model("resnet10t", features_only=True).eval()


@pytest.fixture(scope="session")
def info(backbone: Any) -> FeatureInfo:
    """What :func:`backbone` gives."""
    return FeatureInfo(tuple(backbone.feature_info.channels()), tuple(backbone.feature_info.reduction()))


@pytest.fixture
def light_recipe(demo_data: Path, tmp_path: Path) -> dict[str, Any]:
    """A recipe of two tasks that import nothing heavy; change it, then :func:`write_recipe`."""
    return make_light_recipe(demo_data, tmp_path / "run")


def make_light_recipe(demo_data: Path, output: Path) -> dict[str, Any]:
    return {
        "output": str(output),
        "steps": 8,
        "log_every": 1,
        "backbone": {"name": "resnet50", "options": {"layers": [1, 1, 1, 1], "channels": [8, 8, 16, 16]}},
        "optimizer": {"learning_rate": 0.01},
        "loader": {"workers": 1},
        "engine": {"timeout": 60},
        "checkpoint": {"every": 4},
        "tasks": {
            "digits": {
                "class_path": "gppf_ds.tasks.classification.Classification",
                "init_args": {"data": str(demo_data / "classification"), "batch_size": 4, "image_size": 64},
            },
            "distance": {
                "class_path": "gppf_ds.tasks.depth.Depth",
                "init_args": {
                    "data": str(demo_data / "scenes"),
                    "batch_size": 2,
                    "input_size": [64, 64],
                    "head_channels": 32,
                    "max_depth": 20.0,
                },
            },
        },
    }


def write_recipe(recipe: dict[str, Any], folder: Path, name: str = "recipe.yaml") -> Path:
    path = folder / name
    path.write_text(yaml.safe_dump(recipe))
    return path


@pytest.fixture(scope="session")
def short_run(demo_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run of one process with two devices, its name one that pages have to escape."""
    folder = tmp_path_factory.mktemp("short")
    recipe = make_light_recipe(demo_data, folder / "two <tasks>")
    recipe |= {"steps": SHORT_STEPS, "log_every": 2, "evaluate_every": 3, "routes_every": 2}
    recipe |= {"controller": {"learning_rate": 0.2}, "schedule": {"kind": "stratified"}, "loader": {"workers": 0}}
    recipe["backbone"]["units"] = [2, 2, 3, 1, 2]
    recipe["engine"]["devices_per_rank"] = 2
    done = subprocess.run(
        [sys.executable, "-m", "gppf_ds", "train", "--config", str(write_recipe(recipe, folder))],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return Path(recipe["output"])
