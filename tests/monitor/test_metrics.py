"""What the exporter says of controllers, experts and memory."""

from __future__ import annotations

import math
import re
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from conftest import write_recipe
from distributed.ranks import environment, free_port

from gppf_ds.config import RunConfig
from gppf_ds.errors import UserError
from gppf_ds.monitor.metrics import DETAILED, Metrics


@pytest.fixture
def metrics() -> Metrics:
    return Metrics({"torch": "2.6"})


def value(metrics: Metrics, name: str, **labels: str) -> float | None:
    return metrics.registry.get_sample_value(f"gppf_ds_{name}", labels)


def test_selection_of_layers_with_different_numbers_of_units(metrics: Metrics) -> None:
    metrics.selection("digits", ["Stem", "Res2.0", "Res3.0"], [[0.9, 0.1], [1.0], [1 / 3] * 3])
    assert value(metrics, "lego_selection_ratio", layer="Stem", unit="0", task="digits") == 0.9
    entropy = -(0.9 * math.log(0.9) + 0.1 * math.log(0.1)) / math.log(2)
    assert value(metrics, "lego_entropy_ratio", layer="Stem", task="digits") == pytest.approx(entropy)
    assert value(metrics, "lego_entropy_ratio", layer="Res2.0", task="digits") == 0
    assert value(metrics, "lego_entropy_ratio", layer="Res3.0", task="digits") == pytest.approx(1)


def test_experts(metrics: Metrics) -> None:
    metrics.experts("3", {"a": [4, 0, 0, 0], "b": [2, 2, 0, 0]})
    assert value(metrics, "dead_expert_ratio", layer="3") == 0.5
    shares = (0.75, 0.25)
    diversity = math.exp(-sum(share * math.log(share) for share in shares)) / 4
    assert value(metrics, "expert_diversity_ratio", layer="3") == pytest.approx(diversity)
    assert value(metrics, "expert_utilization_ratio", layer="3", expert="0", task="a") == 4
    assert value(metrics, "expert_utilization_ratio", layer="3", expert="1", task="b") == 2
    assert value(metrics, "expert_utilization_ratio", layer="3", expert="3", task="b") == 0

    metrics.experts("3", {"a": [0, 0, 0, 0], "b": [0, 0, 0, 0]})
    assert value(metrics, "dead_expert_ratio", layer="3") == 0.5
    many = [1.0] * (DETAILED + 1)
    metrics.experts("5", {"a": many})
    assert value(metrics, "expert_diversity_ratio", layer="5") == pytest.approx(1)
    assert value(metrics, "expert_utilization_ratio", layer="5", expert="0", task="a") is None
    metrics.experts("7", {"a": [0.7, 0.299, 0.001]})
    assert value(metrics, "dead_expert_ratio", layer="7") == pytest.approx(1 / 3)


def test_parameter_users_are_told_by_owner(metrics: Metrics) -> None:
    metrics.parameter_users({("all",): 4, ("task", "digits"): 3, ("unit", "2", "0"): 1}, {("all",): 0.5})
    assert value(metrics, "parameter_users", group="task/digits") == 3
    assert value(metrics, "parameter_users", group="unit/2/0") == 1
    assert value(metrics, "grad_norm", group="all") == 0.5


def test_memory_is_read_when_it_is_asked_for(metrics: Metrics) -> None:
    resident = value(metrics, "process_resident_memory_bytes")
    assert resident is not None
    assert resident > 2**24
    assert value(metrics, "accelerator_memory_peak_bytes") == 0


def test_nobody_elsewhere_is_served_by_default(metrics: Metrics) -> None:
    port = free_port()
    metrics.serve(RunConfig(output="o", steps=1).metrics_address, port)
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        assert b"gppf_ds_build_info" in answer.read()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.2", port), 10)  # who listens on all addresses answers here, too
    with pytest.raises(UserError, match=f"127.0.0.1:{port} .* metrics_port"):
        metrics.serve("127.0.0.1", port)


