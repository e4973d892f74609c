"""The command line: help without heavy imports, names that do not exist, a launcher's extra argument."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from gppf_ds.cli import COMMANDS, main

ROOT = Path(__file__).resolve().parents[1]


def test_help_names_every_command_and_imports_nothing_heavy() -> None:
    code = (
        "import sys; from gppf_ds.cli import main; assert main(['--help']) == 0; "
        "heavy = {'torch', 'deepspeed', 'mmdet', 'timm', 'numpy'} & set(sys.modules); assert not heavy, heavy"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=ROOT, check=True
    )
    assert all(name in done.stdout for name in COMMANDS)


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    assert command in capsys.readouterr().out


def test_a_wrong_command_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trian"]) == 2
    assert "'train'" in capsys.readouterr().err


def test_the_launchers_local_rank_is_ignored(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--local_rank=1", "--version"]) == 0
    assert capsys.readouterr().out.strip()


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in (
        ["export", "--run"],
        ["evaluate", "--run"],
        ["summary", "--run"],
        ["analyze", "routes"],
        ["report"],
    ):
        assert main([*command, str(tmp_path)]) == 2
        assert "is no run" in capsys.readouterr().err
