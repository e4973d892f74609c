"""What a run promises when something goes wrong, with real faults at real ranks: see :mod:`distributed.planted`."""

from __future__ import annotations

import json
import os
import random
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from conftest import make_light_recipe, write_recipe
from safetensors.torch import load_file
from torch import Tensor

from distributed.nursery import End, Nursery, nursery
from distributed.planted import PHASES, RENAME_PHASES
from distributed.ranks import environment, free_port
from gppf_ds.train import history
from gppf_ds.train.checkpoint import CheckpointReader, complete
from gppf_ds.train.record import read_state

STEPS, EVERY, RANKS = 8, 2, 2
TIMEOUT = 30.0
"""Seconds for a collective, and for a failed job to be gone."""
SETTINGS: dict[str, dict[str, Any]] = {
    "stage 0": {},
    "stage 1, AdamW": {"engine.zero_stage": 1, "optimizer.name": "adamw", "optimizer.learning_rate": 0.001},
    "stage 2, momentum": {"engine.zero_stage": 2},
    "stage 3, AdamW": {"engine.zero_stage": 3, "optimizer.name": "adamw", "optimizer.learning_rate": 0.001},
    "in the foreground": {"checkpoint.background": False},
}


class Lab:
    """Runs of one small recipe, each in a folder of its own, and the one that nobody disturbs."""

    def __init__(self, folder: Path, demo_data: Path, ranks: Nursery) -> None:
        self.folder = folder
        self.ranks = ranks
        recipe = make_light_recipe(demo_data, folder / "unused")
        recipe.update(steps=STEPS, evaluate_every=4)
        recipe["loader"]["workers"] = 0  # a killed worker would only be replaced
        recipe["engine"]["timeout"] = TIMEOUT
        recipe["checkpoint"]["every"] = EVERY
        self.recipe = write_recipe(recipe, folder)
        self._undisturbed: dict[str, dict[str, Tensor]] = {}

    def launch(self, name: str, settings: dict[str, Any] | None = None, **options: Any) -> End:
        overrides = [f"--{key}={value}" for key, value in (settings or {}).items()]
        words = ["train", "--config", str(self.recipe), f"--output={self.folder / name}", *overrides]
        return self.ranks.launch(*words, ranks=RANKS, patience=TIMEOUT, **options)

    def undisturbed(self, setting: str) -> dict[str, Tensor]:
        """All tensors at the end of the run with this setting."""
        if setting not in self._undisturbed:
            name = setting.replace(" ", "-").replace(",", "")
            end = self.launch(name, SETTINGS[setting])
            assert end.codes == [0] * RANKS, end.text
            self._undisturbed[setting] = tensors(self.folder / name)
        return self._undisturbed[setting]


def tensors(run: Path) -> dict[str, Tensor]:
    """All that the last checkpoint holds; it has to be that of the last step."""
    last = complete(run / "checkpoints")[-1]
    assert last.name == f"step-{STEPS:08d}"
    CheckpointReader(last)
    return {f"{file.name}:{key}": t for file in last.glob("*.safetensors") for key, t in load_file(file).items()}


def assert_same(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert got.keys() == wanted.keys()
    assert not [key for key in wanted if not got[key].equal(wanted[key])]


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory, demo_data: Path) -> Iterator[Lab]:
    folder = tmp_path_factory.mktemp("faults")
    with nursery(folder / "ranks") as ranks:
        yield Lab(folder, demo_data, ranks)


