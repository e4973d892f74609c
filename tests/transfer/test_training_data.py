"""The model card says what trained each layer of a path, on which data and under which licence."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from gppf_ds.train.provenance import Provenance, Record
from gppf_ds.transfer.training_data import of_path, section

NUMBERS = {"Stem": 1, "Res2.0": 0, "Res3.0": 0}


def record(task: str | None, data: str, licence: str = "", run: str = "second", **steps: int) -> Record:
    return Record(
        run, 0, task, None, data, licence, 0 if task is None else 8, {k.replace("_", "."): n for k, n in steps.items()}
    )


def checkpoint(folder: Path) -> Path:
    weights = record(None, "timm resnet50.a1_in1k", "apache-2.0", "first", unit_0_1=0, unit_1_0=0, unit_2_0=0)
    old = record("objects", "COCO 2017", "CC BY 4.0", "first", unit_0_1=40, unit_1_1=40, unit_2_0=30, task_objects=40)
    digits = record("digits", "mine", unit_0_1=5, unit_1_0=7, unit_2_0=6, task_digits=7)
    elsewhere = record("other", "theirs", unit_0_0=9, task_other=9)
    provenance = Provenance([weights, old], [digits, elsewhere])
    (folder / "state.json").write_text(json.dumps({"provenance": asdict(provenance)}))
    return folder


def test_of_a_path_only_its_own_units_count(tmp_path: Path) -> None:
    records = of_path(checkpoint(tmp_path), "digits", NUMBERS, head=True)
    assert [(entry["task"], entry["steps"]) for entry in records] == [
        (None, {"Stem": 0, "Res2.0": 0, "Res3.0": 0}),
        ("objects", {"Stem": 40, "Res3.0": 30}),
        ("digits", {"Stem": 5, "Res2.0": 7, "Res3.0": 6, "head": 7}),
    ]
    assert records[1]["licence"] == "CC BY 4.0"
    [*_, digits] = of_path(checkpoint(tmp_path), "digits", NUMBERS, head=False)
    assert "head" not in digits["steps"]


def test_the_card_lists_data_and_layers(tmp_path: Path) -> None:
    lines = section(of_path(checkpoint(tmp_path), "digits", NUMBERS, head=True), list(NUMBERS)).splitlines()
    assert "| timm resnet50.a1_in1k | apache-2.0 | initial weights | first, seed 0 |  |" in lines
    assert "| COCO 2017 | CC BY 4.0 | objects | first, seed 0 | 320 |" in lines
    assert "| mine | not recorded | digits | second, seed 0 | 56 |" in lines
    weights = "initial weights"
    assert f"| Stem | {weights}; objects 40; digits 5 |" in lines
    assert f"| Res2.0 | {weights}; digits 7 |" in lines
    assert f"| Res3.0 | {weights}; objects 30; digits 6 |" in lines
    assert "| head | digits 7 |" in lines


def test_neighbours_with_the_same_teachers_share_a_row(tmp_path: Path) -> None:
    records = [asdict(record("a", "x", Stem=4)), asdict(record("b", "y"))]
    records[0]["steps"] = {"Stem": 4, "Res2.0": 6, "Res3.0": 5}
    records[1]["steps"] = {"Res3.0": 1}
    text = section(records, list(NUMBERS))
    assert "| Stem to Res2.0 | a 4 to 6 |" in text
    assert "| Res3.0 | a 5; b 1 |" in text
    assert "| head |" not in text


def test_tasks_of_one_name_are_told_apart_by_their_runs() -> None:
    records = [asdict(record("a", "x", run=run, Stem=4)) for run in ("first", "second")]
    text = section(records, ["Stem"])
    assert "| Stem | a (first, seed 0) 4; a (second, seed 0) 4 |" in text


def test_without_a_record_the_card_says_so(tmp_path: Path) -> None:
    assert of_path(tmp_path, "digits", NUMBERS, head=True) == []
    (tmp_path / "state.json").write_text(json.dumps({"step": 1}))
    assert of_path(tmp_path, "digits", NUMBERS, head=True) == []
    assert "Not recorded" in section([], list(NUMBERS))
