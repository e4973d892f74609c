"""The configuration of a run: plain dataclasses that jsonargparse fills from YAML and the command line.

Every field's docstring is its ``--help`` text. Values that can be judged on their own are judged here, so that a bad
recipe ends with one sentence before any process group exists.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from gppf_ds.config.moe import MoeConfig, MoePlan
from gppf_ds.config.require import require


@dataclass(kw_only=True)
class BackboneConfig:
    """The lego backbone."""

    name: str = "resnet50"
    """timm model whose blocks become the units."""
    options: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments for timm.create_model, for example {layers: [1, 1, 1, 1], channels: [16, 32, 64, 128]}."""
    units: int | list[int] = 2
    """Candidate units N in every lego layer (GPPF section 3.2), or a list with one number per layer."""
    unit_blocks: list[Literal["plain", "deformable", "pad_first"]] = field(default_factory=list)
    """Block class of unit 0, 1, ..., over and over; plain where empty. deformable (ResNets): modulated deformable 3x3
    convolutions from Res3 on, as mmdet's dcn has them. pad_first (Swin): pads maps before it shifts the windows, as
    mmdet and mmseg do; timm, and so plain, shifts first."""
    pretrained: str | None = None
    """Start from these weights: a timm, torchvision, mmdet or mmseg checkpoint file, or timm for timm's own loader."""
    pretrained_noise: float = 0.01
    """Relative noise on the copies of pretrained weights, so that units can part ways; the first unit has none."""
    routing: Literal["soft", "hard"] = "soft"
    """soft mixes all units of a layer; hard runs the chosen one (straight-through)."""
    moe: MoeConfig | None = None
    """Token-level experts in the blocks of a ViT or Swin, in the place of units (units must be 1)."""
    checkpoint: bool = False
    """Recompute the activations of every lego layer in backward."""
    norm_sync: Literal["cross_task", "none"] = "cross_task"
    """Batch statistics over every device of the step, or over each device alone (the paper's ablation)."""
    norm_weighting: Literal["element", "device", "sample"] = "element"
    """What counts once in cross-task batch statistics: an element of the map, a device, or an image."""

    def __post_init__(self) -> None:
        counts = [self.units] if isinstance(self.units, int) else self.units
        require(bool(counts) and min(counts) >= 1, f"backbone.units must be at least 1, not {self.units}.")
        require(
            self.moe is None or set(counts) == {1},
            f"backbone.moe has experts in the place of units: set backbone.units to 1, not {self.units}.",
        )
        require(
            len(self.unit_blocks) <= max(counts),
            f"backbone.unit_blocks names {len(self.unit_blocks)} units, but backbone.units is {self.units}.",
        )
        require(self.pretrained_noise >= 0, f"backbone.pretrained_noise must not be negative: {self.pretrained_noise}.")


@dataclass(kw_only=True)
class ControllerConfig:
    """The per-task controllers: Gumbel-softmax over the units (GPPF equation 1 and appendix D.1)."""

    learning_rate: float = 0.01
    """Adam learning rate of the logits."""
    temperature_start: float = 5.0
    temperature_end: float = 0.01
    decay_share: float = 0.9
    """Share of all steps over which the temperature falls linearly from start to end."""
    sparse: bool = False
    """Once the temperature has settled, freeze the controllers and drop the units that no task's path uses: the rest of
    the training costs what a static network costs."""

    def __post_init__(self) -> None:
        require(self.learning_rate >= 0, f"controller.learning_rate must not be negative: {self.learning_rate}.")
        require(
            self.temperature_start >= self.temperature_end > 0,
            "controller.temperature_end must be above 0 and at most controller.temperature_start "
            f"(got {self.temperature_start} -> {self.temperature_end}).",
        )
        require(0 < self.decay_share <= 1, f"controller.decay_share must lie in (0, 1], not {self.decay_share}.")
        require(
            not self.sparse or self.decay_share < 1,
            "controller.sparse needs steps after the temperature has settled: set controller.decay_share below 1.",
        )


@dataclass(kw_only=True)
class ScheduleConfig:
    """Which task each device runs in each step."""

    kind: Literal["iid", "stratified", "balanced", "static", "per_batch", "accumulate"] = "iid"
    """iid: every device draws by weight (the paper). stratified: the same marginals, counts within 1 of the
    expectation. balanced: stratified, placed so that all ranks have about the same to do (gppf-ds plan --balance writes
    it). static: a fixed map. per_batch: one task for all devices, drawn by weight (alternating training).
    accumulate: every rank runs every task in a fixed order, and gradients are those of the sum of all tasks' losses,
    each averaged over the ranks; sampling weights have no meaning there."""
    static: list[str] = field(default_factory=list)
    """For kind static: task names, dealt to the devices in turn."""
    costs: dict[str, float | list[float]] = field(default_factory=dict)
    """For kind balanced: seconds that a device needs for each task, or a list of them, one for each phase of a step
    after which ranks wait for each other. Only ratios matter."""

    def __post_init__(self) -> None:
        require(
            bool(self.static) == (self.kind == "static"),
            "schedule.static lists the tasks of schedule.kind static: give both or neither.",
        )
        for name, cost in self.costs.items():
            phases = cost if isinstance(cost, list) else [cost]
            require(
                min(phases, default=-1.0) >= 0 and 0 < sum(phases) < math.inf,
                f"schedule.costs.{name} must be seconds above 0, or such a list, not {cost}.",
            )