def anywhere(chance: random.Random, first: int) -> dict[str, Any]:
    """A rank, a step from ``first`` on, and a phase in which it passes by."""
    phase = chance.choice(PHASES)
    rank = 0 if phase in RENAME_PHASES else chance.randrange(RANKS)
    if phase == "evaluate":
        return {"rank": rank, "phase": phase, "step": 4 if first < 4 else 8}
    if phase in PHASES[:5]:
        return {"rank": rank, "phase": phase, "step": chance.randrange(first, STEPS)}
    if phase == "discarding":  # the third checkpoint is the first for which another goes
        first = max(first, 2 * EVERY)
    step = chance.randrange(first // EVERY + 1, STEPS // EVERY + 1) * EVERY
    return {"rank": rank, "phase": phase, "step": max(step, first + 1)}


def kill_again_and_again(lab: Lab, name: str, setting: str, faults: list[dict[str, Any]]) -> int:
    """Kills the run at each of these places, one launch after another, and lets it end; how many struck."""
    run, struck = lab.folder / name, 0
    for fault in faults:
        end = lab.launch(name, SETTINGS[setting], fault={"kind": "kill", **fault})
        assert not end.killed, f"{fault}: ranks {end.killed} outlived their peer\n{end.text}"
        if "planted kill" in end.text:
            struck += 1
            assert end.codes[fault["rank"]] == -signal.SIGKILL, end.text
            assert end.lingered < TIMEOUT
        else:  # the run had passed that place
            assert end.codes == [0] * RANKS, end.text
        for path in complete(run / "checkpoints"):
            CheckpointReader(path)
    end = lab.launch(name, SETTINGS[setting])
    assert end.codes == [0] * RANKS, end.text
    assert_same(tensors(run), lab.undisturbed(setting))
    assert not list((run / "checkpoints").glob(".*"))
    return struck


def test_kills_leave_no_trace_in_the_weights(lab: Lab) -> None:
    faults = [
        {"rank": 1, "step": 3, "phase": "backward"},
        {"rank": 0, "step": 4, "phase": "writing"},
        {"rank": 0, "step": 4, "phase": "renaming"},
        {"rank": 0, "step": 6, "phase": "discarding"},
    ]
    assert kill_again_and_again(lab, "killed", "stage 0", faults) == 4


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("setting", SETTINGS)
def test_kills_at_random_moments_leave_no_trace(lab: Lab, setting: str) -> None:
    chance = random.Random(f"kills, {setting}")
    # Up to half of the run first, so that there is something left to kill.
    faults = [anywhere(chance, 0) for _ in range(3)] + [anywhere(chance, 6) for _ in range(5)]
    faults.sort(key=lambda fault: int(fault["step"]))
    struck = kill_again_and_again(lab, f"random-{setting.replace(' ', '-').replace(',', '')}", setting, faults)
    print(setting, struck, "of", len(faults), "kills struck:", faults)
    assert struck >= 4


DEEPSPEED = (
    sys.executable,
    "-c",
    "from deepspeed.launcher.runner import main; main()",
    "--num_accelerators",
    str(RANKS),
)
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(RANKS))


