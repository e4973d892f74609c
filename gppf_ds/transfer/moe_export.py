"""Export of a task from a network of token-level experts: as timm's model where it is one, else as a plain module.

The module is one file that needs torch and timm only (:mod:`gppf_ds.transfer.moe_template` with its settings filled
in), beside ``model.safetensors`` and the model card.
"""

from __future__ import annotations

import importlib.util
import inspect
import json
from dataclasses import asdict
from pathlib import Path
from pprint import pformat
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

import gppf_ds
from gppf_ds.backbone.lego import LegoBackbone, LegoLayer
from gppf_ds.backbone.moe.attention import MoeAttention
from gppf_ds.backbone.moe.block import SwinMoeBlock
from gppf_ds.backbone.moe.layer import MoeLayer
from gppf_ds.backbone.moe.mlp import MoeMlp
from gppf_ds.errors import UserError
from gppf_ds.tasks.task import Batch
from gppf_ds.train.provenance import part_name
from gppf_ds.train.record import versions
from gppf_ds.train.restore import Trained
from gppf_ds.transfer import card, counts, moe_dense, moe_template, training_data
from gppf_ds.transfer import export as exporting
from gppf_ds.transfer.export import MODULE_FILE
from gppf_ds.transfer.extract import Size, probe, relative_difference
from gppf_ds.transfer.loading import Loading
from gppf_ds.transfer.serving import drift, maps, serving

LARGEST_DIFFERENCE = 1e-5
"""Of the written model's maps from the network's, relative to their largest value: sums run in another order."""

CODE = """from model import load

model = load()"""


def export(
    trained: Trained, task: str, folder: Path, options: exporting.Options | None = None, run: Path | None = None
) -> list[Path]:
    """Writes ``folder/task/``; arguments and errors as of :func:`gppf_ds.transfer.export.export`.

    Returns:
        The files. What was written has been loaded back and compared with the network.
    """
    options = options or exporting.Options()
    small = serving(trained, [task])
    why = moe_dense.obstacle(small, task)
    if why is None:
        plain = moe_dense.dense(small, task)
        size = options.size or (64, 64)
        _require(drift(small, plain, task, [Batch(probe(size), None)]), f"timm's {plain.recipe.config.backbone.name}")
        return exporting.export(plain, task, folder, options, run)
    asked = {
        f"--names {options.names}": options.names != "timm",
        "--head": options.head,
        "--onnx": options.onnx,
        "--torch-export": options.program,
        "--reestimate-bn": bool(options.reestimate),
    }
    if refused := [name for name, wanted in asked.items() if wanted]:
        raise UserError(
            f"{refused[0]} needs a plain model of timm, which {task} is not: {why}. Without it the task is written as "
            f"{MODULE_FILE}; gppf-ds extract with a plan may leave less of it."
        )
    return _write(small, task, why, exporting.emptied(folder / task), options.size, run)


def _write(small: Trained, task: str, why: str, target: Path, size: Size | None, run: Path | None) -> list[Path]:
    backbone = small.model.backbone
    text = inspect.getsource(moe_template)
    line = "SETTINGS: dict[str, Any] = {}\n"
    assert text.count(line) == 1
    filled = line.replace("{}", pformat(settings(backbone, task), width=110, sort_dicts=False))
    (target / MODULE_FILE).write_text(text.replace(line, filled))
    state = {name: tensor.contiguous().clone() for name, tensor in plain_state(backbone, task).items()}
    save_file(state, target / exporting.WEIGHTS_FILE, {"format": "pt"})
    size = size or (64, 64)
    difference = _difference(small, task, target / MODULE_FILE, size)
    _require(difference, MODULE_FILE)
    about = _describe(small, task, why, size, difference) | {"evaluation": card.last_evaluation(run, task, small.step)}
    (target / exporting.DESCRIPTION_FILE).write_text(json.dumps(about, indent=1) + "\n")
    remark = f"It is no model of timm alone, since {why}."
    (target / exporting.CARD_FILE).write_text(card.text(about, Loading(CODE, MODULE_FILE, difference, remark=remark)))
    names = (MODULE_FILE, exporting.WEIGHTS_FILE, exporting.DESCRIPTION_FILE, exporting.CARD_FILE)
    return [target / name for name in names]


