"""What an export is: as data (``model.json``) and in words (the model card, ``README.md``)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

import gppf_ds
from gppf_ds.train.record import versions
from gppf_ds.train.restore import Trained
from gppf_ds.transfer import training_data
from gppf_ds.transfer.deploy import ONNX_FILE, PROGRAM_FILE, Graph
from gppf_ds.transfer.extract import ChosenPath, Size
from gppf_ds.transfer.loading import Loading


def describe(
    trained: Trained,
    task: str,
    path: ChosenPath,
    loaded: Loading,
    size: Size,
    convention: str,
    statistics: Mapping[str, int] | None,
    graph: Graph | None,
) -> dict[str, Any]:
    """All that ``model.json`` says besides the evaluation.

    Args:
        trained: the network.
        task: whose path it is.
        path: the path as it was written.
        loaded: how it was loaded back.
        size: of the images that were compared.
        convention: of the names.
        statistics: what the measuring of batch-norm statistics did, if it was asked for.
        graph: what was traced, if anything.
    """
    normalisation = trained.recipe.tasks[task].input_normalisation()
    return {
        "task": task,
        **source(trained, task),
        "timm_model": path.timm_model,
        "timm_options": path.timm_options,
        "names": convention,
        **loaded.facts,
        "path": path.numbers,
        "strides": path.strides,
        "parameters": sum(parameter.numel() for parameter in path.parameters()),
        "input_normalisation": asdict(normalisation) if normalisation else None,
        "checkpoint": trained.path.name,
        "step": trained.step,
        "difference_to_path": loaded.difference,
        "compared_with": loaded.compared,
        "compared_at": size,
        "running_statistics": statistics,
        "graph": asdict(graph) if graph else None,
        "gppf_ds": gppf_ds.__version__,
        "versions": versions(),
    }


def source(trained: Trained, task: str) -> dict[str, str | None]:
    """The kind of the task and the name of its data, without the folders of the machine it was trained on."""
    recipe = yaml.safe_load(trained.recipe.text) or {}
    arguments = recipe.get("tasks", {}).get(task, {}).get("init_args", {})
    data = arguments.get("data") or arguments.get("data_root")
    return {"kind": type(trained.recipe.tasks[task]).__name__, "data": Path(data).name if data else None}


def last_evaluation(run: Path | None, task: str, step: int) -> dict[str, Any] | None:
    """``{"step", "metrics"}`` of the task's last evaluation up to a step, or None if there was none.

    Args:
        run: the folder of the run.
        task: its name.
        step: of the checkpoint.
    """
    file = run / "results.json" if run else None
    if file is None or not file.is_file():
        return None
    entries = [entry for entry in json.loads(file.read_text()) if entry["step"] <= step and task in entry["metrics"]]
    return {"step": entries[-1]["step"], "metrics": entries[-1]["metrics"][task]} if entries else None


def text(about: Mapping[str, Any], loaded: Loading) -> str:
    """The model card, in Markdown.

    Args:
        about: the content of ``model.json``.
        loaded: how the weights are loaded.
    """
    data = training_data.section(about["trained_on"], list(about["path"]))
    sections = [_head(about), _loading(about, loaded), _input(about), _results(about), data, _origin(about)]
    sections.append(_limits(about))
    return "\n\n".join(sections) + "\n"


def _head(about: Mapping[str, Any]) -> str:
    head = ", and its head" if about["full_model"] else ", without its head"
    data = f" on {about['data']}" if about["data"] else ""
    if "experts" in about:
        return f"""# {about["task"]}: {about["timm_model"]} with experts

The backbone of one task ({about["kind"]}{data}), {about["parameters"] / 1e6:.2f} million parameters, of which a token
goes through {about["active_parameters"] / 1e6:.2f} million{head}. It was trained together with other tasks by gppf_ds;
of their network it has the experts that this task can choose, and needs nothing of gppf_ds."""
    return f"""# {about["task"]}: {about["timm_model"]}

