"""Exports of tasks from networks with token-level experts: timm's model where it is one, else a plain module."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from moe_run import SWIN, content, make_run
from safetensors.torch import load_file, save_file
from torch import Tensor

from gppf_ds.backbone.moe.adapt import pruned, restricted
from gppf_ds.backbone.moe.selections import running
from gppf_ds.cli import main
from gppf_ds.errors import UserError
from gppf_ds.tasks.task import Batch
from gppf_ds.train.recipe import read_run
from gppf_ds.train.restore import Trained, load_trained
from gppf_ds.transfer import advise as advising
from gppf_ds.transfer.moe_dense import obstacle
from gppf_ds.transfer.moe_export import export
from gppf_ds.transfer.predict import predict
from gppf_ds.transfer.serving import maps, serving

torch.set_num_threads(1)
CPU = torch.device("cpu")
ALONE = """
import sys
sys.modules["gppf_ds"] = None  # not to be imported
import torch
from safetensors.torch import load_file, save_file
from model import load
torch.set_num_threads(1)
given, model = load_file(sys.argv[1]), load().double()
with torch.no_grad():
    plain, padded = model(given["images"]), model(given["images"], given["sizes"])
found = {f"plain.{i}": x for i, x in enumerate(plain)} | {f"padded.{i}": x for i, x in enumerate(padded)}
save_file(found, sys.argv[2])
"""


def load(folder: Path) -> Trained:
    return load_trained(folder, None, read_run(folder))


def relative(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).abs().max() / ours.abs().max())


@pytest.mark.parametrize(
    ("backbone", "moe"),
    [
        ({}, {"shared_experts": 1, "gate_norm": "full"}),
        (SWIN, {"mlp_blocks": "even", "task_mlp_top_k": {"digits": 3}}),
        (SWIN, {"task_embedding": False, "attention_blocks": "every"}),
    ],
)
def test_the_module_computes_the_same_without_this_package(
    light_recipe: dict[str, Any], tmp_path: Path, backbone: dict[str, Any], moe: dict[str, Any]
) -> None:
    recipe = content(light_recipe, tmp_path / "run", moe)
    recipe["backbone"] |= backbone
    trained = load(make_run(recipe))
    files = export(trained, "digits", tmp_path / "exports")
    assert [file.name for file in files] == ["model.py", "model.safetensors", "model.json", "README.md"]
    # in double precision, so that the order of sums does not matter
    images = torch.randn(2, 3, 96, 80, generator=torch.Generator().manual_seed(1)).double()
    sizes = torch.tensor([[96, 80], [50, 70]])
    save_file({"images": images, "sizes": sizes}, tmp_path / "in.safetensors")
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", ALONE, str(tmp_path / "in.safetensors"), str(tmp_path / "out.safetensors")],
        cwd=files[0].parent,
        env=environment | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = load_file(tmp_path / "out.safetensors")
    trained.model.double()
    for kind, batch in (("plain", Batch(images, None)), ("padded", Batch(images, None, sizes))):
        for index, ours in enumerate(maps(trained, "digits", batch)):
            assert relative(ours, found[f"{kind}.{index}"]) < 1e-12
    assert "gppf_ds." not in files[0].read_text()
    about = json.loads(files[2].read_text())
    assert about["active_parameters"] < about["parameters"] == sum(t.numel() for t in load_file(files[1]).values())
    assert all(numbers == [0, 1, 2, 3, 4, 5] for numbers in about["experts"].values())
    assert about["difference_to_path"] < 1e-5


def only_one_expert(trained: Trained) -> Trained:
    whole = trained.model.backbone.layout
    assert whole is not None
    layout = restricted(whole, ["digits"])
    layout.tasks["digits"].top_k = dict.fromkeys(layout.experts, 1)
    layout = pruned(layout, running(trained.model.named_buffers(), whole), 1000.0)
    return serving(trained, ["digits"], layout)


@pytest.mark.parametrize("embedding", [True, False])
def test_one_expert_in_every_layer_is_timms_model(
    light_recipe: dict[str, Any], tmp_path: Path, embedding: bool
) -> None:
    moe = {"mlp_top_k": 1, "attention_experts": 0, "mlp_blocks": "even", "task_embedding": embedding}
    one = only_one_expert(load(make_run(content(light_recipe, tmp_path / "run", moe))))
    export(one, "digits", tmp_path / "exports")
    folder = tmp_path / "exports" / "digits"
    assert not (folder / "model.py").exists()
    about = json.loads((folder / "model.json").read_text())
    model: Any = timm.create_model(about["timm_model"], **about["timm_options"])
    model.load_state_dict(load_file(folder / "model.safetensors"))
    one.model.double()
    images = torch.randn(2, 3, 64, 96).double()
    with torch.no_grad():
        [theirs] = model.double().eval().forward_intermediates(images, indices=1, norm=True, intermediates_only=True)
    assert relative(maps(one, "digits", Batch(images, None))[0], theirs) < 1e-7  # the embedding is folded in in fp32


@pytest.mark.parametrize(
    ("moe", "why"),
    [
        ({"attention_experts": 0, "mlp_top_k": 1}, "tokens choose among 6 experts"),
        ({}, "attention heads share one key and value"),
    ],
)
def test_why_it_is_no_model_of_timm_is_said(
    light_recipe: dict[str, Any], tmp_path: Path, moe: dict[str, Any], why: str
) -> None:
    from gppf_ds.transfer.export import Options

    trained = load(make_run(content(light_recipe, tmp_path / "run", moe)))
    for options in (Options(head=True), Options(onnx=True), Options(names="mmdet")):
        with pytest.raises(UserError, match=why):
            export(trained, "digits", tmp_path / "exports", options)
    assert why in (export(trained, "digits", tmp_path / "exports")[3]).read_text()


def test_other_widths_than_timms_are_said(light_recipe: dict[str, Any], tmp_path: Path) -> None:
    moe = {"mlp_top_k": 2, "attention_experts": 0}
    one = only_one_expert(load(make_run(content(light_recipe, tmp_path / "run", moe))))
    assert "hidden widths [96, 192]" in str(obstacle(one, "digits"))


def test_predict_and_convert_take_experts(light_recipe: dict[str, Any], tmp_path: Path, demo_data: Path) -> None:
    run = make_run(content(light_recipe, tmp_path / "run"))
    trained = load(run)
    image = demo_data / "scenes/images/val/000001.jpg"
    found = predict(trained, ["digits", "distance"], image, CPU).found
    alone = predict(trained, ["digits"], image, CPU).found
    assert found["digits"] == alone["digits"]
    assert main(["convert", str(run), str(tmp_path / "plain.safetensors")]) == 0
    written = load_file(tmp_path / "plain.safetensors")
    assert all(torch.equal(written[name], value) for name, value in trained.model.state_dict().items())


def test_advice_ranks_the_routers_of_all_tasks(light_recipe: dict[str, Any], tmp_path: Path) -> None:
    trained = load(make_run(content(light_recipe, tmp_path / "run")))
    task, config = trained.recipe.tasks["digits"], trained.recipe.config
    target = advising.Target("new", task, 16, 0, replace(config.loader, workers=0), CPU)
    advice = advising.advise(trained, target)
    assert sorted(row.tasks for row in advice.rows) == [["digits"], ["distance"]]
    assert all(row.flops > 0 and row.parameters > 0 for row in advice.rows)
