"""A checkpoint of any ZeRO stage as one plain file: bit for bit, in bounded memory, and no code of it runs."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from conftest import write_recipe
from deepspeed.runtime.zero.config import ZeroStageEnum
from distributed.ranks import end_ranks, environment
from safetensors import safe_open
from safetensors.torch import load_file

from gppf_ds.errors import UserError
from gppf_ds.simt.masked import Fragment
from gppf_ds.train.checkpoint import TrainState
from gppf_ds.train.recipe import read_run
from gppf_ds.train.restore import build_model, shared_tensors
from gppf_ds.train.saving import save
from gppf_ds.transfer import deepspeed_files
from gppf_ds.transfer.commands import convert as command
from gppf_ds.transfer.convert import convert

BF16 = {"bf16": {"enabled": True}}
CASES: dict[str, dict[str, Any]] = {
    **{f"stage{stage}-fp32": {"zero_optimization": {"stage": stage}} for stage in range(4)},
    **{f"stage{stage}-bf16": {"zero_optimization": {"stage": stage}, **BF16} for stage in range(4)},
    "stage1-bf16-fp32-gradients": {
        "zero_optimization": {"stage": 1},
        **BF16,
        "data_types": {"grad_accum_dtype": "fp32"},
    },
    "stage2-round-robin": {"zero_optimization": {"stage": 2, "round_robin_gradients": True}, **BF16},
    "stage2-offload": {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}, **BF16},
    "stage3-sub-groups": {"zero_optimization": {"stage": 3, "sub_group_size": 20}, **BF16},
}
WIDE = {f"wide-stage{stage}": {"zero_optimization": {"stage": stage}} for stage in (2, 3)}
NO_ORACLE = {"stage0-fp32", "stage0-bf16", "stage1-bf16-fp32-gradients"}
"""What DeepSpeed's own script cannot read."""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a checkpoint of two ranks, and what it has to give, for every case."""
    folder = tmp_path_factory.mktemp("deepspeed")
    script = str(Path(__file__).with_name("convert_case.py"))
    codes, outputs = end_ranks([[script, str(folder), json.dumps({**CASES, **WIDE})]] * 2, timeout=240)
    assert codes == [0, 0], "\n".join(outputs)
    return folder


@pytest.fixture
def copied(made: Path, tmp_path: Path) -> Iterator[Path]:
    """A checkpoint of stage 2 and one of stage 3, to damage."""
    for name in ("stage2-bf16", "stage3-bf16"):
        shutil.copytree(made / name, tmp_path / name)
    return tmp_path


def same(got: torch.Tensor, wanted: torch.Tensor) -> bool:
    return got.dtype == wanted.dtype and torch.equal(got, wanted)


@pytest.mark.parametrize("name", CASES)
def test_the_file_holds_the_masters_bit_for_bit(made: Path, tmp_path: Path, name: str) -> None:
    file = tmp_path / "new" / "plain.safetensors"
    summary = convert(made / name, file)
    got = load_file(file)
    live = load_file(made / f"{name}.masters.safetensors")
    if name != "stage2-round-robin":  # DeepSpeed's own way to the live masters mixes them up there
        assert all(same(got[key], value) for key, value in live.items())
    if not name.startswith("stage3"):
        weights = torch.load(made / name / "global_step2" / "mp_rank_00_model_states.pt", weights_only=True)["module"]
        assert got.keys() == weights.keys()
        assert all(same(got[key].to(value.dtype), value) for key, value in weights.items())
    assert torch.equal(got["tied.weight"], got["first.weight"])
    oracle = made / f"{name}.oracle.safetensors"
    assert oracle.exists() == (name not in NO_ORACLE)
    wanted = load_file(oracle) if oracle.exists() else {}
    assert all(same(got[key], value) for key, value in wanted.items())

    sys.path.insert(0, str(Path(__file__).parent))
    from convert_case import Net

    torch.manual_seed(0)
    net = Net()
    bits = "bf16" in CASES[name]
    frozen = net.frozen.weight.to(torch.bfloat16).float() if bits else net.frozen.weight
    net.load_state_dict(got, strict=True)
    assert torch.equal(got["frozen.weight"], frozen)
    assert same(got["mask"], torch.tensor([True, False, True]))
    assert same(got["count"], torch.tensor(3))
    assert summary.tensors == len(net.state_dict())
    assert summary.parameters == sum(p.numel() for p in net.parameters())
    assert summary.bytes == file.stat().st_size
    assert summary.rounded == (2 if bits else 0)  # the frozen layer
    assert list(file.parent.iterdir()) == [file]


