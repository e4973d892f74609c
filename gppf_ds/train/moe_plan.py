"""Plans: what becomes of token-level experts when a finished run is extracted from or fine-tuned.

What a plan decides of a fine-tuned run is settled while the recipe is read, as with all that the source decides
(:mod:`gppf_ds.train.finetune`): the run's ``config.yaml`` then names the tasks and the parameters that learn.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentParser

from gppf_ds.backbone.moe.adapt import new_experts
from gppf_ds.backbone.moe.layout import Layout
from gppf_ds.config import MoePlan
from gppf_ds.errors import UserError
from gppf_ds.train.inherit import Content

_OWN = (
    "mutual_information",
    "mutual_information_source",
    "token_mutual_information",
    "concentration",
    "momentum",
    "adaptive",
)
"""Keys of ``backbone.moe`` that a fine-tuned run decides itself, for they change no parameter's shape."""


def read_plan(file: Path) -> MoePlan:
    """A plan from a file, YAML or JSON.

    Raises:
        UserError: there is no such file, it is no mapping, or a key or a value is wrong.
    """
    try:
        values = yaml.safe_load(file.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise UserError(f"{file} is no readable plan ({' '.join(str(error).split())}): name a YAML file.") from error
    if not isinstance(values, dict):
        raise UserError(f"{file} is no plan: it must be a mapping such as {{prune: 3, mlp_top_k: 2}}.")
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(MoePlan, "plan")
    try:
        plan: MoePlan = parser.instantiate(parser.parse_object({"plan": values})).plan
    except UserError as error:
        raise UserError(f"{file}: {error}") from error
    except Exception as error:  # jsonargparse has several
        raise UserError(f"{file}: {' '.join(str(error).split())}") from error
    return plan


def settle_plan(content: Content, source: Content, layout: Layout) -> Content:
    """The recipe with all that its plan and its source's experts decide.

    Args:
        content: of the recipe, its ``backbone`` that of the source.
        source: content of the source's recipe.
        layout: of the source's experts.

    Raises:
        UserError: the plan contradicts the mode, or the recipe the plan.
    """
    section, mode = content["finetune"], content["finetune"].get("mode", "dynamic")
    plan = _plan(section.get("plan"), mode)
    _require_sense(content, plan, mode)
    backbone = {**content["backbone"], "moe": _moe(content["backbone"].get("moe") or {}, source["backbone"]["moe"])}
    content = {**content, "backbone": backbone, "finetune": {**section, "plan": asdict(plan)}}
    old, new = source["tasks"], content.get("tasks") or {}
    if mode == "grow":
        if both := sorted(old.keys() & new.keys()):
            raise UserError(
                f"tasks.{both[0]}: finetune.source has a task of this name, which stays: choose another name."
            )
        content |= {"tasks": {**old, **new}, "frozen_tasks": list(old)}
    if plan.learn != "all":
        content["trainable"] = learning(plan, layout, list(new), bool(backbone["moe"].get("task_embedding", True)))
    return content


def learning(plan: MoePlan, layout: Layout, tasks: list[str], embeddings: bool) -> list[str]:
    """Patterns of the names of the parameters that a plan lets learn.

    Args:
        plan: of the run.
        layout: of its source.
        tasks: new ones.
        embeddings: whether blocks have embeddings of the tasks.
    """
    patterns = [f"heads.bank.{task}.*" for task in tasks]
    patterns += [f"backbone.layers.*.routers.{task}.weight" for task in tasks]
    if embeddings:
        patterns += [f"backbone.layers.*.task_embeddings.{task}" for task in tasks]
    if plan.learn == "routers_and_new":
        for layer, numbers in new_experts(layout, plan.experts).items():
            index, part = layer.split(".")
            patterns += [f"backbone.layers.{index}.units.0.block.{part}.experts.{number}.*" for number in numbers]
    return patterns


def as_mapping(given: Any) -> dict[str, Any]:
    """``finetune.plan`` as a recipe has it: a mapping, the name of a plan's file, or nothing."""
    if isinstance(given, str):
        return asdict(read_plan(Path(given)))
    return dict(given or {})


def _plan(given: Any, mode: str) -> MoePlan:
    values = as_mapping(given) or {"experts": 1 if mode == "grow" else 0}
    try:
        plan = MoePlan(**values)
    except TypeError as error:
        raise UserError(f"finetune.plan: {error} (see docs/modularity.md for its keys).") from error
    return MoePlan(**{**asdict(plan), "learn": plan.learn or ("routers_and_new" if mode == "grow" else "all")})


def _require_sense(content: Content, plan: MoePlan, mode: str) -> None:
    section = content["finetune"]
    if mode in ("fixed", "retrain"):
        raise UserError(
            f"finetune.mode {mode} follows a path through units, but the source has token-level experts: take dynamic "
            "(finetune.plan says what learns and what stays) or grow."
        )
    if section.get("grow_layers") is not None or int(section.get("grow_units", 1)) != 1:
        raise UserError("finetune.grow_layers and grow_units are for units: set finetune.plan.experts for new experts.")
    if plan.tasks:
        raise UserError("finetune.plan.tasks: fine-tuning takes the recipe's tasks; gppf-ds extract drops tasks.")
    if mode == "grow" and (plan.prune is not None or plan.learn == "all"):
        raise UserError(
            "finetune.mode grow keeps everything old: leave prune out of finetune.plan, and let learn be routers or "
            "routers_and_new."
        )
    if (plan.learn != "all" and content.get("trainable")) or (mode == "grow" and content.get("frozen_tasks")):
        raise UserError("finetune.plan decides trainable, and mode grow frozen_tasks: leave them out.")


def _moe(own: Mapping[str, Any], source: Mapping[str, Any]) -> dict[str, Any]:
    """``backbone.moe``: the source's, with the run's own losses. Every task's k stands in the checkpoint's layout."""
    return {
        **source,
        "adaptive": None,
        **{key: own[key] for key in _OWN if key in own},
        "task_mlp_top_k": {},
        "task_attention_top_k": {},
    }
