"""The part of a run's configuration that concerns token-level experts."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from gppf_ds.config.require import require


@dataclass(kw_only=True)
class AdaptiveConfig:
    """How many experts of an MoE-MLP each task's tokens go through, found while training by the loss on images that are
    held out of the training sets (the rule of AdaMV-MoE, ICCV 2023)."""

    start: int = 2
    """Experts at the start, for all tasks but those in task_mlp_top_k."""
    maximum: int = 8
    every: int = 2000
    """Steps between measurements."""
    patience: int = 5000
    """A task that has not improved for more steps than this gets one expert more; if it does not improve with that
    either, it gives it back and keeps its number."""
    images: int = 512
    """Held out of each training set, in whole batches; a tenth of it at most, but one batch at least."""

    def __post_init__(self) -> None:
        for name in ("every", "images"):
            value = getattr(self, name)
            require(value >= 1, f"backbone.moe.adaptive.{name} must be at least 1, not {value}.")
        require(self.patience >= 0, f"backbone.moe.adaptive.patience must not be negative: {self.patience}.")
        require(
            1 <= self.start <= self.maximum,
            f"backbone.moe.adaptive.start must lie between 1 and maximum ({self.maximum}), not {self.start}.",
        )


@dataclass(kw_only=True)
class MoeConfig:
    """Token-level experts in the blocks of a ViT or a Swin: the modular MoE transformer (arXiv 2306.17165; layers as in
    Mod-Squad, arXiv 2212.08066)."""

    mlp_experts: int = 16
    """Experts E of an MoE-MLP; 0 leaves the MLPs dense."""
    mlp_top_k: int = 4
    """Experts that a token goes through. An expert has 1 / k of the dense MLP's hidden width, so the cost is equal."""
    mlp_blocks: Literal["odd", "even", "every"] = "odd"
    """Which blocks have an MoE-MLP, counted from 0 (in a Swin, within the stage)."""
    attention_experts: int = 0
    """Experts of a mixture of attention heads; 0 leaves attention dense."""
    attention_top_k: int = 0
    """Heads that a token chooses; 0 for as many as the dense block has."""
    attention_blocks: Literal["odd", "even", "every"] = "even"
    """Which blocks have a mixture of attention heads."""
    shared_experts: int = 0
    """Experts of an MoE-MLP that every token goes through, beside the chosen ones."""
    first_stage: int = 0
    """Swin: stages before this one stay dense."""
    task_mlp_top_k: dict[str, int] = field(default_factory=dict)
    """Other k for some tasks' MLPs."""
    task_attention_top_k: dict[str, int] = field(default_factory=dict)
    """Other k for some tasks' attention."""
    gate_norm: Literal["topk", "full"] = "topk"
    """Gates sum to 1 over the k chosen experts, or over all experts (the predecessor's)."""
    task_embedding: bool = True
    """A learnt vector for each task, added to all tokens before every block."""
    mutual_information: float = 0.005
    """Weight of the loss -I(task; expert), summed over all MoE layers; 0 for none."""
    mutual_information_source: Literal["probabilities", "gates"] = "probabilities"
    """What P(expert | task) is the mean of."""
    token_mutual_information: float = 0.0
    """Weight of its token-level variant -I(token; expert) of every task (ModuleFormer, arXiv 2306.04640)."""
    concentration: float = 0.0
    """Weight of the entropy of P(expert | task), which draws a task to few experts (ModuleFormer)."""
    momentum: float = 0.98
    """Of the running P(expert | task) that stand in for tasks absent from a step."""
    adaptive: AdaptiveConfig | None = None
    """Find each task's number of experts while training; null keeps mlp_top_k (which sets experts' width anyway)."""

    def __post_init__(self) -> None:
        names = ("mlp_experts", "attention_experts", "attention_top_k", "shared_experts", "first_stage")
        for name in (*names, "mutual_information", "token_mutual_information", "concentration"):
            require(getattr(self, name) >= 0, f"backbone.moe.{name} must not be negative: {getattr(self, name)}.")
        require(
            self.mlp_experts + self.attention_experts > 0,
            "backbone.moe needs mlp_experts or attention_experts above 0; leave backbone.moe out for dense blocks.",
        )
        for kind in ("mlp", "attention"):
            experts, own = getattr(self, f"{kind}_experts"), getattr(self, f"task_{kind}_top_k")
            counts = {"": getattr(self, f"{kind}_top_k"), **{f" of task {task}": k for task, k in own.items()}}
            for whose, k in counts.items() if experts else ():
                least = 0 if kind == "attention" and not whose else 1
                require(
                    least <= k <= experts,
                    f"backbone.moe: the {kind} top_k{whose} must lie between {least} and {kind}_experts ({experts}), "
                    f"not {k}.",
                )
        require(0 <= self.momentum < 1, f"backbone.moe.momentum must lie in [0, 1), not {self.momentum}.")
        require(
            self.adaptive is None or self.adaptive.maximum <= self.mlp_experts,
            "backbone.moe.adaptive.maximum must be at most mlp_experts "
            f"({self.mlp_experts}), not {self.adaptive and self.adaptive.maximum}.",
        )


@dataclass(kw_only=True)
class MoePlan:
    """How a network of token-level experts is adapted, in a recipe or in a file of its own (YAML or JSON). Applied in
    this order: drop tasks, prune, fewer experts for each token, new experts, what learns (arXiv 2306.17165, "fewer
    training parameters, fewer model parameters, less computation")."""

    tasks: list[str] = field(default_factory=list)
    """For gppf-ds extract: the tasks to keep; empty keeps all. Experts that only others can choose go with them."""
    prune: float | None = None
    """Drop an expert if no task gives it more than this many percent, divided by k, of its choices; every task keeps
    its k most used. 0 drops those that nobody chose, null none."""
    mlp_top_k: int = 0
    """At most so many experts of an MLP for each token; 0 leaves k as it is."""
    attention_top_k: int = 0
    """At most so many attention heads for each token; 0 leaves k as it is."""
    experts: int = 0
    """For fine-tuning: new experts in every MoE layer, which only the new tasks can choose."""
    learn: Literal["all", "routers", "routers_and_new"] | None = None
    """For fine-tuning: everything; only routers, embeddings and heads of the new tasks; or these and the new experts.
    null: everything, but in mode grow routers_and_new."""

    def __post_init__(self) -> None:
        require(self.prune is None or self.prune >= 0, f"prune must not be negative: {self.prune} (percent).")
        for name in ("mlp_top_k", "attention_top_k", "experts"):
            require(getattr(self, name) >= 0, f"{name} of the plan must not be negative: {getattr(self, name)}.")
        require(
            self.learn != "routers" or not self.experts,
            "a plan with new experts that do not learn (learn: routers) is of no use: set learn to routers_and_new.",
        )
