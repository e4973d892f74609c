"""The benchmark that holds ``gppf-ds advise`` against fine-tuned runs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import write_recipe

ROOT = Path(__file__).parents[1]
SCORES = {"a": 0.9, "b": 0.7, "c": 0.4}


def advice(folder: Path) -> Path:
    rows = [{"tasks": [name], "score": score, "error": 0.02} for name, score in SCORES.items()]
    rows[0]["tasks"] = ["a", "twin"]
    targets = {"distance": {"measure": "R^2", "rows": rows}}
    file = folder / "advise.json"
    file.write_text(json.dumps({"targets": targets}))
    return file


def tuned(recipe: dict[str, Any], folder: Path, value: float) -> str:
    folder.mkdir()
    write_recipe(recipe, folder, "config.yaml")
    entries = [{"step": step, "metrics": {"distance": {"abs_rel": v}}} for step, v in ((0, 9.0), (8, value))]
    (folder / "results.json").write_text(json.dumps(entries))
    return str(folder)


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "benchmarks/advise_ranking.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def compared(values: dict[str, float], light_recipe: dict[str, Any], folder: Path) -> dict[str, Any]:
    runs = [f"{name}={tuned(light_recipe, folder / str(i), v)}" for i, (name, v) in enumerate(values.items())]
    pairs = [part for one in runs for part in ("--run", one)]
    done = run(str(advice(folder)), "distance", *pairs, "--results", str(folder / "results"))
    assert done.returncode == 0, done.stderr
    assert "fine-tuned abs_rel" in done.stdout
    written = json.loads((folder / "results/advise_ranking.json").read_text())
    assert written["settings"]["metric"] == "abs_rel"
    result: dict[str, Any] = written["result"]
    return result


def test_a_metric_of_which_less_is_better(light_recipe: dict[str, Any], tmp_path: Path) -> None:
    found = compared({"a": 0.10, "twin": 0.14, "b": 0.20, "c": 0.30}, light_recipe, tmp_path)
    assert (found["spearman"], found["kendall"], found["regret"]) == (pytest.approx(1), pytest.approx(1), 0)
    first = found["paths"][0]["tuned"]
    assert (first["mean"], first["runs"]) == (pytest.approx(0.12), 2)
    assert first["deviation"] == pytest.approx(0.04 / 2**0.5)


def test_advice_that_was_wrong(light_recipe: dict[str, Any], tmp_path: Path) -> None:
    found = compared({"a": 0.30, "b": 0.20, "c": 0.10}, light_recipe, tmp_path)
    assert (found["spearman"], found["kendall"]) == (pytest.approx(-1), pytest.approx(-1))
    assert found["regret"] == pytest.approx(0.2)


def test_mistakes_are_one_sentence(light_recipe: dict[str, Any], tmp_path: Path) -> None:
    file, folder = str(advice(tmp_path)), tuned(light_recipe, tmp_path / "one", 0.1)
    for arguments, sentence in (
        (("depth", "--run", f"a={folder}"), "has no task depth: choose from distance"),
        (("distance", "--run", f"x={folder}"), "no path of x"),
        (("distance", "--run", f"a={folder}"), "at least two different paths"),
    ):
        done = run(file, *arguments)
        assert done.returncode == 1
        assert sentence in done.stderr
