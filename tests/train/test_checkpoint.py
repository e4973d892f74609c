"""Checkpoints: complete or absent, verified, and independent of the ranks that wrote them."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from gppf_ds.errors import UserError
from gppf_ds.simt.masked import Fragment
from gppf_ds.train.checkpoint import CheckpointReader, TrainState, complete
from gppf_ds.train.saving import save

torch.set_num_threads(1)


@pytest.fixture
def world(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def values(name: str, size: int) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(len(name)))


def fragments() -> list[Fragment]:
    """With the kinds of state that torch's optimizers have; one name holds the separator of the keys."""
    return [
        Fragment("a.weight", 0, values("w", 12), {"momentum_buffer": values("mm", 12)}),
        Fragment("odd@name", 0, values("odd", 5), {"step": torch.tensor(3.0), "exp_avg": values("eeee", 5)}),
        Fragment("fresh", 0, values("fresh", 1), {}),
    ]


def write(folder: Path, step: int = 7, keep: int = 2) -> Path:
    shared = {"controller.a": torch.arange(6.0).view(2, 3).t(), "buffer.count": torch.tensor(4)}
    return save(folder, TrainState(step, {"a": 3, "b": 10**12}, 5, 1), fragments(), shared, keep)


def test_what_was_saved_comes_back(world, tmp_path):
    path = write(tmp_path / "c")
    assert path.name == "step-00000007"
    reader = CheckpointReader(path)
    assert reader.state == TrainState(7, {"a": 3, "b": 10**12}, 5, 1)
    assert reader.sizes() == {"a.weight": 12, "odd@name": 5, "fresh": 1}
    assert reader.kinds("a.weight") == ["momentum_buffer"]
    assert reader.kinds("odd@name") == ["exp_avg", "step"]
    assert reader.kinds("fresh") == []
    for fragment in fragments():
        assert torch.equal(reader.whole(fragment.name), fragment.master)
        for kind, value in fragment.state.items():
            assert torch.equal(reader.whole(fragment.name, kind), value)
    assert torch.equal(reader.shared["controller.a"], torch.arange(6.0).view(2, 3).t())
    assert reader.shared["buffer.count"] == 4


def test_only_the_newest_are_kept(world, tmp_path):
    for step in (9, 10, 100, 101):
        write(tmp_path, step, keep=2)
        assert complete(tmp_path)[-1].name == f"step-{step:08d}"
    assert [path.name for path in complete(tmp_path)] == ["step-00000100", "step-00000101"]


def test_saving_a_step_again_replaces_it(world, tmp_path):
    first = write(tmp_path)
    marker = first / "stale"
    marker.write_text("x")
    assert write(tmp_path) == first
    assert not marker.exists()
    CheckpointReader(first)


def test_what_a_kill_leaves_behind_is_ignored_and_overwritten(world, tmp_path):
    good = write(tmp_path, 1)
    leftover = tmp_path / ".step-00000002.incomplete"
    leftover.mkdir()
    (leftover / "rank-00000.safetensors").write_bytes(b"half")
    (leftover / "rank-00007.safetensors").write_bytes(b"of a larger world")
    (tmp_path / "step-00000003").mkdir()
    assert complete(tmp_path) == [good]
    second = write(tmp_path, 2)
    assert complete(tmp_path) == [good, second]
    assert not leftover.exists()
    assert not (second / "rank-00007.safetensors").exists()
    assert CheckpointReader(second).state.step == 2
    assert complete(tmp_path / "absent") == []


FILES = ["rank-00000.safetensors", "shared.safetensors", "state.json"]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["truncate", "flip", "remove", "append"])
def test_a_damaged_file_is_refused_by_name(world, tmp_path, name, damage):
    file = write(tmp_path) / name
    data = bytearray(file.read_bytes())
    if damage == "truncate":
        file.write_bytes(data[:-1])
    elif damage == "append":
        file.write_bytes(data + b"\0")
    elif damage == "flip":
        data[-2] ^= 1
        file.write_bytes(data)
    else:
        file.unlink()
    with pytest.raises(UserError, match=name.replace(".", r"\.")) as error:
        CheckpointReader(file.parent)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("manifest", [None, "", "{", "{}", "[]", '{"files": 3}', '{"format": 1, "files": {}}'])
def test_a_damaged_manifest_is_refused(world, tmp_path, manifest):
    path = write(tmp_path)
    if manifest is None:
        (path / "manifest.json").unlink()
    else:
        (path / "manifest.json").write_text(manifest)
    with pytest.raises(UserError, match="step-00000007"):
        CheckpointReader(path)


def test_a_file_that_the_manifest_does_not_know_is_not_read(world, tmp_path):
    path = write(tmp_path)
    (path / "rank-00001.safetensors").write_bytes((path / "rank-00000.safetensors").read_bytes())
    try:
        reader = CheckpointReader(path)
    except UserError:
        return
    assert reader.sizes() == {"a.weight": 12, "odd@name": 5, "fresh": 1}


def test_another_format_is_refused(world, tmp_path):
    import hashlib

    path = write(tmp_path)
    state = json.loads((path / "state.json").read_text())
    text = json.dumps({**state, "format": 99}).encode()
    (path / "state.json").write_bytes(text)
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"]["state.json"] = {"bytes": len(text), "sha256": hashlib.sha256(text).hexdigest()}
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="another version"):
        CheckpointReader(path)


def test_nothing_is_pickled(world, tmp_path):
    assert {file.suffix for file in write(tmp_path).iterdir()} == {".json", ".safetensors"}


CUTS = {"cut": 7, "second": 0, "first": 10}
"""How many of ten values rank 0 owns."""


def write_as_rank(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    mine = []
    for name, cut in CUTS.items():
        start, end = ((0, cut), (cut, 10))[rank]
        if end > start:
            state = {"momentum_buffer": -torch.arange(10.0)[start:end], "step": torch.tensor(4.0)}
            mine.append(Fragment(name, start, torch.arange(10.0)[start:end], state))
    # Against the order of the ranks: the second rank's file holds the front of "swapped".
    mine.append(Fragment("swapped", 5 - 5 * rank, torch.arange(5.0) + 5 - 5 * rank, {}))
    save(Path(folder) / "c", TrainState(1, {}, 0), mine, {"owner": torch.tensor(rank)}, 1)
    dist.destroy_process_group()


def test_slices_of_several_ranks_are_put_together(tmp_path):
    context = mp.spawn(write_as_rank, (str(tmp_path),), nprocs=2, join=False)
    deadline = time.monotonic() + 120
    while not context.join(timeout=5):
        if time.monotonic() > deadline:
            for process in context.processes:
                process.kill()
            pytest.fail("the two ranks took longer than 120 s")
    (path,) = complete(tmp_path / "c")
    assert len(list(path.glob("rank-*.safetensors"))) == 2
    reader = CheckpointReader(path)
    assert reader.sizes() == dict.fromkeys([*CUTS, "swapped"], 10)
    for name in CUTS:
        assert torch.equal(reader.whole(name), torch.arange(10.0))
        assert torch.equal(reader.whole(name, "momentum_buffer"), -torch.arange(10.0))
        assert reader.whole(name, "step").shape == ()
        assert reader.whole(name, "step") == 4
    assert torch.equal(reader.whole("swapped"), torch.arange(10.0))
    assert reader.shared["owner"] == 0
