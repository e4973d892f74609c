"""The worked example of docs/new_task.md really runs: build, batch, loss, backward, predict, metric."""

from __future__ import annotations

import importlib
import json
import pickle
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from gppf_ds.errors import UserError
from gppf_ds.tasks.task import FeatureInfo, Task

DOC = Path(__file__).parents[2] / "docs" / "new_task.md"


def block(language: str) -> str:
    [text] = re.findall(rf"```{language}\n(.*?)```", DOC.read_text(), flags=re.DOTALL)
    return text


@pytest.fixture
def task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Task]:
    """The documented task, built from the documented recipe entry, on images laid out as documented."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    (tmp_path / "my_task.py").write_text(block("python"))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    tags = json.loads(block("json"))
    for split in ("train", "val"):
        folder = tmp_path / "data" / "tagged" / split
        folder.mkdir(parents=True)
        folder.with_suffix(".json").write_text(json.dumps(tags))
        for i, name in enumerate(tags):
            color = 255 * np.eye(3, dtype=np.uint8)[i]
            Image.fromarray(np.broadcast_to(color, (40, 50, 3)).copy()).save(folder / name)
    entry: dict[str, Any] = yaml.safe_load(block("yaml"))["tasks"]["tags"]
    module, _, name = entry["class_path"].rpartition(".")
    yield getattr(importlib.import_module(module), name)(**{**entry["init_args"], "size": 64})
    sys.modules.pop(module)


def test_documented_task_trains_and_is_measured(task: Task) -> None:
    task.check()
    dataset = task.dataset("train")
    batch = pickle.loads(pickle.dumps(task.collate([dataset[i] for i in range(len(dataset))])))
    inputs = task.preprocess(batch, torch.device("cpu"), training=True)
    assert inputs.images.shape == (3, 3, 64, 64)

    backbone = torch.nn.Conv2d(3, 8, 3, stride=4)
    head = task.build_head(FeatureInfo((8,), (4,)))
    optimizer = torch.optim.Adam([*backbone.parameters(), *head.parameters()], lr=0.05)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = sum(head.loss([backbone(inputs.images)], inputs.targets).values())
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert all(p.grad is not None for p in head.parameters())

    halves = [task.metric(), task.metric()]
    with torch.no_grad():
        predictions = head.predict([backbone(inputs.images)], inputs.targets)
    halves[0].update(predictions[:1], inputs.targets[:1])
    halves[1].update(predictions[1:], inputs.targets[1:])
    whole = task.metric()
    whole.merge([pickle.loads(pickle.dumps(half.state())) for half in halves])
    assert whole.compute()[task.headline] == pytest.approx(1.0)


def test_documented_task_predicts_a_single_image(task: Task, tmp_path: Path) -> None:
    dataset = task.dataset("val")
    single = task.sample(tmp_path / "data" / "tagged" / "val" / "0002.jpg")
    assert torch.equal(single[0], dataset[1][0])
    inputs = task.preprocess(task.collate([single]), torch.device("cpu"), training=False)
    backbone = torch.nn.Conv2d(3, 8, 3, stride=4)
    head = task.build_head(FeatureInfo((8,), (4,)))
    with torch.no_grad():
        features = [backbone(inputs.images)]
        [described] = task.describe(head, features, inputs.targets)
        [scores] = head.predict(features, inputs.targets)
    assert list(json.loads(json.dumps(described))["tags"].values()) == scores.tolist()
    assert described["summary"] == ["indoor", "outdoor", "night"][int(scores.argmax())]


def test_documented_task_names_the_missing_file(task: Task, tmp_path: Path) -> None:
    (tmp_path / "data" / "tagged" / "val.json").unlink()
    with pytest.raises(UserError, match=r"val\.json"):
        task.check()
