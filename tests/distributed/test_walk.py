"""The walk of docs/transfer.md, as it stands there, with fewer steps and less data."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from distributed.ranks import ROOT
from distributed.test_demo import gppf_ds

STEPS = ["--steps", "3", "--optimizer.warmup_steps", "1", "--loader.workers", "1"]


def block(marker: str) -> str:
    text = (ROOT / "docs/transfer.md").read_text()
    found = re.search(rf"<!-- {marker} -->\n```\w*\n(.*?)```", text, re.DOTALL)
    assert found is not None
    return found[1]


@pytest.mark.timeout(900)
def test_the_walk(demo_data: Path, tmp_path: Path) -> None:
    (tmp_path / "demo-data").symlink_to(demo_data)
    (tmp_path / "ds_configs").symlink_to(ROOT / "ds_configs")
    for line in block("walk").splitlines():
        words = shlex.split(line.replace("deepspeed --module gppf_ds", "gppf-ds"))
        if words[1] == "demo-data":
            continue  # the fixture has made it, smaller
        words += STEPS if words[1] in ("train", "finetune") else []
        gppf_ds(*words[1:], cwd=tmp_path)
    advice = json.loads((tmp_path / "runs/transfer/advice/advise.json").read_text())
    assert list(advice["targets"]) == ["digits"]
    snippet = block("walk-predict") + "print(tuple(features.shape))"
    done = subprocess.run([sys.executable, "-c", snippet], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "(1, 512)", done.stderr