RUN = """
import sys
from pathlib import Path
from prometheus_client import generate_latest
from distributed.planted import Fault, plant
from gppf_ds.simt.job import start_distributed
from gppf_ds.train import recipe
from gppf_ds.train.trainer import Trainer
if len(sys.argv) > 2:
    plant(Fault("nan", rank=0, step=int(sys.argv[2]), phase="forward"))
run = recipe.read(["--config", sys.argv[1]])
device = start_distributed(60)
Path(run.config.output).mkdir(parents=True)
trainer = Trainer(run.config, run.tasks, device)
trainer.fit()
print(generate_latest(trainer.observer.metrics.registry).decode())
print("gradient by DeepSpeed", float(trainer.engine.engine.get_global_grad_norm() or 0))
"""


def exported(text: str, name: str) -> dict[str, float]:
    """The values of a metric by its labels, as they are printed."""
    found = re.findall(rf"^gppf_ds_{name}(?:{{(.*)}})? (\S+)$", text, re.MULTILINE)
    return {labels: float(number) for labels, number in found}


def test_a_run_tells_of_gradients_faults_and_checkpoints(light_recipe: dict[str, Any], tmp_path: Path) -> None:
    light_recipe["engine"] |= {"zero_stage": 1, "devices_per_rank": 2}
    light_recipe |= {"steps": 3, "log_every": 1, "schedule": {"kind": "static", "static": ["digits", "distance"]}}
    command = [sys.executable, "-c", RUN, str(write_recipe(light_recipe, tmp_path)), "1"]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr

    norms, users = exported(done.stdout, "grad_norm"), exported(done.stdout, "parameter_users")
    assert norms.keys() == users.keys()
    assert norms['group="task/digits"'] > 0
    whole = float(done.stdout.rpartition("gradient by DeepSpeed ")[2])
    assert math.sqrt(sum(norm**2 for norm in norms.values())) == pytest.approx(whole, rel=1e-5)

    assert exported(done.stdout, "steps_skipped_total")['reason="non_finite_loss"'] == 1
    dropped = exported(done.stdout, "device_contributions_dropped_total")
    assert dropped == {'task="digits"': 1, 'task="distance"': 1}
    assert set(exported(done.stdout, "checkpoint_duration_seconds_count")) == {'phase="stall"', 'phase="total"'}
    assert exported(done.stdout, "checkpoint_last_timestamp_seconds")[""] == pytest.approx(time.time(), abs=300)
    rates = exported(done.stdout, "learning_rate")
    assert rates.keys() == {'group="controllers"', 'group="network"'}


def test_a_run_with_experts_tells_of_them(light_recipe: dict[str, Any], tmp_path: Path) -> None:
    moe = {"mlp_experts": 6, "mlp_top_k": 2, "attention_experts": 0, "mutual_information": 0.1}
    options = {"embed_dim": 48, "depth": 2, "num_heads": 3}
    light_recipe["backbone"] = {"name": "vit_tiny_patch16_224", "options": options, "units": 1, "moe": moe}
    light_recipe |= {"steps": 2, "log_every": 1}
    command = [sys.executable, "-c", RUN, str(write_recipe(light_recipe, tmp_path))]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    loads_of = re.findall(
        r'^gppf_ds_expert_utilization_ratio\{expert="(\d)",layer="(.+?)",task="(\w+)"\} (\S+)$', done.stdout, re.M
    )
    tasks = {task for _, _, task, _ in loads_of}
    assert {expert for expert, *_ in loads_of} == set("012345")
    for task in tasks:
        loads = [float(load) for _, _, own, load in loads_of if own == task]
        assert sum(loads) == pytest.approx(6, abs=0.01) or not any(loads)
    assert re.search(r'^gppf_ds_dead_expert_ratio\{layer="', done.stdout, re.M)
    assert re.search(r'^gppf_ds_parameter_users\{group="expert/', done.stdout, re.M)
