"""Published rows beside what is on disk: a result, 'not run' or 'no data', never anything made up."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from gppf_ds.cli import main
from gppf_ds.errors import UserError
from gppf_ds.train import reproduce


def put_results(folder: Path, entries: list[dict[str, object]], steps: int = 100) -> None:
    folder.mkdir(parents=True)
    (folder / "results.json").write_text(json.dumps(entries))
    (folder / "config.yaml").write_text(yaml.safe_dump({"steps": steps}))


def ours(text: str, row: str) -> list[str]:
    lines = text.splitlines()
    place = next(i for i, line in enumerate(lines) if line.startswith(row))
    return lines[place + 1].split("ours")[1].split("  ")


def cells(text: str, row: str) -> list[str]:
    return [cell.strip() for cell in ours(text, row) if cell.strip()]


def test_every_row_has_a_value_for_every_column_and_every_run_a_recipe() -> None:
    for name, table in reproduce.load().items():
        for row in table.rows:
            assert len(row.published) == len(table.columns), f"{name}: {row.name}"
            for column in table.columns if row.run else ():
                recipe = str(row.recipe).format(task=column.task)
                assert (reproduce.recipes() / f"{recipe}.yaml").is_file(), f"{name}: {recipe}"


def test_results_stand_beside_the_published_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # no data here
    first = {"step": 0, "metrics": {"ade20k": {"mIoU": 0.01}}}
    last = {"step": 100, "metrics": {"ade20k": {"mIoU": 0.4567}}}
    put_results(tmp_path / "runs/single/ade20k", [first, last])
    text = reproduce.render(reproduce.load()["T3"], tmp_path / "runs")
    assert cells(text, "R50 UPerNet") == ["45.7", "no data"]
    assert "42.1" in text
    assert "not finished" not in text


def test_a_result_of_an_unfinished_run_is_marked_and_none_before_training_counts(tmp_path: Path) -> None:
    put_results(tmp_path / "single/ade20k", [{"step": 50, "metrics": {"ade20k": {"mIoU": 0.3}}}])
    put_results(tmp_path / "single/voc2012aug", [{"step": 0, "metrics": {"voc2012aug": {"mIoU": 0.3}}}])
    text = reproduce.render(reproduce.load()["T3"], tmp_path)
    assert cells(text, "R50 UPerNet")[0] == "30.0"
    assert cells(text, "R50 UPerNet")[1] in ("no data", "not run")
    assert "step 50 of 100; not finished" in text


def test_of_a_grid_the_best_run_counts(tmp_path: Path) -> None:
    for name, value in (("lr0.1_wd0", 0.2), ("lr0.01_wd0", 0.7), ("lr0.001_wd0", 0.4)):
        put_results(tmp_path / "cls10/cars" / name, [{"step": 100, "metrics": {"cars": {"top1": value}}}])
    assert cells(reproduce.render(reproduce.load()["T7"], tmp_path), "random")[4] == "70.0"


def test_data_without_a_run_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = reproduce.load()["T3"]
    monkeypatch.setattr(reproduce, "_has_data", lambda recipe, task: True)
    assert cells(reproduce.render(table, tmp_path), "R50 UPerNet") == ["not run", "not run"]


def test_broken_results_are_one_sentence(tmp_path: Path) -> None:
    put_results(tmp_path / "single/ade20k", [])
    (tmp_path / "single/ade20k/results.json").write_text("{")
    with pytest.raises(UserError, match=r"results\.json"):
        reproduce.render(reproduce.load()["T3"], tmp_path)


def test_the_command_prints_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["reproduce", "T7", "--runs", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "GPPF (IN21K path)" in said
    assert "98.4" in said
