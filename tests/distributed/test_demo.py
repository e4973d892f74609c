"""The quickstart at reduced length: all four kinds of task, the real launcher, every command after it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import timm
from conftest import write_recipe
from safetensors.torch import load_file

from distributed.ranks import ROOT, environment
from distributed.test_run import train

yaml = pytest.importorskip("yaml")


def gppf_ds(*arguments: str, cwd: Path = ROOT) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "gppf_ds", *arguments],
        env=environment(),
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.timeout(1200)
def test_the_demo_learns_and_leaves_plain_models(tmp_path: Path) -> None:
    data, run = tmp_path / "demo-data", tmp_path / "run"
    gppf_ds("demo-data", str(data))
    text = (ROOT / "ds_configs/recipes/demo.yaml").read_text().replace("demo-data/", f"{data}/")
    recipe = yaml.safe_load(text.replace("ds_configs/mm/", f"{ROOT}/ds_configs/mm/"))
    recipe.update(output=str(run), steps=120, log_every=1)
    recipe["optimizer"]["warmup_steps"] = 10
    for task in ("objects", "regions", "distance"):
        recipe["tasks"][task]["init_args"]["batch_size"] = 4
    done = train(write_recipe(recipe, tmp_path), timeout=900)
    assert done.returncode == 0, done.stdout

    before, after = (entry["metrics"] for entry in json.loads((run / "results.json").read_text()))
    assert after["distance"]["abs_rel"] < 0.5 * before["distance"]["abs_rel"]
    assert after["regions"]["mIoU"] > before["regions"]["mIoU"] + 0.2
    assert after["objects"]["bbox_AP"] > before["objects"]["bbox_AP"]
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for task in recipe["tasks"]:
        losses = [line["losses"][task] for line in lines if task in line["losses"]]
        assert sum(losses[-5:]) < sum(losses[:5]), task

    written = gppf_ds("export", "--run", str(run), "--head")
    assert "distance: only the backbone, because" in written
    exports = list((run / "exports").glob("*/model.safetensors"))
    assert len(exports) == 4
    assert [len(list((run / "exports").glob(f"*/{name}"))) for name in ("classifier.json", "checkpoint.pth")] == [1, 2]
    for file in exports:
        description = json.loads((file.parent / "model.json").read_text())
        model = timm.create_model(description["timm_model"], **description["timm_options"])
        model.load_state_dict(load_file(file), strict=True)
    drawn = [Path(line) for line in gppf_ds("analyze", "routes", str(run)).splitlines()]
    assert len(drawn) == 13
    assert all(file.is_file() for file in drawn)
    summary = gppf_ds("summary", "--run", str(run))
    assert all(task in summary for task in recipe["tasks"])
    assert summary.count("model.safetensors") == 4

    again = json.loads(gppf_ds("evaluate", "--run", str(run), "--tasks", "digits", "distance"))["metrics"]
    for task, values in again.items():  # one process, every image: as two ranks found it
        assert values == pytest.approx({k: after[task][k] for k in values}, rel=1e-3)
