"""The grid: 56 runs shared by workers, none twice, none lost."""

from __future__ import annotations

import fcntl
import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from gppf_ds.data.sets.classification import SOURCES
from gppf_ds.errors import UserError
from gppf_ds.train import grid as module
from gppf_ds.train.claims import result
from gppf_ds.train.grid import Cell, grid, grid_cells

TRAINER = """
import json, pathlib, sys
options = dict(argument[2:].split("=", 1) for argument in sys.argv[1:] if argument.startswith("--") and "=" in argument)
folder = pathlib.Path(options["output"])
with (folder / "trained").open("a") as file:
    file.write("once\\n")
rate = float(options["optimizer.learning_rate"])
if rate > 0.09:
    sys.exit(2)
accuracy = 0.5 + rate - float(options["optimizer.weight_decay"]) * rate
metrics = {"pets": {"mean_class": accuracy, "top1": 0.0}}
(folder / "results.json").write_text(json.dumps([{"step": 0, "metrics": metrics}, {"step": 2, "metrics": metrics}]))
"""
"""Stands for gppf-ds, whose start alone takes seconds: what is tested is who runs what."""


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tiny recipe of one task on a smoke set."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    SOURCES["cls_pets"].smoke(tmp_path / "data")
    init = {"source": "cls_pets", "data": "data", "batch_size": 4, "image_size": 64}
    content = {
        "output": "runs/grid",
        "steps": 2,
        "backbone": {
            "name": "resnet50",
            "units": 1,
            "options": {"layers": [1, 1, 1, 1], "channels": [8, 8, 16, 16], "stem_width": 8},
        },
        "loader": {"workers": 0},
        "tasks": {"pets": {"class_path": "gppf_ds.tasks.classification.Classification", "init_args": init}},
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(content))
    (tmp_path / "trainer.py").write_text(TRAINER)
    return path


def test_the_cells_are_those_of_the_paper(tmp_path: Path) -> None:
    cells = grid_cells(tmp_path)
    assert len({cell.folder for cell in cells}) == len(cells) == 56
    assert min(cell.rate for cell in cells) == pytest.approx(1e-4)
    assert max(cell.rate for cell in cells) == pytest.approx(1e-1)
    decays = sorted({cell.decay for cell in cells})
    assert decays[0] == 0
    assert decays[1:] == pytest.approx([10 ** (-6 + k / 2) for k in range(7)])
    assert Cell(1e-2, 1e-3, tmp_path).overrides[1:] == [
        "--optimizer.learning_rate=0.01",
        "--optimizer.weight_decay=0.1",
    ]


def test_two_workers_share_and_a_third_finds_what_is_left(recipe: Path, capfd: pytest.CaptureFixture[str]) -> None:
    launch = f"{sys.executable} {recipe.parent / 'trainer.py'}"
    arguments = ["--config", str(recipe), "--launch", launch]
    program = f"from gppf_ds.train.grid import grid; grid({arguments})"
    workers = [subprocess.Popen([sys.executable, "-c", program]) for _ in range(2)]
    assert [worker.wait(timeout=120) for worker in workers] == [0, 0]
    runs = Path("runs/grid")
    done = [folder for folder in runs.iterdir() if (folder / "results.json").is_file()]
    assert len(done) == 48
    assert all((folder / "trained").read_text() == "once\n" for folder in done)

    capfd.readouterr()
    again = next(folder for folder in done if folder.name == "lr0.01_wd0")
    (again / "results.json").unlink()  # as if the run had been cut off
    held = next(folder for folder in done if folder.name == "lr0.001_wd0")
    (held / "results.json").unlink()
    with (held / "claim").open("a") as claim:
        fcntl.flock(claim, fcntl.LOCK_EX)  # another worker has this one
        assert grid(arguments) == 1  # the eight at the highest rate fail
    assert (again / "trained").read_text() == "once\nonce\n"
    assert (held / "trained").read_text() == "once\n"
    captured = capfd.readouterr()
    assert captured.err.count("ended with code 2") == 8
    lines = captured.out.splitlines()[-10:]
    assert lines[0] == "pets: mean_class in percent after 2 steps, 47 of 56 runs"
    assert lines[4].split() == ["0.001", "-", *["50.10"] * 4, "50.09", "50.07", "50.00"]
    assert lines[8].split() == ["0.1", *["-"] * 8]
    assert lines[9] == "best: 53.16 at learning rate 0.0316, weight decay 0 / rate"


def test_a_cell_is_trained_for_real(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(module, "RATES", (0.01,))
    monkeypatch.setattr(module, "DECAYS", (1e-4,))
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert grid(["--config", str(recipe)]) == 0
    (cell,) = grid_cells(Path("runs/grid"))
    metrics = result(cell.folder, 2)
    assert metrics is not None
    assert 0 <= metrics["pets"]["mean_class"] <= 1
    config = yaml.safe_load((cell.folder / "config.yaml").read_text())
    assert config["optimizer"]["learning_rate"] == 0.01
    assert config["optimizer"]["weight_decay"] == pytest.approx(0.01)
    assert "1 of 1 runs" in capfd.readouterr().out
    assert grid(["--config", str(recipe), "--table", "--launch", "false"]) == 0


def test_a_recipe_of_two_tasks_is_refused(recipe: Path) -> None:
    content = yaml.safe_load(recipe.read_text())
    content["tasks"]["cats"] = content["tasks"]["pets"]
    recipe.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"one task, not of 2 \(pets, cats\)"):
        grid(["--config", str(recipe)])
