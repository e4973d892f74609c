"""What an export writes: files that load as the card says, in every convention, with the task's facts beside them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from conftest import write_recipe
from safetensors.torch import load_file

from gppf_ds.backbone.controller import Controller
from gppf_ds.backbone.lego import LegoBackbone
from gppf_ds.config import BackboneConfig, RunConfig
from gppf_ds.errors import UserError
from gppf_ds.simt.masked import Fragment
from gppf_ds.simt.model import SimtModel
from gppf_ds.tasks.classification import Classification
from gppf_ds.tasks.depth import Depth
from gppf_ds.tasks.detection import Detection
from gppf_ds.tasks.segmentation import Segmentation
from gppf_ds.tasks.task import Task
from gppf_ds.train import recipe
from gppf_ds.train.checkpoint import TrainState
from gppf_ds.train.restore import Trained, build_model, shared_tensors
from gppf_ds.train.saving import save
from gppf_ds.transfer import deploy, loading
from gppf_ds.transfer.commands import export as command
from gppf_ds.transfer.export import Options, export
from gppf_ds.transfer.extract import ChosenPath

NARROW = {"layers": [1, 1, 1, 1], "channels": [8, 8, 16, 16]}
MM_RESNET = {"channels": [8, 16, 32, 64], "zero_init_last": False}
MM_SWIN = {"depths": (2, 2, 2, 2), "embed_dim": 12, "num_heads": (1, 2, 3, 6)}
SMALL_VIT = {"depth": 1, "embed_dim": 16, "num_heads": 2}

FILES = ["model.safetensors", "model.json", "README.md"]


def trained(name: str = "resnet50", options: dict[str, Any] = NARROW, kind: str = "plain") -> Trained:
    """A network whose units have all parted ways."""
    config = BackboneConfig(name=name, options=options, unit_blocks=[kind, kind])  # type: ignore[list-item]
    backbone = LegoBackbone(config, seed=1)
    torch.manual_seed(2)
    for tensor in backbone.state_dict().values():
        if tensor.is_floating_point():
            tensor += 0.1 * torch.randn_like(tensor).abs() * tensor.abs().mean().clamp(min=0.1)
    controller = Controller(["a", "b"], backbone.units)
    with torch.no_grad():
        for row in controller.logits.values():
            row += torch.randn_like(row)
    tasks: dict[str, Task] = {"a": Classification("somewhere/digits", 2, classes=3)}
    made = recipe.Recipe(RunConfig(output="run", steps=1, backbone=config), tasks, "")
    return Trained(Path("step-1"), 1, SimtModel(backbone, {}, {}).eval(), controller, made)


def follow(card: Path, monkeypatch: pytest.MonkeyPatch, **known: Any) -> dict[str, Any]:
    """Runs the code of a model card in its folder."""
    names = dict(known)
    monkeypatch.chdir(card.parent)
    for code in re.findall(r"```python\n(.*?)```", card.read_text(), re.DOTALL):
        exec(code, names)
    return names


CASES = [
    ("timm", "resnet50", NARROW, "plain", "timm's resnet50"),
    ("timm", "vit_tiny_patch16_224", SMALL_VIT, "plain", "timm's vit_tiny_patch16_224"),
    ("torchvision", "resnet18", {}, "plain", "torchvision's resnet18"),
    ("torchvision", "resnet50", NARROW, "plain", "timm's resnet50"),
    ("torchvision", "convnext_tiny", {}, "plain", "timm's convnext_tiny"),
    ("mmdet", "resnet50", MM_RESNET, "plain", "mmdet's ResNet"),
    ("mmseg", "resnet18d", MM_RESNET, "plain", "mmseg's ResNetV1d"),
    ("mmdet", "swin_tiny_patch4_window7_224", MM_SWIN, "pad_first", "mmdet's SwinTransformer"),
    ("mmdet", "swin_tiny_patch4_window7_224", MM_SWIN, "plain", "timm's swin_tiny_patch4_window7_224"),
    ("detectron2", "resnet50", NARROW, "plain", "timm's resnet50"),
]


@pytest.mark.parametrize(("names", "name", "options", "kind", "compared"), CASES)
def test_the_card_loads_the_path(
    names: str,
    name: str,
    options: dict[str, Any],
    kind: str,
    compared: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    network = trained(name, options, kind)
    files = export(network, "a", tmp_path, Options(names=names))
    assert [file.name for file in files] == FILES
    about = json.loads(files[1].read_text())
    assert about["compared_with"] == compared
    assert about["difference_to_path"] <= (1e-6 if compared.startswith("timm") else 1e-5)
    images = torch.randn(2, 3, *about["compared_at"])
    path = ChosenPath(network.model.backbone, network.controller.path("a"))
    model = follow(files[2], monkeypatch, images=images)["model"]
    model.train(False)
    ours = path(images)[-1]
    with torch.no_grad():
        if compared == "torchvision's resnet18":
            ours, theirs = ours.mean((2, 3)), model(images)
        elif names == "torchvision" and name == "convnext_tiny":
            return  # it was loaded; what it returns is normalised behind pooling
        elif compared.startswith("timm"):
            theirs = model.forward_intermediates(images, indices=1, norm=True, intermediates_only=True)[0]
        else:
            theirs = model(images)[-1]
    assert (ours - theirs).abs().max() <= 1e-5 * ours.abs().max()


def test_names_are_those_of_the_library(tmp_path: Path) -> None:
    known = {"timm": "layer1.0.bn1.weight", "detectron2": "backbone.bottom_up.res2.0.conv1.norm.weight"}
    for names, expected in known.items():
        [weights, *_] = export(trained(), "a", tmp_path, Options(names=names))
        assert expected in load_file(weights)
    with pytest.raises(UserError, match="no naming convention 'caffe'"):
        export(trained(), "a", tmp_path, Options(names="caffe"))


def test_a_file_with_other_numbers_is_refused_and_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = loading.load_file

    def wrong(file: Path) -> dict[str, torch.Tensor]:
        return {name: tensor + (name == "bn1.weight") * 1e-4 for name, tensor in right(file).items()}

    monkeypatch.setattr(loading, "load_file", wrong)
    with pytest.raises(RuntimeError, match="does not hold the path's numbers"):
        export(trained(), "a", tmp_path)
    assert not list((tmp_path / "a").iterdir())


def test_units_that_timm_has_not(tmp_path: Path) -> None:
    network = trained("resnet50", MM_RESNET, "deformable")
    with pytest.raises(UserError, match="only --names mmdet, mmseg or detectron2"):
        export(network, "a", tmp_path)
    assert not list((tmp_path / "a").iterdir())
    [_, description, card] = export(network, "a", tmp_path, Options(names="detectron2"))
    assert json.loads(description.read_text())["difference_to_path"] is None
    assert "only names and values of the file were checked" in card.read_text()
    swin = trained("swin_tiny_patch4_window7_224", MM_SWIN, "pad_first")
    with pytest.raises(UserError, match="pad_first units"):
        export(swin, "a", tmp_path, Options(size=(96, 160)))
    with pytest.raises(UserError, match="no images of 70 x 45"):
        export(swin, "a", tmp_path, Options(size=(70, 45)))


@pytest.fixture(scope="module")
def run(demo_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two tasks with a checkpoint at step 7 and evaluations at 0, 5 and 9."""
    folder = tmp_path_factory.mktemp("run")
    tasks = {
        "digits": ("classification.Classification", {"data": str(demo_data / "classification"), "image_size": 64}),
        "distance": ("depth.Depth", {"data": str(demo_data / "scenes"), "head_channels": 32, "input_size": [64, 64]}),
    }
    content = {
        "output": str(folder),
        "steps": 9,
        "loader": {"workers": 0},
        "backbone": {"options": NARROW},
        "tasks": {
            name: {"class_path": f"gppf_ds.tasks.{kind}", "init_args": {"batch_size": 2, **arguments}}
            for name, (kind, arguments) in tasks.items()
        },
    }
    made = recipe.read(["--config", str(write_recipe(content, folder, "config.yaml"))])
    model, controller = build_model(made.config.backbone, made.tasks, seed=0)
    with torch.no_grad():
        controller.logits["distance"][::2, 1] = 1.0
    fragments = [Fragment(name, 0, parameter.detach().flatten(), {}) for name, parameter in model.named_parameters()]
    shared = shared_tensors(model, controller, torch.optim.Adam(controller.parameters()))
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=0, world_size=1)
    save(folder / "checkpoints", TrainState(7, dict.fromkeys(tasks, 0), 0), fragments, shared, keep=1)
    dist.destroy_process_group()
    entries = [{"step": step, "metrics": {"digits": {"top1": step / 10}, "distance": {}}} for step in (0, 5, 9)]
    (folder / "results.json").write_text(json.dumps(entries))
    return folder


