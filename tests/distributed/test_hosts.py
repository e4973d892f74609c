"""Several machines, each with its own network, files and sshd: the real launcher, and the check before it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import write_recipe

from distributed.hosts import Hosts, require_hosts
from distributed.ranks import ROOT, environment

ODD = "a run's $HOME; `x` 100%h é"
TIMEOUT = 30
PROMPT = "-oServerAliveInterval=2 -oServerAliveCountMax=2"


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[Hosts]:
    require_hosts()
    made = Hosts(tmp_path, 2)
    yield made
    made.close()


@pytest.fixture
def recipe(hosts: Hosts, light_recipe: dict[str, Any], demo_data: Path) -> dict[str, Any]:
    """On the machines: data at the same path, but each its own copy; a hostfile and, from :func:`ready`, the recipe."""
    for name in hosts.names:
        hosts.mount(name, demo_data, "/mnt/data")
    for task, folder in (("digits", "classification"), ("distance", "scenes")):
        light_recipe["tasks"][task]["init_args"]["data"] = f"/mnt/data/{folder}"
    light_recipe |= {"output": "runs/one", "steps": 3, "metrics_port": 9400}
    light_recipe["engine"]["timeout"] = TIMEOUT
    shared = hosts.folder / "shared"
    (shared / "hosts.txt").write_text("# two machines\nnode-1 slots=1\n\nnode-2 slots=1  # the second\n")
    (shared / ".deepspeed_env").write_text("DS_ACCELERATOR=cpu\nOMP_NUM_THREADS=1\nHF_HUB_OFFLINE=1\n")
    write_recipe(light_recipe, shared)
    return light_recipe


def inside(**extra: str) -> dict[str, str]:
    """The environment of who starts a job on node-1."""
    path = f"{Path(sys.executable).parent}:/usr/sbin:/usr/bin:/sbin:/bin"
    return {**environment(), "PYTHONPATH": str(ROOT), "PATH": path, "PDSH_SSH_ARGS_APPEND": PROMPT, **extra}


def doctor(hosts: Hosts, *options: str) -> tuple[int, list[list[str]], str]:
    """Exit code, the cells of every machine's line, and all that was printed."""
    words = [sys.executable, "-m", "gppf_ds", "doctor", "--hostfile", "hosts.txt", *options]
    done = hosts.run("node-1", words, timeout=180, environment=inside())
    lines = [line for line in done.stdout.splitlines() if re.match(r"[ *!] node-\d ", line)]
    return done.returncode, [re.split(r"\s{2,}", line[2:].strip()) for line in lines], done.stdout


