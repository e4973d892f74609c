"""The DeepSpeed configuration of a run: the recipe's choices plus the user's json, contradictions refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from gppf_ds.config import RunConfig
from gppf_ds.errors import UserError

_OWNED = {
    "train_batch_size": "tasks.*.batch_size",
    "train_micro_batch_size_per_gpu": "tasks.*.batch_size",
    "gradient_accumulation_steps": "engine.accumulation",
    "optimizer": "optimizer",
    "scheduler": "optimizer.learning_rate and optimizer.warmup_steps",
    "gradient_clipping": "optimizer.clip_norm",
    "bf16": "engine.precision",
    "fp16": "engine.precision",
    "torch_autocast": "engine.precision",
    "data_types": "engine.precision",
    "amp": "engine.precision",
}
"""Keys of a DeepSpeed json that the recipe decides, and where."""

_IMPOSSIBLE = {
    "gradient_allreduce_op": "the task average needs its own value",
    "prescale_gradients": "the task average scales gradients itself",
    "gradient_predivide_factor": "the task average scales gradients itself",
    "communication_data_type": "gradients are fused in the precision they are computed in",
    "sparse_gradients": "the task average fills missing gradients densely",
    "managed_gradient_accumulation": "accumulation happens inside one optimizer step",
}

_IMPOSSIBLE_ZERO = {
    "round_robin_gradients": "it breaks DeepSpeed's own map from parameters to partitions",
    "zenflow": "it updates parameters outside the step that the task average prepares",
    "zero_quantized_weights": "quantised communication is not exact",
    "zero_quantized_gradients": "quantised communication is not exact",
    "zero_hpz_partition_size": "it is untested with the task average",
    "mics_shard_size": "it is untested with the task average",
}

_WRITERS = ("tensorboard", "csv_monitor")
"""Trackers that write files, DeepSpeed's default for which is the present folder."""


MOST_IN_BUCKET = 50_000_000
"""Values in DeepSpeed's buffer for reductions. Its own default would be 2 GB of fp32."""


def deepspeed_config(config: RunConfig, precision: str, values: int = MOST_IN_BUCKET) -> dict[str, Any]:
    """What ``deepspeed.initialize`` gets.

    Args:
        config: of the run.
        precision: fp32, bf16 or fp16, resolved for the accelerator.
        values: in all parameters; no bucket needs to hold more.

    Raises:
        UserError: the json is unreadable or contradicts the recipe.
    """
    engine = config.engine
    settings = _user_settings(engine.deepspeed) if engine.deepspeed else {}
    _refuse_contradictions(settings, config)
    zero = {
        "stage3_param_persistence_threshold": 0,
        "reduce_bucket_size": min(values, MOST_IN_BUCKET),
        **settings.get("zero_optimization", {}),
        "stage": engine.zero_stage,
        # Overlap happens at lego layers in one fixed order; DeepSpeed's own follows each rank's autograd order.
        "overlap_comm": False,
        # Gradients come summed to stages 1 and 2 already; this path does no more than partition them.
        "contiguous_gradients": True,
    }
    if engine.offload_optimizer:
        zero["offload_optimizer"] = {**(zero.get("offload_optimizer") or {}), "device": "cpu"}
    files = {
        key: {"output_path": config.output, "job_name": key, **settings[key]} for key in _WRITERS if key in settings
    }
    merged: dict[str, Any] = {
        "steps_per_print": 2**31 - 1,
        **settings,
        **files,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        # On by default (1.0) since DeepSpeed 0.19.
        "gradient_clipping": config.optimizer.clip_norm,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    if precision != "fp32":
        dtype = {"bf16": "bfloat16", "fp16": "float16"}[precision]
        merged["torch_autocast"] = {
            "enabled": True,
            "dtype": dtype,
            # Of these stage 3 sends parameters and summed gradients in 16 bits, also where a module computes in fp32.
            "lower_precision_safe_modules": [],
        }
    return merged


def _user_settings(path: str) -> dict[str, Any]:
    try:
        settings = json.loads(Path(path).read_text())
    except OSError as error:
        raise UserError(f"engine.deepspeed: cannot read {path}: {error.strerror}.") from error
    except ValueError as error:
        raise UserError(f"engine.deepspeed: {path} is not valid json: {error}.") from error
    if not isinstance(settings, dict):
        raise UserError(f"engine.deepspeed: {path} must hold a json object.")
    return settings


def _refuse_contradictions(settings: dict[str, Any], config: RunConfig) -> None:
    path = config.engine.deepspeed
    for key, owner in _OWNED.items():
        if key in settings:
            raise UserError(f"{path} sets {key!r}, which the recipe decides: remove it there and set {owner}.")
    for key, reason in _IMPOSSIBLE.items():
        if key in settings:
            raise UserError(f"{path} sets {key!r}, which cannot work here ({reason}): remove it.")
    for key in ("zero_optimization", *_WRITERS):
        if not isinstance(settings.get(key, {}), dict):
            raise UserError(f"{path}: {key!r} must be a json object.")
    zero = settings.get("zero_optimization", {})
    if zero.get("stage", config.engine.zero_stage) != config.engine.zero_stage:
        raise UserError(
            f"{path} sets ZeRO stage {zero['stage']} but engine.zero_stage is {config.engine.zero_stage}: "
            "make them agree."
        )
    for key, reason in _IMPOSSIBLE_ZERO.items():
        if zero.get(key):
            raise UserError(f"{path} sets zero_optimization.{key}, which cannot work here ({reason}): remove it.")
    if zero.get("overlap_comm"):
        raise UserError(
            f"{path} sets zero_optimization.overlap_comm, whose order of collectives depends on a rank's task: "
            "remove it."
        )
    if not zero.get("contiguous_gradients", True):
        raise UserError(f"{path} turns zero_optimization.contiguous_gradients off, which cannot work here: remove it.")
    offload = zero.get("offload_optimizer")
    if offload and not config.engine.offload_optimizer:
        raise UserError(f"{path} sets zero_optimization.offload_optimizer: set engine.offload_optimizer as well.")
    if offload and offload.get("device", "cpu") != "cpu":
        raise UserError(
            f"{path} offloads the optimizer to {offload['device']!r}, which is untested here: make it 'cpu'."
        )