@dataclass(kw_only=True)
class OptimizerConfig:
    """The optimizer of backbone and heads."""

    name: Literal["sgd", "adamw"] = "sgd"
    learning_rate: float = 0.02
    """Peak learning rate, reached after the warm-up; falls to 0 as a cosine, or at the milestones."""
    warmup_steps: int = 0
    milestones: list[int] = field(default_factory=list)
    """Steps at which the learning rate is divided by 10, in the place of the cosine."""
    weight_decay: float = 5e-4
    norm_decay: bool = False
    """Decay norms, biases, position embeddings and tokens too."""
    momentum: float = 0.9
    """SGD momentum."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW betas."""
    epsilon: float = 1e-8
    """AdamW epsilon."""
    clip_norm: float = 0.0
    """Clip the norm of the fused gradient to this; 0 for no clipping (the paper uses none)."""

    def __post_init__(self) -> None:
        require(self.learning_rate > 0, f"optimizer.learning_rate must be above 0, not {self.learning_rate}.")
        require(self.warmup_steps >= 0, f"optimizer.warmup_steps must not be negative: {self.warmup_steps}.")
        require(
            all(a < b for a, b in zip([self.warmup_steps, *self.milestones], self.milestones, strict=False)),
            f"optimizer.milestones must rise and come after the warm-up, unlike {self.milestones}.",
        )
        require(self.epsilon > 0, f"optimizer.epsilon must be above 0, not {self.epsilon}.")
        require(self.weight_decay >= 0, f"optimizer.weight_decay must not be negative: {self.weight_decay}.")
        require(self.clip_norm >= 0, f"optimizer.clip_norm must not be negative: {self.clip_norm} (0 means none).")


