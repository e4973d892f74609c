"""What routers, embeddings and new experts of a fine-tuned run start from.

A new task's router starts as a copy of an old task's, an embedding likewise. New experts are noisy copies of the
experts that the old task uses most, and the router's rows for them are nearly the mean of the others: in the middle,
wherever all of them lie together, which a softmax does not see.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from gppf_ds.backbone.moe.adapt import grown, new_experts, pruned, restricted, with_top_k
from gppf_ds.backbone.moe.layout import Layout, router_of
from gppf_ds.backbone.moe.selections import most_used, running
from gppf_ds.backbone.pretrained import moved
from gppf_ds.config import FinetuneConfig, MoePlan, RunConfig
from gppf_ds.errors import UserError
from gppf_ds.seeding import INIT, generator
from gppf_ds.tasks.task import Task
from gppf_ds.train.checkpoint import BUFFER, CheckpointReader
from gppf_ds.train.inherit import Content

ROW_NOISE = 1e-3
"""Standard deviation of what is added to a router's rows for new experts; rows drawn anew have 0.02."""


class ExpertStart:
    """The experts of a new run, and for each of its tensors the one of the source that it starts from.

    Args:
        reader: of the source's checkpoint.
        source: content of the source's recipe.
        config: of the new run.
        tasks: of the new run, frozen ones included.

    Attributes:
        layout: of the new run's experts.
        like: by new task, the task of the source whose routers it starts from.

    Raises:
        UserError: a task is named that is not there, or pruning knows nothing of a task's choices.
    """

    def __init__(self, reader: CheckpointReader, source: Content, config: RunConfig, tasks: Mapping[str, Task]) -> None:
        layout = reader.state.layout
        assert layout is not None
        self.reader, self.old = reader, layout
        self.noise, self.seed = config.backbone.pretrained_noise, config.seed
        new = config.trained(tasks)
        self.like = {name: _related(name, task, source, config.finetune, new) for name, task in new.items()}
        buffers = ((key.removeprefix(BUFFER), value) for key, value in reader.shared.items() if key.startswith(BUFFER))
        self.selections = running(buffers, layout)
        plan = config.finetune.plan or MoePlan()
        base = layout if config.finetune.mode == "grow" else self._held(plan)
        others = with_top_k(layout, plan.mlp_top_k, plan.attention_top_k).tasks
        new_numbers = new_experts(layout, plan.experts)
        self.layout = grown(base, new_numbers, {name: others[old] for name, old in self.like.items()})
        self.origins = {layer: self._experts_copied(layer, base, own) for layer, own in new_numbers.items()}
        """By layer and new expert, the one that it starts from."""

    def _held(self, plan: MoePlan) -> Layout:
        """The source's experts that the new run starts with, without the source's tasks."""
        held = self.old
        if plan.prune is not None:
            held = pruned(restricted(self.old, list(self.like.values())), self.selections, plan.prune)
        return Layout(held.experts, {})

    def _experts_copied(self, layer: str, base: Layout, new: Sequence[int]) -> dict[int, int]:
        best = most_used(self.selections, list(dict.fromkeys(self.like.values())), layer, base.experts[layer])
        return {expert: best[place % len(best)] for place, expert in enumerate(new)}

    def origin(self, name: str) -> str:
        """The source's tensor that one of the backbone starts from."""
        parts = name.split(".")
        if "experts" in parts:
            place = parts.index("experts")
            layer, number = f"{parts[2]}.{parts[place - 1]}", int(parts[place + 1])
            parts[place + 1] = str(self.origins[layer].get(number, number))
        for kind in ("routers", "task_embeddings"):
            if kind in parts:
                place = parts.index(kind) + 1
                parts[place] = self.like.get(parts[place], parts[place])
        return ".".join(parts)

    def value(self, name: str, tensor: Tensor, held: Callable[[str, Tensor], Tensor]) -> Tensor:
        """What a tensor of the backbone starts as.

        Args:
            name: of the tensor.
            tensor: the new run's.
            held: (name, a tensor of its shape) -> the source's values.
        """
        router, origin = router_of(name), self.origin(name)
        if router is not None and router.task in self.like:
            # A new router's running rows start anew, as they are.
            return self._rows(name, tensor) if router.tensor == "weight" else tensor
        value = held(origin, tensor)
        is_new_expert = origin != name and ".experts." in name
        return moved(value, self.noise, self.seed, "grown", name) if is_new_expert and self.noise else value

    def _rows(self, name: str, tensor: Tensor) -> Tensor:
        """A new router: the old one's rows for the experts that it knew."""
        router = router_of(name)
        assert router is not None
        known = self.old.tasks[self.like[router.task]].experts[router.layer]
        rows = self.reader.whole(self.origin(name)).view(len(known), -1)
        draws = generator(self.seed, INIT, "router", name).standard_normal(tuple(tensor.shape))
        weight = rows.mean(0) + torch.from_numpy(ROW_NOISE * draws).to(tensor.dtype)
        for row, expert in enumerate(self.layout.tasks[router.task].experts[router.layer]):
            if expert in known:
                weight[row] = rows[known.index(expert)]
        return weight

    def report(self) -> list[str]:
        """Lines for people."""
        routers = ", ".join(f"{new} from {old}" for new, old in self.like.items())
        before, after = (sum(map(len, layout.experts.values())) for layout in (self.old, self.layout))
        added = sum(map(len, self.origins.values()))
        return [
            f"  experts: {after - added} of the source's {before}, and {added} new ones",
            f"  routers and embeddings: {routers}",
        ]


def _related(name: str, task: Task, source: Content, config: FinetuneConfig, tasks: Mapping[str, Task]) -> str:
    """The task of the source whose routers a new task starts from."""
    old: dict[str, dict[str, str]] = source["tasks"]
    for key in config.routers:
        if key not in tasks:
            raise UserError(f"finetune.routers: the recipe has no new task {key!r}: choose from {', '.join(tasks)}.")
    named = config.routers.get(name) or config.heads.get(name)
    if named is not None:
        if named not in old:
            raise UserError(f"finetune.routers: the source has no task {named!r}: choose from {', '.join(old)}.")
        return named
    kind = type(task).__name__
    alike = [one for one, content in old.items() if content["class_path"].rpartition(".")[2] == kind]
    return next(iter([*alike, *old]))