def test_a_tag_is_as_good_as_its_folder_and_other_dtypes_are_rounded(made: Path, tmp_path: Path) -> None:
    convert(made / "stage3-bf16", tmp_path / "a.safetensors")
    convert(made / "stage3-bf16" / "global_step2", tmp_path / "b.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    whole = load_file(tmp_path / "a.safetensors")
    for name, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
        convert(made / "stage3-bf16", tmp_path / f"{name}.safetensors", name)
        got = load_file(tmp_path / f"{name}.safetensors")
        assert all(same(got[key], t.to(dtype) if t.is_floating_point() else t) for key, t in whole.items())


def test_the_command_says_what_it_wrote(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "plain.safetensors"
    assert command([str(made / "stage2-bf16"), str(file)]) == 0
    printed = capsys.readouterr().out
    assert f"{file}: 13 tensors, 117 parameters, {file.stat().st_size:,} bytes, fp32" in printed
    assert "2 tensors were saved in 16 bits only" in printed
    with pytest.raises(UserError, match="exists already"):
        command([str(made / "stage3-bf16"), str(file)])
    file.write_bytes(b"old")
    assert command([str(made / "stage3-bf16"), str(file), "--overwrite"]) == 0
    load_file(file)


MEASURE = """
import resource, sys, threading
from pathlib import Path
from gppf_ds.transfer.convert import convert

def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))

small, large, output, dtype = sys.argv[1:]
convert(Path(small), Path(output), dtype)  # all imports done
before, peak, done = anonymous(), 0, threading.Event()

def watch():
    global peak
    while not done.wait(0.001):
        peak = max(peak, anonymous())

watcher = threading.Thread(target=watch)
watcher.start()
convert(Path(large), Path(output), dtype, overwrite=True)
done.set()
watcher.join()
print(max(peak, anonymous()) - before, "deepspeed" in sys.modules)
"""


def growth(small: Path, large: Path, output: Path, dtype: str = "fp32") -> int:
    """How far anonymous memory rises above what it was while a process without a GPU and DeepSpeed converts."""
    command = [sys.executable, "-c", MEASURE, str(small), str(large), str(output), dtype]
    printed = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=200, check=False)
    assert printed.returncode == 0, printed.stderr
    grown, imported = printed.stdout.split()
    assert imported == "False"
    return int(grown)


@pytest.mark.parametrize(("name", "dtype"), [("wide-stage2", "fp32"), ("wide-stage3", "fp32"), ("wide-stage2", "bf16")])
def test_memory_never_holds_more_than_a_tensor_of_deepspeeds(made: Path, tmp_path: Path, name: str, dtype: str) -> None:
    file = tmp_path / "plain.safetensors"
    assert growth(made / "stage2-fp32", made / name, file, dtype) < 9e6  # a tensor has 4 MB
    assert sum(t.numel() * 4 for t in load_file(file).values()) > 24e6


def untrained_run(recipe: dict[str, Any], folder: Path, channels: list[int]) -> Path:
    """A run of one rank, saved before its first step."""
    folder.mkdir()
    options = {"layers": [1, 1, 1, 1], "channels": channels}
    file = write_recipe({**recipe, "backbone": {"name": "resnet50", "options": options}}, folder, "config.yaml")
    read = read_run(file.parent)
    model, controller = build_model(read.config.backbone, read.tasks, read.config.seed)
    fragments = [Fragment(name, 0, p.detach().flatten(), {}, tuple(p.shape)) for name, p in model.named_parameters()]
    shared = shared_tensors(model, controller, torch.optim.Adam(controller.parameters()))
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=0, world_size=1)
    try:
        save(folder / "checkpoints", TrainState(0, dict.fromkeys(read.tasks, 0), 0), fragments, shared, 1)
    finally:
        dist.destroy_process_group()
    return folder


