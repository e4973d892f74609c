"""What DeepSpeed gets, and what a user's json may not say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gppf_ds.config import EngineConfig, OptimizerConfig, RunConfig
from gppf_ds.errors import UserError
from gppf_ds.simt.deepspeed_config import deepspeed_config

SHIPPED = Path(__file__).parents[2] / "ds_configs"


def run(settings=None, tmp_path=None, clip: float = 0.0, **engine) -> RunConfig:
    if settings is not None:
        path = tmp_path / "ds.json"
        path.write_text(settings if isinstance(settings, str) else json.dumps(settings))
        engine["deepspeed"] = str(path)
    return RunConfig(output="o", steps=1, engine=EngineConfig(**engine), optimizer=OptimizerConfig(clip_norm=clip))


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_what_the_task_average_needs(stage):
    made = deepspeed_config(run(zero_stage=stage, clip=3.0), "fp32")
    assert made["zero_optimization"]["stage"] == stage
    assert made["zero_optimization"]["overlap_comm"] is False
    assert made["zero_optimization"]["contiguous_gradients"] is True
    assert made["gradient_clipping"] == 3.0
    assert made["train_micro_batch_size_per_gpu"] == made["gradient_accumulation_steps"] == 1
    assert "torch_autocast" not in made


@pytest.mark.parametrize("path", sorted(SHIPPED.glob("*.json")), ids=lambda path: path.name)
def test_the_files_that_we_ship_are_accepted(path):
    settings = json.loads(path.read_text()).get("zero_optimization", {})
    engine = EngineConfig(
        zero_stage=settings.get("stage", 0), offload_optimizer="offload_optimizer" in settings, deepspeed=str(path)
    )
    made = deepspeed_config(RunConfig(output="o", steps=1, engine=engine), "bf16")
    assert made["torch_autocast"]["dtype"] == "bfloat16"
    assert all(made["zero_optimization"][key] == value for key, value in settings.items() if key != "offload_optimizer")


def test_clipping_is_off_unless_asked_for():
    """DeepSpeed 0.19 clips at 1.0 by default."""
    assert deepspeed_config(run(), "fp32")["gradient_clipping"] == 0.0


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", "bfloat16"), ("fp16", "float16")])
def test_mixed_precision_is_torch_autocast(precision, dtype):
    """And nothing is sent in 16 bits."""
    made = deepspeed_config(run(), precision)["torch_autocast"]
    assert made == {"enabled": True, "dtype": dtype, "lower_precision_safe_modules": []}


def test_deepspeed_takes_the_result():
    from deepspeed.runtime.config import DeepSpeedConfig

    for stage in range(4):
        made = DeepSpeedConfig(deepspeed_config(run(zero_stage=stage), "fp32"))
        assert made.zero_optimization_stage == stage


def test_other_settings_of_the_user_arrive(tmp_path):
    settings = {"wall_clock_breakdown": True, "zero_optimization": {"reduce_bucket_size": 123, "stage": 2}}
    made = deepspeed_config(run(settings, tmp_path, zero_stage=2), "fp32")
    assert made["wall_clock_breakdown"] is True
    assert made["zero_optimization"]["reduce_bucket_size"] == 123


def test_a_small_network_needs_no_large_bucket() -> None:
    for values, bucket in ((1000, 1000), (10**9, 50_000_000)):
        assert deepspeed_config(run(zero_stage=1), "fp32", values)["zero_optimization"]["reduce_bucket_size"] == bucket


def test_trackers_write_into_the_run_folder_unless_told_otherwise(tmp_path):
    settings = {"csv_monitor": {"enabled": True}, "tensorboard": {"enabled": True, "output_path": "mine"}}
    made = deepspeed_config(run(settings, tmp_path), "fp32")
    assert made["csv_monitor"] == {"enabled": True, "output_path": "o", "job_name": "csv_monitor"}
    assert made["tensorboard"] == {"enabled": True, "output_path": "mine", "job_name": "tensorboard"}
    assert "tensorboard" not in deepspeed_config(run(), "fp32")


def test_offload(tmp_path):
    made = deepspeed_config(run(zero_stage=1, offload_optimizer=True), "fp32")
    assert made["zero_optimization"]["offload_optimizer"] == {"device": "cpu"}
    settings = {"zero_optimization": {"offload_optimizer": {"device": "cpu", "pin_memory": True}}}
    made = deepspeed_config(run(settings, tmp_path, zero_stage=1, offload_optimizer=True), "fp32")
    assert made["zero_optimization"]["offload_optimizer"] == {"device": "cpu", "pin_memory": True}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"train_batch_size": 8}, ["'train_batch_size'", "tasks.*.batch_size"]),
        ({"train_micro_batch_size_per_gpu": 8}, ["'train_micro_batch_size_per_gpu'", "tasks.*.batch_size"]),
        ({"gradient_accumulation_steps": 2}, ["engine.accumulation"]),
        ({"optimizer": {"type": "Adam"}}, ["'optimizer'"]),
        ({"scheduler": {}}, ["'scheduler'"]),
        ({"gradient_clipping": 1.0}, ["optimizer.clip_norm"]),
        ({"bf16": {"enabled": True}}, ["engine.precision"]),
        ({"fp16": {"enabled": True}}, ["engine.precision"]),
        ({"gradient_allreduce_op": "avg"}, ["'gradient_allreduce_op'"]),
        ({"prescale_gradients": True}, ["'prescale_gradients'"]),
        ({"zero_optimization": {"stage": 2}}, ["stage 2", "engine.zero_stage is 1"]),
        ({"zero_optimization": {"round_robin_gradients": True}}, ["zero_optimization.round_robin_gradients"]),
        ({"zero_optimization": {"overlap_comm": True}}, ["zero_optimization.overlap_comm"]),
        ({"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}, ["engine.offload_optimizer"]),
        ({"zero_optimization": True}, ["'zero_optimization'", "object"]),
        ({"tensorboard": True}, ["'tensorboard'", "object"]),
        ([1, 2], ["json object"]),
        ("{broken", ["not valid json"]),
    ],
)
def test_contradictions_are_refused_by_name(settings, words, tmp_path):
    with pytest.raises(UserError) as error:
        deepspeed_config(run(settings, tmp_path, zero_stage=1), "fp32")
    sentence = str(error.value)
    assert "\n" not in sentence
    assert sentence.endswith(".")
    for word in ["ds.json", *words]:
        assert word in sentence


def test_a_missing_file_is_named():
    with pytest.raises(UserError, match=r"engine\.deepspeed.*nowhere\.json"):
        deepspeed_config(run(deepspeed="nowhere.json"), "fp32")


def test_offload_needs_a_partitioned_optimizer():
    with pytest.raises(UserError, match=r"engine\.offload_optimizer.*engine\.zero_stage"):
        EngineConfig(offload_optimizer=True, zero_stage=0)
