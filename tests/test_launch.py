"""The scripts in launch/, run in a copy of the checkout whose Python, pip and launcher are small stand-ins.

The stand-ins write down how they were called, so no network is touched; what the real launcher makes of those
arguments is asked of its own parser.
"""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

from gppf_ds import launched

ROOT = Path(__file__).parents[1]
SCRIPTS = [*sorted((ROOT / "launch").glob("*.sh")), ROOT / "launch/slurm.sbatch", ROOT / ".ci/run"]

PYTHON = r"""#!/usr/bin/env bash
printf '%s\n' "$*" >>"$CALLS/python"
case "$*" in
    *version_info*) exit "${VERSION_RC:-0}" ;;
    *ensurepip*) exit "${ENSUREPIP_RC:-0}" ;;
    --version) echo "Python 3.12.9" ;;
    "-m venv"*) mkdir -p "${!#}/bin" && cp "$0" "${!#}/bin/python" ;;
    "-m pip"*) echo "$PIP_SAYS"; exit "${PIP_RC:-0}" ;;
    *getBuildInformation*) exit 1 ;;
    *cuda.device_count*) echo "${GPUS:-0}" ;;
    *socket*) echo 23456 ;;
esac
"""
COMMAND = r"""#!/usr/bin/env bash
name=${0##*/}
{ printf '%s\0' "$@"; printf '\n'; } >>"$CALLS/$name"
[[ "$name $1" == "gppf-ds demo-data" ]] && mkdir -p "$2"
if [[ $name == deepspeed ]]; then
    mkdir -p runs/demo
    [[ $CAUSE ]] && printf '127.0.0.1:23456\n%s\n' "$CAUSE" >runs/demo/cause.txt
    printf '%sKilling subprocess\n' "$LAUNCHER_SAYS"
    exit "${LAUNCHER_RC:-0}"
fi
exit 0
"""