def test_memory_never_holds_more_than_a_tensor_of_ours(light_recipe: dict[str, Any], tmp_path: Path) -> None:
    small = untrained_run(light_recipe, tmp_path / "small", [8, 8, 16, 16])
    large = untrained_run(light_recipe, tmp_path / "large", [48, 96, 192, 384])
    file = tmp_path / "plain.safetensors"
    grown = growth(small, large, file)
    assert file.stat().st_size > 36e6
    assert grown < 9e6


SHARDS = [
    ("stage2-bf16", "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt"),
    ("stage2-bf16", "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt"),
    ("stage2-bf16", "mp_rank_00_model_states.pt"),
    ("stage3-bf16", "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt"),
    ("stage3-bf16", "zero_pp_rank_0_mp_rank_00_model_states.pt"),
    ("stage3-bf16", "zero_pp_rank_1_mp_rank_00_model_states.pt"),
]


@pytest.mark.parametrize(("name", "shard"), SHARDS)
@pytest.mark.parametrize("damage", ["remove", "truncate", "empty"])
def test_a_missing_or_damaged_file_is_named(copied: Path, name: str, shard: str, damage: str) -> None:
    file = copied / name / "global_step2" / shard
    data = file.read_bytes()
    file.unlink()
    if damage != "remove":
        file.write_bytes(data[: len(data) // 2] if damage == "truncate" else b"")
    with pytest.raises(UserError, match=shard.replace(".", r"\.")) as error:
        convert(copied / name, copied / "plain.safetensors")
    assert "\n" not in str(error.value)
    assert not (copied / "plain.safetensors").exists()


@pytest.mark.parametrize("name", ["stage2-bf16", "stage3-bf16"])
def test_all_shards_missing_is_not_taken_for_a_checkpoint_without_zero(copied: Path, name: str) -> None:
    for file in (copied / name / "global_step2").glob("*optim_states.pt"):
        file.unlink()
    with pytest.raises(UserError, match=r"zero_pp_rank_0_mp_rank_00_optim_states\.pt is missing"):
        convert(copied / name, copied / "plain.safetensors")


@pytest.mark.parametrize("name", ["stage2-bf16", "stage3-bf16"])
def test_shards_of_another_world_or_model_are_refused(copied: Path, made: Path, name: str) -> None:
    folder = copied / name / "global_step2"
    second = folder / "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt"
    extra = folder / "bf16_zero_pp_rank_2_mp_rank_00_optim_states.pt"
    shutil.copy(second, extra)
    with pytest.raises(UserError, match=extra.name):
        convert(copied / name, copied / "plain.safetensors")
    extra.unlink()
    other = made / f"wide-{name.partition('-')[0]}" / "global_step2"
    for rank in range(2):
        shutil.copy(
            other / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt",
            folder / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt",
        )
    with pytest.raises(UserError, match="is damaged"):
        convert(copied / name, copied / "plain.safetensors")


def test_latest_missing_or_wrong_is_said(copied: Path, tmp_path: Path) -> None:
    folder = copied / "stage2-bf16"
    (folder / "latest").write_text("global_step9")
    with pytest.raises(UserError, match="global_step9"):
        convert(folder, tmp_path / "plain.safetensors")
    (folder / "latest").unlink()
    with pytest.raises(UserError, match=r"'latest'.*global_step2"):
        convert(folder, tmp_path / "plain.safetensors")
    with pytest.raises(UserError, match="is no folder"):
        convert(tmp_path / "absent", tmp_path / "plain.safetensors")


def test_model_parallel_checkpoints_are_refused(copied: Path) -> None:
    folder = copied / "stage2-bf16"
    (folder / "global_step2" / "layer_0_expert_0_mp_rank_00_model_states.pt").touch()
    with pytest.raises(UserError, match="layer_0_expert_0"):
        convert(folder, copied / "plain.safetensors")


class Planted:
    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize(("function", "named"), [(os.system, "posix.system"), (eval, "eval"), (Path, "pathlib.")])
@pytest.mark.parametrize("shard", ["mp_rank_00_model_states.pt", "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt"])
def test_a_file_that_holds_code_is_refused_by_name_and_does_not_run(
    copied: Path, function: Any, named: str, shard: str
) -> None:
    folder, marker = copied / "stage2-bf16", copied / "marker"
    file = folder / "global_step2" / shard
    state = torch.load(file, weights_only=False)
    argument = {os.system: f"touch {marker}", eval: f"open({str(marker)!r}, 'w')"}.get(function, "x")
    torch.save({**state, "extra": Planted(function, argument)}, file)
    with pytest.raises(UserError, match=rf"{shard} holds .*{named}"):
        convert(folder, copied / "plain.safetensors")
    assert not marker.exists()


def test_an_enumeration_as_python_3_11_2_pickles_it_is_harmless(copied: Path) -> None:
    folder, member = copied / "stage2-bf16", Planted(getattr, ZeroStageEnum, "no member: getattr must not be called")
    file = folder / "global_step2" / "mp_rank_00_model_states.pt"
    state = torch.load(file, weights_only=False)
    torch.save({**state, "extra": member}, file)
    assert convert(folder, copied / "plain.safetensors").tensors > 0


def test_the_loss_scaler_of_fp16_is_harmless(made: Path) -> None:
    state = deepspeed_files._load(made / "scaler.pt")
    assert type(state["optimizer_state_dict"]["loss_scaler"]) is deepspeed_files._Ignored


def test_a_disk_that_cannot_hold_the_file_leaves_nothing(made: Path, tmp_path: Path) -> None:
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, old[1]))
    try:
        with pytest.raises(UserError, match=r"cannot write .*plain\.safetensors \(25\."):
            convert(made / "wide-stage3", tmp_path / "plain.safetensors")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert list(tmp_path.iterdir()) == []