The backbone of one task ({about["kind"]}{data}), {about["parameters"] / 1e6:.2f} million parameters{head}.
It was trained together with other tasks by gppf_ds and is the path that this task chose through their common lego
backbone: a plain model that needs nothing of it."""


def _loading(about: Mapping[str, Any], loaded: Loading) -> str:
    parts = [
        f"## Load\n\n`model.safetensors` has the parameter names of {about['names']}. In this folder:",
        f"```python\n{loaded.code}\n```",
    ]
    if about["names"] == "timm":
        count = len(about["strides"])
        parts.append(
            f"With `images` (B, 3, H, W), timm gives the feature maps of strides {_listed(about['strides'])}:\n\n"
            f"```python\nmodel.eval()\nmaps = model.forward_intermediates(images, indices={count}, norm=True, "
            "intermediates_only=True)\n```"
        )
    if loaded.remark:
        parts.append(loaded.remark)
    if full := about["full_model"]:
        calls = {
            "classifier.json": "timm's name and options of the whole classifier; weights in `classifier.safetensors`",
            "config.py": "with `checkpoint.pth` the whole model, for the library's own inference functions and tools "
            "(its first line says so if gppf_ds has to be installed for them)",
        }
        parts.append("\n".join(f"- `{file}`: {calls[file]}." for file in full if file in calls))
    if graph := about["graph"]:
        calls = {
            ONNX_FILE: f"its outputs are {_listed(graph['outputs'])}",
            PROGRAM_FILE: "`torch.export.load(...).module()` returns them as a tuple",
        }
        files = "; ".join(f"`{file}`: {calls[file]}" for file in graph["files"])
        parts.append(f"The same maps from `images` {graph['inputs']}: {files}.")
    return "\n\n".join(parts)


def _input(about: Mapping[str, Any]) -> str:
    found = about["input_normalisation"]
    if found is None:
        return "## Input\n\nThe kind of task does not say how it normalises images."
    low, high = found["value_range"]
    return (
        f"## Input\n\n{found['channels']} images with values from {low:g} to {high:g}; then, by channel, subtract "
        f"{_listed(found['mean'])} and divide by {_listed(found['std'])}."
    )


def _results(about: Mapping[str, Any]) -> str:
    found = about["evaluation"]
    if found is None:
        return "## Results\n\nNot evaluated."
    rows = "\n".join(f"| {name} | {value:.4f} |" for name, value in found["metrics"].items())
    note = ""
    if (about["running_statistics"] or {}).get("reestimated_on_batches"):
        note = "\n\nMeasured with the running statistics of training, not with those in this file."
    return (
        f"## Results\n\nOf this path with its head, on the task's validation set, after step {found['step']}:\n\n"
        f"| metric | value |\n|---|---|\n{rows}{note}"
    )


def _origin(about: Mapping[str, Any]) -> str:
    units = ", ".join(f"{layer}: {unit}" for layer, unit in about["path"].items())
    if "experts" in about:
        units = f"{units}; experts: " + ", ".join(f"{layer} {numbers}" for layer, numbers in about["experts"].items())
    packages = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    return (
        f"## Origin\n\n- {about['step']} training steps (checkpoint `{about['checkpoint']}`)\n"
        f"- path, the unit of every layer: {units}\n- gppf_ds {about['gppf_ds']}; {packages}"
    )


def _limits(about: Mapping[str, Any]) -> str:
    height, width = about["compared_at"]
    difference = about["difference_to_path"]
    limits = ["The licences of the training data and of any weights that training started from apply."]
    if difference is None:
        limits.append("No installed library computes this model: only names and values of the file were checked.")
    else:
        limits.append(
            f"With these weights {about['compared_with']} was compared with the path on random images of {height} x "
            f"{width} pixels: largest difference {difference:.1e} of the largest value."
        )
    if statistics := about["running_statistics"]:
        limits.append(
            f"The running statistics of its {statistics['batch_norms']} batch norms were measured anew on "
            f"{statistics['reestimated_on_batches']} training batches of this task."
            if statistics["batch_norms"]
            else "It has no batch norms, whose running statistics could have been measured anew."
        )
    return "## Limits\n\n" + "\n".join(f"- {limit}" for limit in limits)


def _listed(values: Any) -> str:
    return ", ".join(f"{value:.6g}" if isinstance(value, float) else str(value) for value in values)