@pytest.mark.long
@pytest.mark.parametrize("by", ["restarts", "torchrun"])
def test_a_killed_run_starts_again_by_itself(lab: Lab, by: str) -> None:
    run, fault = lab.folder / by, {"kind": "kill", "rank": 1, "step": 5, "phase": "backward"}
    planted = json.dumps({**fault, "once": str(lab.folder / f"{by}.struck")})
    words = ["train", "--config", str(lab.recipe), f"--output={run}"]
    if by == "restarts":
        launch = shlex.join([*DEEPSPEED, "--master_port", str(free_port()), "--module", "distributed.planted"])
        command = [sys.executable, "-m", "gppf_ds", *words, "--restarts", "1", "--launch", launch]
    else:
        command = [*TORCHRUN, "--max-restarts", "1", "-m", "distributed.planted", *words]
    variables = environment(PLANTED=planted, TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1")
    done = subprocess.run(
        command, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=240
    )
    assert done.returncode == 0, done.stdout
    assert done.stdout.count("planted kill") == 1
    assert f"resuming from {run / 'checkpoints' / 'step-00000004'}" in done.stdout
    kinds = [line["kind"] for line in history.read(run / "decisions.jsonl")]
    assert ("restart" in kinds) == (by == "restarts")
    assert kinds[-1] == "resume"
    assert_same(tensors(run), lab.undisturbed("stage 0"))


FAILURES = [
    ({"kind": "exception", "rank": 1, "step": 3, "phase": "read"}, "ArithmeticError: planted in read"),
    ({"kind": "exception", "rank": 0, "step": 3, "phase": "update"}, "ArithmeticError: planted in update"),
    ({"kind": "exception", "rank": 0, "step": 4, "phase": "evaluate"}, "ArithmeticError: planted in evaluate"),
    ({"kind": "exception", "rank": 1, "step": 2, "phase": "written"}, "ArithmeticError: planted in written"),
    ({"kind": "exception", "rank": 0, "step": 8, "phase": "renaming"}, "ArithmeticError: planted in renaming"),
    ({"kind": "hang", "rank": 1, "step": 3, "phase": "read"}, "another rank failed; it was in strike"),
    ({"kind": "hang", "rank": 1, "step": 4, "phase": "writing"}, "waited 30 s for the checkpoint files of the ranks 1"),
    ({"kind": "freeze", "rank": 0, "step": 3, "phase": "forward"}, "Timed out waiting 30000ms"),
]
IN_BRIEF = (0, 3, 5)


def marked() -> list[Any]:
    marks = [[] if number in IN_BRIEF else [pytest.mark.long] for number in range(len(FAILURES))]
    return [pytest.param(*case, marks=mark) for case, mark in zip(FAILURES, marks, strict=True)]


@pytest.mark.parametrize(("fault", "cause"), marked())
def test_a_fault_ends_the_job_with_its_cause(lab: Lab, fault: dict[str, Any], cause: str) -> None:
    name = "-".join(map(str, fault.values()))
    end = lab.launch(name, fault=fault)
    assert cause in end.text, end.text
    assert all(end.codes), end
    # A process that the system has stopped hears nothing but SIGKILL, which launchers send in the end.
    assert end.killed == ([fault["rank"]] if fault["kind"] == "freeze" else [])
    assert end.lasted < 60 + 2 * TIMEOUT
    assert end.text.count("Traceback (most recent call last)") - end.text.count("direct cause") == 1, end.text
    file = lab.folder / name / "cause.txt"
    assert cause in file.read_text()
    later = [line for line in end.text.splitlines() if "another rank failed" in line]
    assert all(line.endswith(f"; the cause is in {file}") for line in later), later
    assert len(later) == RANKS - 1 - len(end.killed)
    assert read_state(lab.folder / name)["state"] == "failed"
    assert history.read(lab.folder / name / "decisions.jsonl")[-1]["kind"] == "failure"


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[None]:
    """A disk of its own at this folder; skips where that cannot be."""
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"cannot mount a small disk here: {mounted.stderr.decode().strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def one_sentence(end: End) -> str:
    """The error on the screen, which is all there is."""
    assert "Traceback" not in end.text, end.text
    lines = [line for line in end.text.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, end.text
    assert 2 in end.codes
    return lines[0]


def test_a_full_disk_leaves_the_last_checkpoint(lab: Lab, tmp_path: Path) -> None:
    lab.undisturbed("stage 0")
    one = sum(file.stat().st_size for file in complete(lab.folder / "stage-0" / "checkpoints")[-1].iterdir())
    disk = tmp_path / "disk"
    with small_disk(disk, f"{int(one * 1.6) // 1024 + 128}k"):
        os.symlink(disk, lab.folder / "full")
        end = lab.launch("full")
        sentence = one_sentence(end)
        assert "the checkpoint of step 4 could not be written" in sentence
        assert "No space left on device" in sentence
        assert "step-00000002 is whole" in sentence
        [good] = complete(disk / "checkpoints")
        assert CheckpointReader(good).state.step == 2
        subprocess.run(["mount", "-o", f"remount,size={4 * one // 1024 + 512}k", disk], check=True)
        assert lab.launch("full").codes == [0] * RANKS
        assert_same(tensors(disk), lab.undisturbed("stage 0"))


@pytest.mark.parametrize("phase", ["staging", "forward"])
def test_a_disk_that_takes_no_more_is_told_in_a_sentence(lab: Lab, phase: str) -> None:
    """At the save, or already at the lines of metrics.jsonl."""
    end = lab.launch(f"no-room-{phase}", fault={"kind": "full", "rank": 0, "step": 4, "phase": phase})
    sentence = one_sentence(end)
    assert "File too large" in sentence
    assert "start again" in sentence
    assert [path.name for path in complete(lab.folder / f"no-room-{phase}" / "checkpoints")][-1] == "step-00000002"


def test_a_folder_that_cannot_be_made_is_told_in_a_sentence(lab: Lab) -> None:
    (lab.folder / "file").write_text("no folder")
    assert "file/run" in one_sentence(lab.launch("file/run"))


def test_a_tampered_checkpoint_is_refused(lab: Lab) -> None:
    assert lab.launch("tampered", {"steps": 2}).codes == [0] * RANKS
    file = lab.folder / "tampered" / "checkpoints" / "step-00000002" / "shared.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"!")
    sentence = one_sentence(lab.launch("tampered"))
    assert str(file) in sentence
    assert "use another checkpoint" in sentence


def test_a_slow_rank_changes_nothing(lab: Lab) -> None:
    for phase, step in (("read", 1), ("written", 2)):
        end = lab.launch(f"slow-{phase}", fault={"kind": "slow", "rank": 1, "step": step, "phase": phase})
        assert "planted slow" in end.text
        assert end.codes == [0] * RANKS, end.text
        assert_same(tensors(lab.folder / f"slow-{phase}"), lab.undisturbed("stage 0"))


def test_one_corrupt_sample_and_one_nan_do_not_end_a_run(lab: Lab) -> None:
    end = lab.launch("corrupt", fault={"kind": "corrupt", "rank": 0, "step": 3, "phase": "read"})
    assert end.codes == [0] * RANKS, end.text
    assert end.text.count("unreadable sample replaced") >= 1

    end = lab.launch("nan", fault={"kind": "nan", "rank": 1, "step": 3, "phase": "forward"})
    assert end.codes == [0] * RANKS, end.text
    assert all(value.isfinite().all() for value in tensors(lab.folder / "nan").values())
    skips = [line for line in history.read(lab.folder / "nan" / "decisions.jsonl") if line["kind"] == "skip"]
    assert [line["step"] for line in skips] == [3]


@pytest.mark.parametrize(
    ("number", "rank"), [(signal.SIGUSR1, 0), pytest.param(signal.SIGTERM, 1, marks=pytest.mark.long)]
)
def test_a_signal_to_one_rank_stops_all_with_a_checkpoint(lab: Lab, number: int, rank: int) -> None:
    name = f"signal-{number}"
    # Rank 0 prints steps; rank 1 says where a slow step was planted.
    fault = {"kind": "slow", "rank": rank, "step": 2, "phase": "forward"}
    end = lab.launch(name, fault=fault, number=number, rank=rank, line="planted slow")
    assert end.codes == [0] * RANKS, end.text
    [line] = [line for line in end.text.splitlines() if line.startswith("stopped at step")]
    assert signal.Signals(number).name in line
    stopped = complete(lab.folder / name / "checkpoints")[-1]
    assert CheckpointReader(stopped).state.step in (3, 4)
    assert read_state(lab.folder / name)["state"] == "stopped"
    end = lab.launch(name)
    assert f"resuming from {stopped}" in end.text
    assert_same(tensors(lab.folder / name), lab.undisturbed("stage 0"))


def test_a_file_stops_a_run_and_is_taken_away(lab: Lab) -> None:
    (lab.folder / "by-hand").mkdir()
    (lab.folder / "by-hand" / "stop").touch()
    end = lab.launch("by-hand")
    assert end.codes == [0] * RANKS, end.text
    assert "as the file" in end.text
    assert read_state(lab.folder / "by-hand")["state"] == "stopped"
    assert lab.launch("by-hand").codes == [0] * RANKS
    assert_same(tensors(lab.folder / "by-hand"), lab.undisturbed("stage 0"))
