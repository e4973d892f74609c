"""A study: arms and seeds become runs, each trained once, none of them with other settings than the file's."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from gppf_ds.cli import main
from gppf_ds.data.sets.classification import SOURCES
from gppf_ds.errors import UserError
from gppf_ds.study.plan import Study
from gppf_ds.study.results import collect, differences, furthest, spread

TRAINER = """
import json, pathlib, sys, yaml
options = dict(zip(sys.argv[2::2], sys.argv[3::2]))
if sys.argv[1] == "evaluate":
    with open(options["--output"], "x") as file:
        json.dump({"metrics": {"others": {"mean_class": 0.125}}}, file)
    sys.exit()
recipe = yaml.safe_load(open(options["--config"]))
folder = pathlib.Path(recipe["output"])
source = (recipe.get("finetune") or {}).get("source")
assert source is None or (pathlib.Path(source) / "results.json").is_file()
with (folder / "trained").open("a") as file:
    file.write(sys.argv[1] + "\\n")
rate = recipe["optimizer"]["learning_rate"]
if rate > 1:
    (folder / "status.json").write_text('{"state": "failed"}')
    sys.exit(2)
metrics = {task: {"top1": rate + 0.01 * recipe["seed"] ** 2, "mean_class": rate} for task in recipe["tasks"]}
(folder / "config.yaml").write_text(yaml.safe_dump(recipe))
losses = [{"step": step, "losses": {task: rate + step for task in recipe["tasks"]}} for step in (1, 2)]
(folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\\n" for line in losses))
(folder / "time.jsonl").write_text(json.dumps({"step": 2, "images": 8, "seconds": {"step": 1.5, "data": 0.5}}))
(folder / "results.json").write_text(json.dumps([{"step": 0, "metrics": {}}, {"step": 2, "metrics": metrics}]))
"""
"""Stands for gppf-ds, whose start alone takes seconds: what is tested is who runs what, and what is made of it."""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a recipe of two tasks."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    SOURCES["cls_pets"].smoke(tmp_path / "data")
    init = {"source": "cls_pets", "data": "data", "batch_size": 4, "image_size": 64}
    task = {"class_path": "gppf_ds.tasks.classification.Classification", "init_args": init}
    options = {"layers": [1, 1, 1, 1], "channels": [8, 8, 16, 16], "stem_width": 8}
    content = {
        "output": "runs/recipe",
        "steps": 2,
        "log_every": 1,
        "backbone": {"name": "resnet50", "units": 1, "options": options},
        "optimizer": {"learning_rate": 0.25},
        "loader": {"workers": 0},
        "tasks": {"pets": task, "others": task},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    (tmp_path / "trainer.py").write_text(TRAINER)
    return tmp_path


def written(place: Path, **changes: Any) -> str:
    content = {"title": "Rates", "output": "runs/study", "recipe": "recipe.yaml", "seeds": [0, 1], **changes}
    (place / "study.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    return "study.yaml"


ARMS: dict[str, Any] = {
    "high": {"settings": {"optimizer": {"learning_rate": 0.5}}},
    "low": {},
    "alone": {"each_task": True},
    "tuned": {"settings": {"finetune": {"source": "{hidden}"}, "optimizer": {"learning_rate": 0.75}}},
    "hidden": {"shown": False, "settings": {"frozen_tasks": ["others"]}},
    "broken": {"settings": {"optimizer": {"learning_rate": 2.0}}},
}


def test_every_run_is_trained_once_and_the_tables_say_what_came_of_it(
    place: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    file = written(place, arms=ARMS, baseline="low", tables=["metrics", "differences", "curves"])
    arguments = ["study", file, "--launch", f"{sys.executable} trainer.py"]
    program = f"from gppf_ds.cli import main; raise SystemExit(main({arguments}))"
    workers = [subprocess.Popen([sys.executable, "-c", program]) for _ in range(2)]
    codes = [worker.wait(timeout=120) for worker in workers]
    assert 1 in codes  # the broken arm fails wherever it is tried
    assert main(arguments) == 1
    runs = place / "runs/study"
    trained = {str(path.parent.relative_to(runs)): path.read_text().split() for path in runs.rglob("trained")}
    whole = {name: words for name, words in trained.items() if not name.startswith("broken")}
    assert all(words == ["finetune" if name.startswith("tuned") else "train"] for name, words in whole.items())
    assert len(whole) == 2 * (1 + 1 + 2 + 1 + 1)
    assert {path.parent.name for path in runs.rglob("evaluation.json")} == {"seed0", "seed1"}  # of frozen tasks, once
    alone = yaml.safe_load((runs / "alone/seed1_others.yaml").read_text())
    assert (list(alone["tasks"]), alone["seed"], alone["output"]) == (["others"], 1, "runs/study/alone/seed1_others")
    tuned = yaml.safe_load((runs / "tuned/seed1.yaml").read_text())
    assert tuned["finetune"]["source"] == "runs/study/hidden/seed1"

    results = collect(Study(Path(file)))
    (measure, _) = results.measures
    assert (measure.task, measure.metric) == ("pets", "mean_class")
    assert results.values("alone", measure) == {0: 0.25, 1: 0.25}
    assert differences(results, "high", "low", measure) == [0.25, 0.25]
    assert furthest(results, "high", "low") == (0.25 / 1.25, 1)
    assert results.by_arm["alone"][0].images == 16  # of both tasks
    text = (runs / "study.md").read_text()
    assert "8 of 10 results, seeds 0, 1; 80 images" in text
    assert "| broken (2 failed) | -" in text
    assert "| high   | +0.2500 ± 0.0000" in text
    raw = json.loads((runs / "study.json").read_text())
    assert raw["arms"]["high"]["1"]["metrics"]["pets"]["top1"] == 0.51
    assert {path.name for path in runs.glob("*.png")} == {"metrics.png", "losses.png"}
    assert "hidden" not in text


def test_other_settings_are_not_mixed_with_what_has_begun(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    arms = {"high": ARMS["high"]}
    launch = ["--launch", f"{sys.executable} trainer.py"]
    assert main(["study", written(place, arms=arms), *launch]) == 0
    assert main(["study", written(place, arms=arms, settings={"steps": 4}), *launch]) == 2
    assert "begun with other settings (steps: 2 then, 4 now)" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"arms": {}}, "needs arms to compare"),
        ({"arms": {"a/b": {}}}, "becomes a folder"),
        ({"arms": {"a": {"seting": {}}}}, "there is no arms.a.seting in a study"),
        ({"arms": {"a": {}}, "baseline": "b"}, "baseline is 'b', but the arms that are shown are a"),
        ({"arms": {"a": {}}, "seeds": [1, 1]}, "seeds must be different numbers"),
        ({"arms": {"a": {"settings": {"finetune": {"source": "{b}"}}}}}, "starts from {b}, but the arms are a"),
        ({"arms": {"a": {"settings": {"finetune": {"source": "{a}"}}}}}, "arms.a needs itself (a -> a)"),
        ({"arms": {"a": {"settings": {"tasks": {"cats": None}}}}}, "tasks.cats is null"),
        ({"arms": {"a": {"recipe": "none.yaml"}}}, "none.yaml cannot be read"),
    ],
)
def test_a_study_that_cannot_be_is_refused_in_a_sentence(place: Path, changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError) as error:
        _ = Study(Path(written(place, **changes))).runs
    assert sentence in str(error.value)
    assert str(error.value).count("\n") == 0


def test_deviation_is_that_of_a_sample() -> None:
    found = spread([1.0, 2.0, 3.0])
    assert found is not None
    assert (found.mean, found.count) == (2.0, 3)
    assert found.deviation == pytest.approx(1.0)
    assert spread([]) is None
    alone = spread([math.pi])
    assert alone is not None
    assert alone.deviation is None


def test_arms_are_trained_for_real(
    place: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    heads = {"settings": {"tasks": {"others": None}, "trainable": ["heads.*"]}}
    arms = {"one": heads, "two ranks": {"ranks": 2}}
    assert main(["study", written(place, arms=arms, seeds=[3], tables=["metrics", "costs"])]) == 0
    raw = json.loads((place / "runs/study/study.json").read_text())
    assert 0 <= raw["arms"]["two ranks"]["3"]["metrics"]["others"]["mean_class"] <= 1
    assert raw["arms"]["two ranks"]["3"]["images"] == 16
    assert raw["costs"]["two ranks"]["held"] > raw["costs"]["one"]["held"]
    assert raw["costs"]["one"]["tasks"]["pets"]["gflops"] > 0
    assert 0 < raw["costs"]["one"]["learn"] < raw["costs"]["one"]["held"]
    assert raw["costs"]["two ranks"]["learn"] == raw["costs"]["two ranks"]["held"]