def test_the_command_writes_all(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    line = ["--run", str(run), "--output", str(tmp_path), "--task", "digits"]
    assert command([*line, "--reestimate-bn", "2", "--onnx", "--torch-export", "--size", "64", "96"]) == 0
    files = [Path(file) for file in capsys.readouterr().out.split()]
    assert [file.name for file in files] == [*FILES, "model.pt2", "model.onnx"]
    assert all(file.parent == tmp_path / "digits" and file.is_file() for file in files)
    about = json.loads((tmp_path / "digits/model.json").read_text())
    assert about["kind"] == "Classification"
    assert about["data"] == "classification"
    assert about["evaluation"] == {"step": 5, "metrics": {"top1": 0.5}}
    assert about["step"] == 7
    assert about["running_statistics"] == {"batch_norms": 17, "reestimated_on_batches": 2}
    assert about["input_normalisation"]["mean"] == [0.485, 0.456, 0.406]
    assert about["graph"]["outputs"] == ["map_2", "map_4", "map_8", "map_16", "map_32"]
    assert about["compared_at"] == [64, 96]
    assert about["versions"]["timm"]
    card = tmp_path / "digits/README.md"
    text = card.read_text()
    assert "| top1 | 0.5000 |" in text
    assert "measured anew on 2 training batches" in text
    assert "subtract 0.485, 0.456, 0.406 and divide by 0.229, 0.224, 0.225" in text
    assert str(run) not in text + json.dumps(about)
    images = torch.randn(1, 3, 64, 96)
    names = follow(card, monkeypatch, images=images)
    program = torch.export.load(tmp_path / "digits/model.pt2").module()
    for ours, theirs in zip(names["model"].eval().forward_intermediates(images)[1], program(images), strict=True):
        torch.testing.assert_close(ours, theirs)
    measured = names["model"].state_dict()["bn1.running_mean"]

    # A plain export afterwards leaves nothing of the first one behind.
    assert command(line) == 0
    assert {file.name for file in (tmp_path / "digits").iterdir()} == set(FILES)
    assert not torch.equal(load_file(tmp_path / "digits/model.safetensors")["bn1.running_mean"], measured)


def test_a_failed_graph_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deploy, "LARGEST_DIFFERENCE", -1.0)
    with pytest.raises(UserError, match=r"model\.pt2 differs"):
        export(trained(), "a", tmp_path, Options(program=True, size=(64, 64)))
    assert not list((tmp_path / "a").iterdir())


