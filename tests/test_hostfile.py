"""Hostfiles: what the launcher would take wrongly is one sentence with its line."""

import subprocess
import sys
from pathlib import Path

import pytest
from distributed.ranks import ROOT, environment

from gppf_ds import hostfile
from gppf_ds.errors import UserError


def test_machines_in_order(tmp_path: Path) -> None:
    file = tmp_path / "hosts of mine"
    file.write_text("# two\n\nnode-1.cluster slots=8\n  me@10.0.0.2   slots=8  # with GPUs\n")
    assert [(host.name, host.slots, host.line) for host in hostfile.read(file)] == [
        ("node-1.cluster", 8, 3),
        ("me@10.0.0.2", 8, 4),
    ]
    assert len(hostfile.read(ROOT / "hostfile.example")) == 2


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("node-1\n", "line 1: 'node-1' is not of the form"),
        ("node-1 slots=8\nnode-2 slots=8 gpus=3\n", "line 2: 'node-2 slots=8 gpus=3' is not of the form"),
        ("node-1 slots=-1\n", "is not of the form"),
        ("node-1 slots=0\n", "starts no rank"),
        ("a slots=2\n\n# b\na slots=2\n", "line 4: 'a slots=2' names the same machine as line 1"),
        ("a slots=2\nb slots=4\n", "line 2: 'b slots=4' has another number of slots than line 1"),
        ("-oProxyCommand=id slots=1\n", "line 1: '-oProxyCommand=id slots=1': a machine's name"),
        ("node[1-4] slots=1\n", "a machine's name"),
        ("a,b slots=1\n", "a machine's name"),
        ("$(id) slots=1\n", "a machine's name"),
        ("# nothing\n", "names no machine"),
        (b"\xff\xfe slots=1\n", "cannot be read"),
    ],
)
def test_what_is_wrong_is_one_sentence(text: str | bytes, words: str, tmp_path: Path) -> None:
    file = tmp_path / "hosts"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError) as caught:
        hostfile.read(file)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_as_a_program(tmp_path: Path) -> None:
    for file, code in ((ROOT / "hostfile.example", 0), (tmp_path / "nowhere", 2)):
        command = [sys.executable, "-m", "gppf_ds.hostfile", str(file)]
        done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=60)
        assert done.returncode == code
        assert done.stdout == ("2\n" if code == 0 else "")
        assert done.stderr.count("\n") == (0 if code == 0 else 1)