@dataclass(kw_only=True)
class EngineConfig:
    """How DeepSpeed runs the step."""

    zero_stage: Literal[0, 1, 2, 3] = 0
    """ZeRO stage: what is partitioned over the ranks (1 optimizer state, 2 gradients, 3 parameters)."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """fp32, or mixed precision with fp32 parameters; auto is bf16 where a GPU has it. On a CPU fp16 is slow."""
    offload_optimizer: bool = False
    """Keep optimizer state and step on the CPU (stages 1 to 3)."""
    devices_per_rank: int = 1
    """Virtual devices K: task batches that a rank advances through the backbone together."""
    accumulation: int = 1
    """Gradient accumulation: this many groups of devices one after another in one optimizer step."""
    average: Literal["task", "world"] = "task"
    """What gradients are divided by. task: the devices that used the parameter. world: all devices, and what nobody
    used steps too, as under DDP or plain DeepSpeed: to measure what the task average is worth."""
    expert_parallel: int = 1
    """Ranks that hold the experts of every MoE-MLP together (DeepSpeed's ep_size); 1: every rank holds them all."""
    deepspeed: str | None = None
    """A DeepSpeed json with further settings (see ds_configs/); keys the recipe owns are refused there."""
    timeout: float = 600.0
    """Seconds after which a collective that some rank never joined ends the job."""
    audit: bool = False
    """Debug: compare every collective of a step over the ranks before it starts."""

    def __post_init__(self) -> None:
        require(self.devices_per_rank >= 1, f"engine.devices_per_rank must be at least 1, not {self.devices_per_rank}.")
        require(self.expert_parallel >= 1, f"engine.expert_parallel must be at least 1, not {self.expert_parallel}.")
        require(
            self.expert_parallel == 1 or self.zero_stage < 3,
            "engine.expert_parallel spreads experts over ranks, as ZeRO 3 spreads all parameters: set zero_stage to 0, "
            "1 or 2, or expert_parallel to 1.",
        )
        require(self.accumulation >= 1, f"engine.accumulation must be at least 1, not {self.accumulation}.")
        require(self.timeout > 0, f"engine.timeout must be above 0 seconds, not {self.timeout}.")
        require(
            not self.offload_optimizer or self.zero_stage > 0,
            "engine.offload_optimizer needs engine.zero_stage 1, 2 or 3.",
        )


@dataclass(kw_only=True)
class LoaderConfig:
    """Reading the data."""

    workers: int = 2
    """Worker processes per rank; 0 reads in the training process."""
    prefetch: int = 4
    """Batches that each worker reads ahead."""
    max_unreadable_share: float = 0.01
    """The run ends when more than this share of a rank's samples could not be read."""

    def __post_init__(self) -> None:
        require(self.workers >= 0, f"loader.workers must not be negative: {self.workers}.")
        require(self.prefetch >= 1, f"loader.prefetch must be at least 1, not {self.prefetch}.")
        require(
            0 <= self.max_unreadable_share < 1,
            f"loader.max_unreadable_share must lie in [0, 1), not {self.max_unreadable_share}.",
        )


@dataclass(kw_only=True)
class CheckpointConfig:
    """Saving."""

    every: int = 1000
    """Steps between checkpoints; the last step is always saved."""
    keep: int = 2
    """Checkpoints to keep."""
    background: bool = True
    """Write beside the training, from a copy in host memory; false: the training waits until all is on disk."""

    def __post_init__(self) -> None:
        require(self.every >= 1, f"checkpoint.every must be at least 1, not {self.every}.")
        require(self.keep >= 1, f"checkpoint.keep must be at least 1, not {self.keep}.")


@dataclass(kw_only=True)
class FinetuneConfig:
    """Start from a finished run: its backbone, perhaps a path and heads (GPPF section 3.3). It gives the backbone's
    name, options, units and unit_blocks; the recipe's tasks are the new ones."""

    source: str | None = None
    """Folder of the finished run; null starts afresh."""
    mode: Literal["dynamic", "fixed", "retrain", "grow"] = "dynamic"
    """dynamic: new controllers find paths through all units, which learn on. fixed: only the units on the path of one
    of the source's tasks, as a plain network. retrain: the same on the paths that a dynamic run found. grow: the
    source's tasks stay exactly as they are; the new tasks get units and heads of their own."""
    path: str | None = None
    """For fixed the source's task whose path to take; for retrain the folder of the dynamic run."""
    heads: dict[str, str] = field(default_factory=dict)
    """New task -> task of the source whose head it starts from, except for the final prediction layers."""
    final_layers: bool = False
    """Take the heads' final prediction layers too: the classes must be the same."""
    grow_layers: list[int] | None = None
    """For grow: the layers that get new units; all by default."""
    grow_units: int = 1
    """For grow: new units in each of these layers."""
    plan: MoePlan | None = None
    """For a source with token-level experts: how they are adapted. A recipe may name the plan's file instead."""
    routers: dict[str, str] = field(default_factory=dict)
    """For a source with token-level experts: new task -> task of the source whose routers it starts from. By default
    that of finetune.heads, else the first of the same kind, else the first; gppf-ds advise ranks them."""

    def __post_init__(self) -> None:
        require(
            (self.path is not None) == (self.mode in ("fixed", "retrain")),
            "finetune.path belongs to finetune.mode fixed (a task of the source) and retrain (the folder of a dynamic "
            "run), and to no other.",
        )
        require(self.grow_units >= 1, f"finetune.grow_units must be at least 1, not {self.grow_units}.")


@dataclass(kw_only=True)
class RunConfig:
    """A whole run, except its tasks."""

    output: str
    """Folder of the run: configuration, metrics, checkpoints, figures."""
    steps: int
    """Optimizer steps."""
    seed: int = 0
    evaluate_every: int = 0
    """Steps between evaluations; 0 evaluates only before the first and after the last step."""
    guard_limit: int = 20
    """Consecutive steps with a non-finite loss or gradient after which the run saves a checkpoint and ends."""
    log_every: int = 10
    """Steps between lines of metrics.jsonl (and of the console when it is no terminal)."""
    routes_every: int = 0
    """Steps between lines of routes.jsonl, the probabilities of all controllers; 0 for 200 lines over the run."""
    metrics_port: int = 0
    """Prometheus exporter of local rank r listens on this port + r; 0 for none."""
    metrics_address: str = "127.0.0.1"
    trainable: list[str] = field(default_factory=list)
    """Patterns (with * and ?) of the names of the parameters that learn; all others, and the batch statistics of what
    does not learn, stay bit-identical. Empty: everything learns."""
    frozen_tasks: list[str] = field(default_factory=list)
    """Tasks that keep head and path but are not trained here."""
    finetune: FinetuneConfig = field(default_factory=FinetuneConfig)
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    controller: ControllerConfig = field(default_factory=ControllerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    loader: LoaderConfig = field(default_factory=LoaderConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)

    def trained(self, tasks: Mapping[str, Any]) -> dict[str, Any]:
        """The tasks that are trained here: all by name but the frozen ones."""
        return {name: task for name, task in tasks.items() if name not in self.frozen_tasks}

    def __post_init__(self) -> None:
        require(self.steps >= 1, f"steps must be at least 1, not {self.steps}.")
        require(self.seed >= 0, f"seed must not be negative: {self.seed}.")
        require(self.evaluate_every >= 0, f"evaluate_every must not be negative: {self.evaluate_every}.")
        require(self.guard_limit >= 1, f"guard_limit must be at least 1, not {self.guard_limit}.")
        require(self.log_every >= 1, f"log_every must be at least 1, not {self.log_every}.")
        require(self.routes_every >= 0, f"routes_every must not be negative: {self.routes_every}.")
        require(
            self.optimizer.warmup_steps < self.steps,
            f"optimizer.warmup_steps ({self.optimizer.warmup_steps}) must be below steps ({self.steps}).",
        )
        require(
            self.engine.average == "task" or self.schedule.kind != "accumulate",
            "schedule.kind accumulate has an average of its own: set engine.average to task, or another schedule.",
        )