def train(hosts: Hosts, *words: str, folder: str = "/mnt/shared", **extra: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        hosts.command("node-1", ["bash", str(ROOT / "launch/train.sh"), *words], folder),
        env=inside(**extra),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for(path: Path, lines: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 150
    while not path.is_file() or len(path.read_text().splitlines()) < lines:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, "training did not begin"
        time.sleep(0.1)


def test_doctor_finds_two_sound_machines_and_what_is_wrong_with_others(hosts: Hosts, recipe: dict[str, Any]) -> None:
    code, lines, printed = doctor(hosts, "--recipe", "recipe.yaml")
    assert code == 0, printed
    assert [line[0] for line in lines] == ["node-1", "node-2"]
    for _, ssh, clock, _, accelerators, ports, _, data, output, reduced in lines:
        assert (ssh, accelerators, ports, data) == ("ok", "CPU", "free", "ok")
        assert abs(float(clock.split()[0])) < 0.5
        assert output.startswith("shared, ")
        assert re.fullmatch(r"1 MiB in [\d.]+ ms, 2 ranks", reduced)
    assert not list((hosts.folder / "shared").rglob(".gppf-ds-doctor-*"))

    # An edited package, a recipe and data of its own, and a port in use: what differs is named, and nothing is started.
    package = hosts.folder / "package"
    shutil.copytree(ROOT / "gppf_ds", package, ignore=shutil.ignore_patterns("__pycache__"))
    (package / "seeding.py").write_text((package / "seeding.py").read_text() + "\n# edited\n")
    hosts.mount("node-2", package, str(ROOT / "gppf_ds"))
    own = write_recipe({**recipe, "seed": 4}, hosts.folder, "own.yaml")
    hosts.mount("node-2", own, "/mnt/shared/recipe.yaml")
    hosts.mount("node-2", package, "/mnt/data")
    serve = "import socket, time; s = socket.socket(); s.bind(('127.0.0.1', 9400)); time.sleep(100)"
    server = subprocess.Popen(hosts.command("node-2", [sys.executable, "-c", serve]))
    code, lines, printed = doctor(hosts, "--recipe", "recipe.yaml")
    server.kill()
    assert code == 1, printed
    assert [line[9] for line in lines] == ["not tried", "not tried"]
    assert "node-2: package: It has source " in printed
    assert "node-2: recipe: It has seed 4 where node-1 has 0." in printed
    assert "node-2: data: tasks.digits" in printed
    assert "node-2: ports: In use: 9400" in printed
    for target in ("/mnt/data", "/mnt/shared/recipe.yaml", str(ROOT / "gppf_ds")):
        hosts.unmount("node-2", target)


def test_doctor_sees_a_folder_that_is_not_shared_and_a_machine_that_is_gone(
    hosts: Hosts, recipe: dict[str, Any]
) -> None:
    (hosts.folder / "shared/runs").mkdir()
    (hosts.folder / "empty").mkdir()
    hosts.mount("node-2", hosts.folder / "empty", "/mnt/shared/runs")
    code, _, printed = doctor(hosts, "--recipe", "recipe.yaml")
    assert code == 1, printed
    assert "node-2: output: /mnt/shared/runs shows the files of 1 of 2 machines" in printed

    (hosts.folder / "shared/hosts.txt").write_text("node-1 slots=1\nnode-9 slots=1\n")
    code, _, printed = doctor(hosts)
    assert code == 1, printed
    assert re.search(r"node-9: ssh: ssh: Could not resolve hostname node-9", printed)

    (hosts.folder / "shared/hosts.txt").write_text("node-1 slots=1\nnode-2 slots=two\n")
    code, _, printed = doctor(hosts)
    assert code == 2
    assert printed == "error: hosts.txt, line 2: 'node-2 slots=two' is not of the form 'node-1 slots=8'.\n"


def test_a_recipe_is_trained_across_machines_from_a_folder_with_odd_characters(
    hosts: Hosts, recipe: dict[str, Any]
) -> None:
    shared = hosts.folder / "shared"
    folder = shared / ODD
    folder.mkdir()
    for name in ("hosts.txt", ".deepspeed_env"):
        shutil.copy(shared / name, folder / name)
    shutil.copy(shared / "recipe.yaml", folder / "a recipe.yaml")
    process = train(
        hosts, "hosts.txt", "a recipe.yaml", f"--output=runs/{ODD}", "--log_every=1", folder=f"/mnt/shared/{ODD}"
    )
    printed, _ = process.communicate(timeout=240)
    assert process.returncode == 0, printed
    run = folder / "runs" / ODD
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 3
    [last] = (run / "checkpoints").glob("step-*3")
    assert len(list(last.glob("rank-*.safetensors"))) == 2
    assert [entry["step"] for entry in json.loads((run / "results.json").read_text())] == [0, 3]
    assert not Path("/runs", ODD).exists()  # the launcher's own folder is /


def test_a_machine_that_is_cut_off_ends_the_job_with_its_cause_and_the_job_resumes(
    hosts: Hosts, recipe: dict[str, Any]
) -> None:
    shared = hosts.folder / "shared"
    process = train(hosts, "hosts.txt", "recipe.yaml", "--steps=4000")
    wait_for(shared / "runs/one/metrics.jsonl", 6, process)
    hosts.cut("node-2")
    cut = time.monotonic()
    printed, _ = process.communicate(timeout=180)
    took = time.monotonic() - cut
    assert process.returncode not in (0, None)
    assert took < TIMEOUT + 40, f"{took} s"  # the time-out, and the launcher's own end
    cause = (shared / "runs/one/cause.txt").read_text()
    assert re.search(r"[Tt]imed out|[Tt]imeout", cause), cause
    # The machine that is cut off may be the first to notice, and its own words are lost with it.
    assert "Traceback" in printed or "another rank failed" in printed, printed

    deadline = time.monotonic() + 60
    while any("gppf_ds train" in hosts.processes(name) for name in hosts.names):
        assert time.monotonic() < deadline, "ranks are left behind"
        time.sleep(0.5)
    hosts.join("node-2")
    done = int(sorted((shared / "runs/one/checkpoints").glob("step-*"))[-1].name.partition("-")[2])
    process = train(hosts, "hosts.txt", "recipe.yaml", f"--steps={done + 2}")
    printed, _ = process.communicate(timeout=240)
    assert process.returncode == 0, printed
    assert f"at step {done} of {done + 2}" in printed