def settings(backbone: LegoBackbone, task: str) -> dict[str, Any]:
    """What the module of a task is made from.

    Args:
        backbone: of this task alone.
        task: its name.

    Raises:
        UserError: blocks pad their maps first (``backbone.unit_blocks``).
    """
    moe, blocks = backbone.config.moe, dict[str, Any]()
    assert moe is not None
    units = [layer.units["0"] for layer in backbone.layers]  # type: ignore[index]
    if any(getattr(unit, "pads_first", False) for unit in units):
        raise UserError("backbone.unit_blocks: blocks that pad first cannot be exported with token-level experts.")
    for name, layer in backbone.moe_layers().items():
        index, part = name.split(".")
        # The layer before the blocks is the embedding of the patches.
        blocks.setdefault(str(int(index) - 1), {})[part] = _part(layer, task)
    return {
        "task": task,
        "timm_model": backbone.config.name,
        "timm_options": backbone.timm_options,
        "gate_norm": moe.gate_norm,
        "task_embedding": moe.task_embedding,
        "post_norm": any(isinstance(unit, SwinMoeBlock) and unit.post_norm for unit in units),
        "blocks": blocks,
    }


def _part(layer: MoeLayer, task: str) -> dict[str, Any]:
    common = {"experts": len(layer.experts), "k": layer.top_k[task]}
    first: Any = next(iter(layer.experts.values()))
    if isinstance(layer, MoeMlp):
        return {**common, "hidden": first.fc1.out_features, "shared": len(layer.shared)}
    assert isinstance(layer, MoeAttention)
    return {**common, "head_width": first.query.out_features, "bias": layer.key_value.bias is not None}


def plain_state(backbone: LegoBackbone, task: str) -> dict[str, Tensor]:
    """The tensors of the module, under its names."""
    state = {}
    for layer in backbone.layers:
        assert isinstance(layer, LegoLayer)
        for own, tensor in layer.units["0"].state_dict().items():
            parts = layer.timm_name(own).split(".")
            if "routers" in parts and parts[-1] != "weight":
                continue  # running rows of the training
            if parts[:2] == ["moe", "task_embeddings"]:
                state[f"task_embeddings.{layer.index - 1}"] = tensor
                continue
            if "routers" in parts:
                place = parts.index("routers")
                parts[place : place + 2] = ["router"]
            if layer.moe_parts and "experts" in parts:
                place = parts.index("experts") + 1
                experts: Any = getattr(layer.units["0"].block, parts[place - 2]).experts
                parts[place] = str(list(experts).index(parts[place]))
            state["model." + ".".join(parts)] = tensor
    return state


def _difference(small: Trained, task: str, file: Path, size: Size) -> float:
    specification = importlib.util.spec_from_file_location(f"gppf_ds_export_{task}", file)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    images = probe(size)
    with torch.no_grad():
        theirs = module.load()(images)
    pairs = zip(maps(small, task, Batch(images, None)), theirs, strict=True)
    return max(relative_difference(ours, other) for ours, other in pairs)


def _require(difference: float, model: str) -> None:
    if not difference <= LARGEST_DIFFERENCE:
        raise RuntimeError(f"{model} differs from the network by {difference:.1e}: nothing is usable")


def _describe(small: Trained, task: str, why: str, size: Size, difference: float) -> dict[str, Any]:
    backbone = small.model.backbone
    layout, config = backbone.layout, backbone.config
    assert layout is not None
    path = {str(layer.name): 0 for layer in backbone.layers}
    names = list(path)
    experts = {
        part_name(("expert", layer, str(number))): f"{names[int(layer.split('.')[0])]} {layer.split('.')[1]} {number}"
        for layer, numbers in layout.experts.items()
        for number in numbers
    }
    head = sum(parameter.numel() for parameter in small.model.heads.parameters())
    sizes = {name: count - head for name, count in counts.of_task(small, task).items()}
    normalisation = small.recipe.tasks[task].input_normalisation()
    records = training_data.of_path(small.path, task, path, False, experts)
    return {
        "task": task,
        **card.source(small, task),
        "timm_model": config.name,
        "timm_options": backbone.timm_options,
        "not_timm_alone": why,
        "names": MODULE_FILE,
        "path": path,
        "experts": layout.experts,
        "top_k": layout.tasks[task].top_k,
        "strides": backbone.strides,
        **sizes,
        "input_normalisation": asdict(normalisation) if normalisation else None,
        "checkpoint": small.path.name,
        "step": small.step,
        "difference_to_path": difference,
        "compared_with": MODULE_FILE,
        "compared_at": size,
        "running_statistics": None,
        "graph": None,
        "full_model": [],
        "trained_on": records,
        "gppf_ds": gppf_ds.__version__,
        "versions": versions(),
    }