def test_missing_data_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--reestimate-bn reads the data of tasks\.a: .*somewhere"):
        export(trained(), "a", tmp_path, Options(reestimate=3))


@pytest.mark.parametrize("wrong", [["--size", "0", "64"], ["--reestimate-bn", "many"]])
def test_numbers_are_judged(wrong: list[str], run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command(["--run", str(run), *wrong])
    assert "is no number from 1 on" in capsys.readouterr().err


def test_a_model_without_batch_norms_says_so(tmp_path: Path) -> None:
    files = export(trained("vit_tiny_patch16_224", SMALL_VIT), "a", tmp_path, Options(reestimate=3))
    assert "It has no batch norms" in files[2].read_text()


def tasks_of(data: Path) -> dict[str, Task]:
    scenes = {"data_root": str(data / "scenes"), "train_images": "images/train", "val_images": "images/val"}
    files = {split: f"annotations/instances_{split}.json" for split in ("train", "val")}
    labels = {f"{split}_labels": f"labels/{split}" for split in ("train", "val")}
    return {
        "classification": Classification(str(data / "classification"), 1, image_size=64),
        "depth": Depth(str(data / "scenes"), 1),
        "detection": Detection("mask_rcnn_demo.py", 1, **scenes, **files),
        "segmentation": Segmentation("upernet_demo.py", 1, classes="classes.json", **scenes, **labels),
    }


@pytest.mark.parametrize("kind", ["classification", "depth", "detection", "segmentation"])
def test_the_stated_normalisation_is_what_preprocess_does(kind: str, demo_data: Path) -> None:
    task = tasks_of(demo_data)[kind]
    sample = task.dataset("val")[0]
    pixels = (sample["inputs"] if isinstance(sample, dict) else sample[0]).float()
    stated = task.input_normalisation()
    assert stated is not None
    openmm = isinstance(sample, dict)
    assert stated.value_range == ((0, 255) if openmm else (0, 1))
    if openmm and stated.channels == "RGB":
        pixels = pixels.flip(0)  # read as BGR
    pixels = pixels * stated.value_range[1] / 255
    mean, std = (torch.tensor(values)[:, None, None] for values in (stated.mean, stated.std))
    done = task.preprocess(task.collate([sample]), torch.device("cpu"), training=False).images[0]
    expected = (pixels - mean) / std
    torch.testing.assert_close(done[:, : expected.shape[1], : expected.shape[2]], expected, rtol=1e-4, atol=1e-4)