class Checkout:
    """A copy of the scripts with stand-ins for everything that they start."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "a checkout"
        self.calls = folder / "calls"
        self.stubs = folder / "stubs"
        for made in (self.root, self.calls, self.stubs):
            made.mkdir()
        shutil.copytree(ROOT / "launch", self.root / "launch")
        shutil.copy(ROOT / "pyproject.toml", self.root)
        self.stub("python3.12", PYTHON)

    def stub(self, name: str, text: str, folder: Path | None = None) -> Path:
        path = (folder or self.stubs) / name
        path.write_text(text)
        path.chmod(0o755)
        return path

    def install(self) -> None:
        """Make .venv by the script's own hand, then put the stand-ins of the commands into it."""
        assert self.bash('source launch/_setup.sh; setup_environment ""').returncode == 0
        for name in ("deepspeed", "gppf-ds"):
            self.stub(name, COMMAND, self.root / ".venv/bin")

    def bash(self, command: str, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
        inherited = {key: value for key, value in os.environ.items() if key in ("HOME", "LANG")}
        return subprocess.run(
            ["bash", "-c", command, "quickstart.sh", *words],
            cwd=self.root,
            env={
                **inherited,
                "PATH": f"{self.stubs}:/usr/bin:/bin",
                "CALLS": str(self.calls),
                "PYTHON": str(self.stubs / "python3.12"),
                **environment,
            },
            capture_output=True,
            text=True,
            timeout=60,
        )

    def run(self, script: str, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return self.bash('bash "$@"', f"launch/{script}", *words, **environment)

    def called(self, name: str) -> list[list[str]]:
        path = self.calls / name
        return [line.split("\0")[:-1] for line in path.read_text().splitlines()] if path.exists() else []

    def pip_calls(self) -> list[str]:
        path = self.calls / "python"
        return [line for line in path.read_text().splitlines() if line.startswith("-m pip")] if path.exists() else []


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path)


def assert_one_sentence(done: subprocess.CompletedProcess[str], *words: str) -> None:
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    for word in words:
        assert word in done.stderr


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_parse(script: Path) -> None:
    assert subprocess.run(["bash", "-n", script], timeout=10).returncode == 0


class TestWhatIsMissing:
    def test_python_too_old(self, checkout: Checkout) -> None:
        assert_one_sentence(checkout.run("quickstart.sh", VERSION_RC="1"), "PYTHON=", "3.11 or 3.12")

    def test_no_python_at_all(self, checkout: Checkout) -> None:
        for name in ("python3.12", "python3.11", "python3"):
            checkout.stub(name, "#!/bin/sh\nexit 1\n")
        assert_one_sentence(checkout.run("test.sh", PYTHON=""), "no Python 3.11 or 3.12 was found")

    def test_python_without_venv(self, checkout: Checkout) -> None:
        assert_one_sentence(checkout.run("quickstart.sh", ENSUREPIP_RC="1"), "python3-venv")

    def test_full_disk(self, checkout: Checkout) -> None:
        checkout.stub("df", "#!/bin/sh\necho Filesystem\necho /dev/x 9 9 3145728 9% /\n")
        assert_one_sentence(checkout.run("quickstart.sh"), "3 GiB are free", "needs 8")

    def test_checkout_not_writable(self, checkout: Checkout) -> None:
        (checkout.root / ".venv").write_text("a file where the folder should be")
        assert_one_sentence(checkout.run("quickstart.sh"), "cannot write to", ".venv")

    @pytest.mark.parametrize(
        ("says", "words"),
        [
            ("WARNING: Retrying: Temporary failure in name resolution", "cannot reach the package registry"),
            ("ERROR: [Errno 28] No space left on device", "the disk ran full"),
            ("ERROR: Could not build wheels for x", "pip failed: ERROR: Could not build wheels for x"),
        ],
    )
    def test_pip_fails(self, checkout: Checkout, says: str, words: str) -> None:
        done = checkout.run("quickstart.sh", PIP_RC="1", PIP_SAYS=says)
        assert_one_sentence(done, words, "install.log")
        assert not list((checkout.root / ".venv").glob(".installed*"))


class TestInstalling:
    def test_order_and_reuse(self, checkout: Checkout) -> None:
        command = "source launch/_setup.sh; setup_environment test"
        assert checkout.bash(command).returncode == 0
        torch, package, opencv = checkout.pip_calls()
        assert torch.endswith("constraints.txt torch torchvision")
        assert package.endswith(f"--editable {checkout.root}[test]")
        assert opencv.endswith("--force-reinstall --no-deps opencv-python-headless")

        start = time.monotonic()
        assert checkout.bash(command).returncode == 0
        assert time.monotonic() - start < 1
        assert len(checkout.pip_calls()) == 3

    def test_changed_constraints_install_again(self, checkout: Checkout) -> None:
        checkout.install()
        with (checkout.root / "launch/constraints.txt").open("a") as constraints:
            constraints.write("six==1.17.0\n")
        checkout.install()
        assert len(checkout.pip_calls()) == 6

    def test_moved_checkout_is_made_anew(self, checkout: Checkout) -> None:
        checkout.install()
        (checkout.root / ".venv/stale").touch()
        checkout.root = checkout.root.rename(checkout.root.with_name("moved"))
        checkout.install()
        venvs = [line for line in (checkout.calls / "python").read_text().splitlines() if "-m venv" in line]
        assert venvs == [
            f"-m venv {checkout.root.with_name('a checkout')}/.venv",
            f"-m venv --clear {checkout.root}/.venv",
        ]


class TestQuickstart:
    def test_cpu_run_then_reuse_then_fresh(self, checkout: Checkout) -> None:
        from deepspeed.launcher.runner import parse_args

        checkout.install()
        done = checkout.run("quickstart.sh", "--names=[a, b]")
        assert done.returncode == 0, done.stderr
        [words] = checkout.called("deepspeed")
        parsed = parse_args(words)
        assert (parsed.num_gpus, parsed.module, parsed.no_local_rank, parsed.master_port) == (2, True, True, 23456)
        assert not Path(parsed.hostfile).is_file()
        assert parsed.user_script == "gppf_ds"
        recipe = ["--config", "ds_configs/recipes/demo.yaml", "--output", "runs/demo"]
        assert parsed.user_args == ["train", *recipe, "--names=[a, b]"]
        assert [" ".join(words) for words in checkout.called("gppf-ds")] == [
            "doctor",
            "demo-data demo-data",
            "export --run runs/demo",
            "analyze routes runs/demo",
            "summary --run runs/demo",
        ]

        assert checkout.run("quickstart.sh", "--names=[a, b]").returncode == 0
        assert len(checkout.called("deepspeed")) == 1
        assert [words[0] for words in checkout.called("gppf-ds")[5:]] == ["doctor", "summary"]

        assert_one_sentence(checkout.run("quickstart.sh"), "--fresh")
        assert checkout.run("quickstart.sh", "--fresh").returncode == 0
        assert len(checkout.called("deepspeed")) == 2

    def test_gpus_are_left_to_the_launcher(self, checkout: Checkout) -> None:
        checkout.install()
        assert checkout.run("quickstart.sh", GPUS="4").returncode == 0
        assert "--num_accelerators" not in checkout.called("deepspeed")[0]

    def test_gpu_names_that_the_launcher_cannot_read(self, checkout: Checkout) -> None:
        checkout.install()
        assert_one_sentence(checkout.run("quickstart.sh", GPUS="1", CUDA_VISIBLE_DEVICES="GPU-1f2e"), "device numbers")

    def test_failed_training_ends_with_its_cause(self, checkout: Checkout) -> None:
        checkout.install()
        done = checkout.run("quickstart.sh", LAUNCHER_RC="3", CAUSE="ValueError: the real cause")
        assert done.returncode == 3
        assert "Killing subprocess" in done.stdout
        assert done.stderr.splitlines()[-1] == "ValueError: the real cause"
        done = checkout.run("quickstart.sh", LAUNCHER_RC="2", LAUNCHER_SAYS="error: no such task\n")
        assert done.stderr.splitlines()[-1] == "error: no such task"
        assert not (checkout.root / "runs/demo/.quickstart").exists()
        assert checkout.run("quickstart.sh").returncode == 0


class TestTrain:
    @pytest.fixture
    def ready(self, checkout: Checkout) -> Checkout:
        checkout.root = checkout.root.rename(checkout.root.with_name("plain"))
        # It writes nothing where it is called: that may be /.
        checkout.stub("deepspeed", '#!/bin/bash\n{ printf "%s\\0" "$@"; printf "\\n"; } >>"$CALLS/deepspeed"\n')
        # What reads the hostfile, and carries odd words, is the real thing.
        checkout.stub("python", f'#!/bin/sh\nPYTHONPATH={shlex.quote(str(ROOT))} exec {sys.executable} "$@"\n')
        shutil.copy(ROOT / "hostfile.example", checkout.root / "hosts")
        (checkout.root / "r.yaml").touch()
        return checkout

    def test_missing_files_and_programs(self, ready: Checkout) -> None:
        assert_one_sentence(ready.run("train.sh", "hosts"), "HOSTFILE RECIPE")
        assert_one_sentence(ready.run("train.sh", "nowhere", "r.yaml"), "hostfile nowhere does not exist")
        assert_one_sentence(ready.run("train.sh", "hosts", "nothing.yaml"), "recipe nothing.yaml does not exist")
        (ready.root / "empty").write_text("# none\n")
        assert_one_sentence(ready.run("train.sh", "empty", "r.yaml"), "names no machine")
        (ready.root / "bad").write_text("node-1 slots=8\n-oProxyCommand=id slots=8\n")
        assert_one_sentence(ready.run("train.sh", "bad", "r.yaml"), "line 2", "-oProxyCommand=id")
        (ready.root / "odd python").mkdir()
        odd = ready.stub("python", (ready.stubs / "python").read_text(), ready.root / "odd python")
        ready.stub("pdsh", "#!/bin/sh\n")
        path = f"{odd.parent}:{ready.stubs}:/usr/bin:/bin"
        assert_one_sentence(ready.run("train.sh", "hosts", "r.yaml", PATH=path), "cannot start", "odd python")
        assert_one_sentence(ready.run("train.sh", "hosts", "r.yaml", PYTHONPATH="$(id)"), "PYTHONPATH")

    @pytest.mark.parametrize("word", ["--name=$(id)", "--name=a b", "--name=a;b", "--name='a'", "--name=%h", "--é=`x`"])
    def test_words_that_a_remote_shell_would_read_travel_in_one_that_it_cannot(
        self, ready: Checkout, word: str
    ) -> None:
        from deepspeed.launcher.runner import parse_args

        ready.stub("pdsh", "#!/bin/sh\n")
        done = ready.run("train.sh", "hosts", "r.yaml", word)
        assert done.returncode == 0, done.stderr
        parsed = parse_args(ready.called("deepspeed")[0])
        assert (parsed.hostfile, parsed.user_script) == (str(ready.root / "hosts"), "gppf_ds.launched")
        [encoded] = parsed.user_args
        assert re.fullmatch(r"[A-Za-z0-9_-]+", encoded)
        assert launched.decode(encoded) == (str(ready.root), ["train", "--config", "r.yaml", word])

    def test_arguments(self, ready: Checkout) -> None:
        from deepspeed.launcher.runner import fetch_hostfile, parse_args

        ready.stub("pdsh", "#!/bin/sh\n")
        assert ready.run("train.sh", "hosts", "r.yaml", "--steps=5").returncode == 0
        parsed = parse_args(ready.called("deepspeed")[0])
        assert (parsed.hostfile, parsed.module, parsed.no_local_rank) == (str(ready.root / "hosts"), True, True)
        assert parsed.user_args == ["train", "--config", "r.yaml", "--steps=5"]
        assert fetch_hostfile(str(ready.root / "hosts")) == {"node-1": 8, "node-2": 8}


class TestSlurm:
    """The batch script, with the real Python and stand-ins for Slurm and the launcher."""

    LAUNCHER = r"""#!/usr/bin/env bash
cp "$2" "$CALLS/hostfile"
echo "$MASTER_PORT" >"$CALLS/port"
[[ -z ${FAILS:-} ]] || exit 3
for _ in $(seq 300); do
    [[ -e "$SLURM_SUBMIT_DIR/runs/a run/stop" ]] && exit 0
    sleep 0.1
done
exit 4
"""
    SCONTROL = r"""#!/usr/bin/env bash
echo "$*" >>"$CALLS/scontrol"
[[ $1 == show ]] && printf 'node-1\nnode-2\n'
"""

    @pytest.fixture
    def job(self, checkout: Checkout) -> Checkout:
        checkout.stub("python", f'#!/bin/sh\nPYTHONPATH={shlex.quote(str(ROOT))} exec {sys.executable} "$@"\n')
        checkout.stub("deepspeed", self.LAUNCHER)
        checkout.stub("scontrol", self.SCONTROL)
        checkout.stub("pdsh", "#!/bin/sh\n")
        task = {"class_path": "gppf_ds.tasks.classification.Classification", "init_args": {"data": "d"}}
        recipe = {"output": "runs/a run", "steps": 9, "tasks": {"digits": {**task}}}
        recipe["tasks"]["digits"]["init_args"]["batch_size"] = 4
        (checkout.root / "r.yaml").write_text(yaml.safe_dump(recipe))
        return checkout

    def start(self, job: Checkout, *words: str, **extra: str) -> subprocess.Popen[str]:
        environment = {
            "PATH": f"{job.stubs}:/usr/bin:/bin",
            "CALLS": str(job.calls),
            "DS_ACCELERATOR": "cpu",
            "SLURM_JOB_ID": "77",
            "SLURM_SUBMIT_DIR": str(job.root),
            "SLURM_JOB_NODELIST": "node-[1-2]",
            "SLURM_GPUS_ON_NODE": "4",
            **extra,
        }
        command = ["bash", str(job.root / "launch/slurm.sbatch"), *words]
        return subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd="/"
        )

    def called(self, job: Checkout) -> list[str]:
        return (job.calls / "scontrol").read_text().splitlines()

    @pytest.mark.parametrize("wanted_back", [signal.SIGUSR1, signal.SIGTERM])
    def test_a_signal_stops_the_run_and_requeues_the_job(self, job: Checkout, wanted_back: signal.Signals) -> None:
        (job.root / "runs/a run").mkdir(parents=True)
        (job.root / "runs/a run/stop").touch()  # of a job that was killed
        process = self.start(job, "r.yaml")
        deadline = time.monotonic() + 60
        while not (job.calls / "port").exists():
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < deadline, "the launcher was not called"
            time.sleep(0.05)
        process.send_signal(wanted_back)
        printed, _ = process.communicate(timeout=30)
        assert process.returncode == 0, printed
        assert self.called(job) == ["show hostnames node-[1-2]", "requeue 77"]
        assert (job.calls / "hostfile").read_text() == "node-1 slots=4\nnode-2 slots=4\n"
        assert (job.calls / "port").read_text() == "20077\n"
        assert not list(job.root.glob("*.hostfile"))

    def test_a_failure_is_not_requeued(self, job: Checkout) -> None:
        process = self.start(job, "r.yaml", FAILS="1")
        process.communicate(timeout=60)
        assert process.returncode == 3
        assert self.called(job) == ["show hostnames node-[1-2]"]

    def test_a_bad_recipe_is_one_sentence(self, job: Checkout) -> None:
        process = self.start(job, "r.yaml", "--stepps=3")
        printed, _ = process.communicate(timeout=60)
        assert process.returncode != 0
        assert printed.count("\n") == 1, printed
        assert "stepps" in printed


def test_every_direct_dependency_is_pinned_within_its_range() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = (ROOT / "launch/constraints.txt").read_text().splitlines()
    pins = {pin.name.lower(): pin for pin in (Requirement(line) for line in lines if line and not line.startswith("#"))}
    wanted = [*project["dependencies"], *project["optional-dependencies"]["test"]]
    for requirement in map(Requirement, wanted):
        [pinned] = pins[requirement.name.lower()].specifier
        assert pinned.operator == "=="
        assert requirement.specifier.contains(pinned.version), requirement
