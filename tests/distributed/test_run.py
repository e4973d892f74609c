"""Whole runs through the deepspeed launcher: resume, faults, bad input."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import write_recipe
from safetensors.torch import load_file

from distributed.ranks import environment, free_port


def launcher(recipe: Path, *overrides: str, ranks: int = 2) -> list[str]:
    """The command that a user types."""
    program = "from deepspeed.launcher.runner import main; main()"
    options = ["--num_accelerators", str(ranks), "--master_port", str(free_port()), "--module"]
    return [sys.executable, "-c", program, *options, "gppf_ds", "train", "--config", str(recipe), *overrides]


def train(recipe: Path, *overrides: str, ranks: int = 2, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        launcher(recipe, *overrides, ranks=ranks),
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
        check=False,
    )


def last_checkpoint(run: Path) -> dict[str, Any]:
    """Every tensor of the last checkpoint."""
    folder = sorted((run / "checkpoints").glob("step-*"))[-1]
    return {f"{file.name}:{key}": t for file in folder.glob("*.safetensors") for key, t in load_file(file).items()}


def loss_scale(run: Path) -> dict[str, float]:
    state = sorted((run / "checkpoints").glob("step-*/state.json"))[-1]
    return json.loads(state.read_text())["loss_scale"]


def losses(run: Path) -> dict[int, Any]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: (line["tasks"], line["losses"]) for line in lines}


@pytest.mark.parametrize(
    ("stage", "precision"), [pytest.param(0, "fp32", marks=pytest.mark.long), (1, "fp16"), (3, "fp32")]
)
def test_a_resumed_run_is_the_uninterrupted_run(
    light_recipe: dict[str, Any], tmp_path: Path, stage: int, precision: str
) -> None:
    light_recipe["engine"].update(zero_stage=stage, precision=precision)
    light_recipe["backbone"]["checkpoint"] = True
    whole = write_recipe({**light_recipe, "output": str(tmp_path / "whole")}, tmp_path, "whole.yaml")
    assert train(whole).returncode == 0

    light_recipe["output"] = str(tmp_path / "parts")
    parts = write_recipe(light_recipe, tmp_path)
    process = subprocess.Popen(
        launcher(parts), env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    deadline = time.monotonic() + 240
    while not list((tmp_path / "parts" / "checkpoints").glob("step-*4")) and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait(timeout=30)
    subprocess.run(["pkill", "-9", "-f", str(parts)], check=False)  # ranks live in sessions of their own
    time.sleep(1.0)
    resumed = train(parts)
    assert resumed.returncode == 0, resumed.stdout
    assert "resuming from" in resumed.stdout

    first, second = last_checkpoint(tmp_path / "whole"), last_checkpoint(tmp_path / "parts")
    assert first.keys() == second.keys()
    assert all(first[key].equal(second[key]) for key in first)
    scale = loss_scale(tmp_path / "whole")
    assert scale == loss_scale(tmp_path / "parts")
    assert (scale == {"value": 2.0**16, "steps": 0}) == (precision == "fp32")
    expected, got = losses(tmp_path / "whole"), losses(tmp_path / "parts")
    assert {step: got[step] for step in (5, 6, 7, 8)} == {step: expected[step] for step in (5, 6, 7, 8)}
    for counts, values in expected.values():  # whichever rank ran it
        assert {task for task, count in counts.items() if count} == values.keys()


def test_a_checkpoint_of_another_architecture_is_refused(light_recipe: dict[str, Any], tmp_path: Path) -> None:
    light_recipe["steps"] = 1
    assert train(write_recipe(light_recipe, tmp_path), ranks=1).returncode == 0
    light_recipe["backbone"]["options"]["channels"] = [8, 8, 16, 24]
    light_recipe["steps"] = 2
    done = train(write_recipe(light_recipe, tmp_path), ranks=1)
    assert done.returncode == 2
    assert "is of another architecture (backbone.layers.4" in done.stdout
    assert "Traceback" not in done.stdout


def test_an_exception_on_one_rank_ends_the_job_with_its_traceback(light_recipe: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "faulty.py").write_text(
        "import os\n"
        "from gppf_ds.tasks.classification import Classification\n"
        "class Faulty(Classification):\n"
        "    def preprocess(self, batch, device, training):\n"
        "        if os.environ['RANK'] == '1' and training:\n"
        "            raise ArithmeticError('planted on rank 1')\n"
        "        return super().preprocess(batch, device, training)\n"
    )
    light_recipe["tasks"]["digits"]["class_path"] = "faulty.Faulty"
    recipe = write_recipe(light_recipe, tmp_path)
    started = time.monotonic()
    done = subprocess.run(
        launcher(recipe),
        env={**environment(), "PYTHONPATH": f"{tmp_path}{os.pathsep}{environment()['PYTHONPATH']}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode != 0
    assert time.monotonic() - started < 150
    assert "rank 1 failed" in done.stdout
    assert "ArithmeticError: planted on rank 1" in done.stdout
    assert done.stdout.count("Traceback (most recent call last)") == 1, done.stdout


def test_bad_input_ends_with_one_sentence_before_any_process_group(
    light_recipe: dict[str, Any], tmp_path: Path
) -> None:
    light_recipe["tasks"]["distance"]["init_args"]["data"] = str(tmp_path / "nowhere")
    done = train(write_recipe(light_recipe, tmp_path))
    assert done.returncode == 2
    errors = [line for line in done.stdout.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert "tasks.distance" in errors[0]
    assert "nowhere" in errors[0]
    assert not (tmp_path / "run").exists()


def test_unreadable_images_are_replaced_up_to_a_share(light_recipe: dict[str, Any], tmp_path: Path) -> None:
    data = tmp_path / "digits"
    source = Path(light_recipe["tasks"]["digits"]["init_args"]["data"])
    subprocess.run(["cp", "-r", str(source), str(data)], check=True)
    images = sorted((data / "train").rglob("*.jpg"))
    light_recipe["tasks"]["digits"]["init_args"]["data"] = str(data)
    del light_recipe["tasks"]["distance"]
    images[3].write_bytes(images[3].read_bytes()[:100])
    # 8 steps of 2 devices read the 64 images once: exactly one is lost.
    done = train(write_recipe(light_recipe, tmp_path))
    assert done.returncode == 0, done.stdout
    assert done.stdout.count("unreadable sample replaced") == 1
    assert images[3].name in done.stdout

    for image in images[::2]:
        image.write_bytes(b"no image")
    light_recipe["output"] = str(tmp_path / "other")
    done = train(write_recipe(light_recipe, tmp_path))
    assert done.returncode == 2
    assert "max_unreadable_share" in done.stdout
