"""Which experts a network holds, and which of them each task may choose: what pruning and growing change."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from gppf_ds.config import MoeConfig


@dataclass
class TaskLayout:
    """One task's part of a :class:`Layout`. Keys are names of MoE layers: ``LAYER.mlp`` and ``LAYER.attn``."""

    experts: dict[str, list[int]] = field(default_factory=dict)
    """The experts that the task's router can choose, in the order of the router's rows."""
    top_k: dict[str, int] = field(default_factory=dict)
    """How many of them a token goes through."""


@dataclass
class Layout:
    """The experts of every MoE layer by their numbers, which stay with them for life."""

    experts: dict[str, list[int]] = field(default_factory=dict)
    """By the layer's name (``LAYER.mlp``, ``LAYER.attn``), in order."""
    tasks: dict[str, TaskLayout] = field(default_factory=dict)
    """The tasks that have routers."""

    @classmethod
    def full(cls, config: MoeConfig, layers: Mapping[str, int], tasks: Sequence[str]) -> Layout:
        """Of a new network: every layer has all experts, and every task can choose each of them.

        Args:
            config: numbers of experts and k.
            layers: name of every MoE layer -> k where the configuration has 0 (the dense block's heads).
            tasks: names.
        """
        layout = cls()
        for name in layers:
            count = config.mlp_experts if is_mlp(name) else config.attention_experts
            layout.experts[name] = list(range(count))
        for task in tasks:
            layout.add_task(task, config, layers)
        return layout

    def add_task(self, task: str, config: MoeConfig, layers: Mapping[str, int]) -> None:
        """Lets a task choose from all experts that are there now."""
        own = TaskLayout()
        for name, heads in layers.items():
            special = config.task_mlp_top_k if is_mlp(name) else config.task_attention_top_k
            mlp = config.adaptive.start if config.adaptive else config.mlp_top_k
            usual = mlp if is_mlp(name) else config.attention_top_k or heads
            own.experts[name] = list(self.experts[name])
            own.top_k[name] = min(special.get(task, usual), len(own.experts[name]))
        self.tasks[task] = own

    def to_json(self) -> dict[str, Any]:
        """For a checkpoint's state."""
        return asdict(self)

    @classmethod
    def read(cls, values: Mapping[str, Any] | None) -> Layout | None:
        """The inverse of :meth:`to_json`; None for None."""
        if values is None:
            return None
        tasks = {task: TaskLayout(**own) for task, own in values["tasks"].items()}
        return cls({name: list(experts) for name, experts in values["experts"].items()}, tasks)


def is_mlp(layer: str) -> bool:
    """Whether an MoE layer of this name is an MLP (else attention)."""
    return layer.endswith(".mlp")


@dataclass(frozen=True)
class RouterTensor:
    """What the name of a tensor of a router says."""

    layer: str
    """Of the router: ``LAYER.mlp`` or ``LAYER.attn``."""
    task: str
    tensor: str
    """``weight``, ``probability``, ``usage`` or ``updates``."""


def router_of(name: str) -> RouterTensor | None:
    """Of a parameter or buffer of :class:`gppf_ds.simt.model.SimtModel`; None where it is of no router."""
    parts = name.split(".")
    if parts[0] != "backbone" or len(parts) < 4 or parts[-3] != "routers":
        return None
    return RouterTensor(f"{parts[2]}.{parts[-4]}", parts[-2], parts[-1])