def slices(step: Path) -> dict[str, torch.Tensor]:
    """The masters in the files of all ranks, put together without the package's reader."""
    parts: dict[str, list[tuple[int, torch.Tensor]]] = {}
    for file in step.glob("rank-*.safetensors"):
        with safe_open(file, "pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118
                name, start, kind = key.rsplit("@", 2)
                if kind == "master":
                    parts.setdefault(name, []).append((int(start), tensors.get_tensor(key)))
    return {name: torch.cat([t for _, t in sorted(found, key=lambda part: part[0])]) for name, found in parts.items()}


@pytest.mark.parametrize("stage", [1, 3])
def test_our_own_checkpoints_convert_under_the_names_of_the_module(
    light_recipe: dict[str, Any], tmp_path: Path, stage: int
) -> None:
    light_recipe.update(steps=2, checkpoint={"every": 2})
    light_recipe["engine"]["zero_stage"] = stage
    recipe = write_recipe(light_recipe, tmp_path)
    codes, outputs = end_ranks([["-m", "gppf_ds", "train", "--config", str(recipe)]] * 2, timeout=200)
    assert codes == [0, 0], "\n".join(outputs)
    run = tmp_path / "run"
    (step,) = (run / "checkpoints").glob("step-*")
    summary = convert(step, tmp_path / "plain.safetensors")
    convert(run, tmp_path / "same.safetensors")
    assert (tmp_path / "plain.safetensors").read_bytes() == (tmp_path / "same.safetensors").read_bytes()

    got = load_file(tmp_path / "plain.safetensors")
    shared = load_file(step / "shared.safetensors")
    read = read_run(run)
    model, controller = build_model(read.config.backbone, read.tasks, read.config.seed)
    for task, row in controller.logits.items():
        assert torch.equal(got.pop(f"controller.{task}"), shared[f"controller.{task}"])
        assert row.numel() > 0
    model.load_state_dict(got, strict=True)
    masters = slices(step)
    assert masters.keys() == {name for name, _ in model.named_parameters()}
    assert all(torch.equal(got[name].flatten(), master) for name, master in masters.items())
    assert all(torch.equal(got[n], shared[f"buffer.{n}"]) for n in got if n not in masters)
    assert summary.tensors == len(got) + 2

    moved = Path(shutil.move(step, tmp_path / "elsewhere" / step.name))
    convert(moved, tmp_path / "moved.safetensors")
    assert (tmp_path / "moved.safetensors").read_bytes() == (tmp_path / "same.safetensors").read_bytes()
    next(moved.glob("rank-00001*")).unlink()
    with pytest.raises(UserError, match=r"rank-00001\.safetensors is missing"):
        convert(moved, tmp_path / "broken.safetensors")
