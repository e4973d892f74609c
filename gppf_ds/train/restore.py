"""Between checkpoints and live objects: what a checkpoint holds besides parameters, and models built from one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from gppf_ds.backbone.controller import Controller
from gppf_ds.backbone.lego import LegoBackbone
from gppf_ds.backbone.moe.layout import Layout
from gppf_ds.backbone.norm import NormPolicy
from gppf_ds.config import BackboneConfig
from gppf_ds.errors import UserError
from gppf_ds.seeding import INIT, seed_global_generators
from gppf_ds.simt.model import SimtModel
from gppf_ds.simt.usage import owner_of
from gppf_ds.tasks.pyramid import build_head
from gppf_ds.tasks.task import FeatureInfo, Task
from gppf_ds.train import checkpoint
from gppf_ds.train.checkpoint import BUFFER, CONTROLLER, CONTROLLER_STATE, CheckpointReader
from gppf_ds.train.recipe import Recipe


def build_model(
    config: BackboneConfig,
    tasks: Mapping[str, Task],
    seed: int,
    kept: Sequence[Sequence[int]] | None = None,
    paths_fixed: bool = False,
    trainable: Sequence[str] = (),
    layout: Layout | None = None,
) -> tuple[SimtModel, Controller]:
    """Backbone, heads and controllers with the initial values that the seed gives them.

    Args:
        config: of the backbone.
        tasks: by name.
        seed: of the run.
        kept: the units that every lego layer still holds; None for all.
        paths_fixed: whether every device takes its task's path.
        trainable: patterns of the names of the parameters that learn; empty: all.
        layout: of token-level experts; None for that of the configuration.

    Raises:
        UserError: a pattern fits no parameter.
    """
    backbone = LegoBackbone(config, seed, kept, list(tasks), layout)
    heads = {}
    for name, task in tasks.items():
        seed_global_generators(seed, INIT, "head", name)
        heads[name] = build_head(task, FeatureInfo(backbone.channels, backbone.strides))
    policy = NormPolicy(config.norm_weighting, config.norm_sync == "cross_task")
    model = SimtModel(backbone, heads, {name: task.loss_weight for name, task in tasks.items()}, policy)
    controller = Controller(list(tasks), backbone.units)
    controller.frozen = controller.frozen or paths_fixed
    if trainable:
        model.freeze_all_but(trainable)
    return model, controller


def is_kept(name: str, kept: Sequence[Sequence[int]] | None) -> bool:
    """Whether a parameter or buffer survives the start of the sparse phase."""
    match owner_of(name):
        case ("unit", layer, unit) if kept is not None:
            return int(unit) in kept[int(layer)]
        case _:
            return True


def shared_tensors(model: nn.Module, controller: Controller, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """What every rank holds alike: buffers, controllers and the controllers' optimizer."""
    shared = {BUFFER + name: tensor for name, tensor in model.state_dict().items() if _is_buffer(model, name)}
    for name, row in controller.logits.items():
        shared[CONTROLLER + name] = row.detach()
        for kind, value in optimizer.state.get(row, {}).items():
            shared[f"{CONTROLLER_STATE}{name}.{kind}"] = value
    return shared


@torch.no_grad()
def restore_shared(
    reader: CheckpointReader, model: nn.Module, controller: Controller, optimizer: torch.optim.Optimizer | None = None
) -> None:
    """The inverse of :func:`shared_tensors`."""
    buffers = dict(model.named_buffers())
    for key, value in reader.shared.items():
        if key.startswith(BUFFER):
            buffers[key.removeprefix(BUFFER)].copy_(value)
    for name, row in controller.logits.items():
        row.copy_(reader.shared[CONTROLLER + name])
        prefix = f"{CONTROLLER_STATE}{name}."
        state = {k.removeprefix(prefix): v for k, v in reader.shared.items() if k.startswith(prefix)}
        if optimizer is not None and state:
            optimizer.state[row] = {k: v if v.dim() == 0 else v.to(row.device) for k, v in state.items()}


def require_same_architecture(reader: CheckpointReader, model: nn.Module, tasks: Sequence[str]) -> None:
    """Raises :class:`UserError` with the first difference between a checkpoint and a model."""
    remedy = "use the recipe that wrote it, or choose another output folder."
    wanted = {name: p.numel() for name, p in model.named_parameters()}
    sizes = reader.sizes()
    for name in [*wanted, *sizes]:
        if name not in sizes or name not in wanted:
            where = "the checkpoint" if name not in sizes else "the recipe"
            raise UserError(f"{reader.path} is of another architecture ({name} is missing from {where}): {remedy}")
        if sizes[name] != wanted[name]:
            raise UserError(
                f"{reader.path} is of another architecture ({name} has {sizes[name]} values there and {wanted[name]} "
                f"in the recipe): {remedy}"
            )
    if set(reader.state.cursors) != set(tasks):
        raise UserError(f"{reader.path} has the tasks {sorted(reader.state.cursors)}, not {sorted(tasks)}: {remedy}")


@dataclass
class Trained:
    """A trained network on the CPU."""

    path: Path
    """The checkpoint."""
    step: int
    model: SimtModel
    controller: Controller
    recipe: Recipe

    def require_tasks(self, names: Sequence[str] | None) -> list[str]:
        """These tasks, or all.

        Raises:
            UserError: a name that is none of the run's tasks.
        """
        for name in names or ():
            if name not in self.recipe.tasks:
                raise UserError(f"the run has no task {name!r}: choose from {', '.join(self.recipe.tasks)}.")
        return list(names or self.recipe.tasks)


def load_trained(folder: Path, path: Path | None, recipe: Recipe) -> Trained:
    """Builds a run's network and loads its last checkpoint, or the one at ``path``.

    Raises:
        UserError: there is none, it is damaged, or it is of another architecture.
    """
    found = checkpoint.complete(folder / "checkpoints")
    if path is None and not found:
        raise UserError(f"{folder} has no complete checkpoint: train it first.")
    reader = CheckpointReader(path or found[-1])
    state, config = reader.state, recipe.config
    model, controller = build_model(
        config.backbone, recipe.tasks, config.seed, state.kept, state.paths_fixed, layout=state.layout
    )
    require_same_architecture(reader, model, list(config.trained(recipe.tasks)))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(reader.whole(name).view_as(parameter))
    restore_shared(reader, model, controller)
    return Trained(reader.path, reader.state.step, model.eval(), controller, recipe)


def _is_buffer(model: nn.Module, name: str) -> bool:
    module, _, leaf = name.rpartition(".")
    return leaf in model.get_submodule(module)._buffers
