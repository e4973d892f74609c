"""The files in launch/monitoring: what they name exists, promtool accepts them, and a real Prometheus answers them."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import write_recipe
from distributed.ranks import ROOT, environment, free_port

from gppf_ds.monitor.metrics import Metrics

MONITORING = ROOT / "launch/monitoring"
DASHBOARD = json.loads((MONITORING / "dashboard.json").read_text())
QUERIES = [target["expr"] for panel in DASHBOARD["panels"] for target in panel.get("targets", [])]
WITHOUT_DATA = ("expert",)
"""Queries with these words have nothing to say of a run without experts."""


def needs(program: str) -> str:
    path = shutil.which(program)
    if path is None:
        pytest.skip(f"{program} is not installed (Debian: prometheus)")
    return path


def configure(hostfile: str, port: int, folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    (folder / "hosts").write_text(hostfile)
    command = [sys.executable, str(MONITORING / "configure.py"), str(folder / "hosts"), "--port", str(port), *options]
    return subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=60, check=False)


def test_every_metric_that_is_asked_for_is_exported() -> None:
    exported = set()
    for family in Metrics({}).registry.collect():
        endings = {"counter": ["_total"], "info": ["_info"], "histogram": ["_bucket", "_sum", "_count"]}
        exported |= {family.name + ending for ending in endings.get(family.type, [""])}
    alerts = yaml.safe_load((MONITORING / "alerts.yml").read_text())["groups"][0]["rules"]
    asked = " ".join([*QUERIES, *(rule["expr"] for rule in alerts)]).replace('job="gppf_ds"', "")
    names = set(re.findall(r"gppf_ds_\w+", asked))
    assert names <= exported
    assert len(names) > 25


def test_the_configuration_has_a_target_for_every_rank(tmp_path: Path) -> None:
    done = configure("me@node-1 slots=2\nnode-2 slots=2\n", 9400, tmp_path)
    assert done.returncode == 0, done.stderr
    [job] = yaml.safe_load(done.stdout)["scrape_configs"]
    targets = {entry["targets"][0]: entry["labels"] for entry in job["static_configs"]}
    assert list(targets) == ["node-1:9400", "node-1:9401", "node-2:9400", "node-2:9401"]
    assert targets["node-2:9401"] == {"host": "node-2", "local_rank": "1"}

    done = configure("node-1 slot=2\n", 9400, tmp_path)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "line 1: 'node-1 slot=2' is not of the form" in done.stderr


def test_promtool_accepts_the_rules_and_the_configuration(tmp_path: Path) -> None:
    promtool = needs("promtool")
    (tmp_path / "prometheus.yml").write_text(configure("node-1 slots=2\n", 9400, tmp_path).stdout)
    for words in (["rules", str(MONITORING / "alerts.yml")], ["config", str(tmp_path / "prometheus.yml")]):
        done = subprocess.run([promtool, "check", *words], capture_output=True, text=True, timeout=30)
        assert done.returncode == 0, done.stdout + done.stderr


PARTS = 'gppf_ds_step_time_seconds_total{job="gppf_ds", part='
STEPS = 'gppf_ds_step_duration_seconds_count{job="gppf_ds"}'
CASES = {
    "GppfDsRankGone": (
        {'up{job="gppf_ds", host="a", local_rank="1"}': "1x5 0x10"},
        {"job": "gppf_ds", "host": "a", "local_rank": "1", "severity": "critical"},
    ),
    "GppfDsNoProgress": (
        {
            'gppf_ds_last_step_timestamp_seconds{job="gppf_ds"}': "1+0x15",
            'gppf_ds_step_duration_seconds_sum{job="gppf_ds"}': "10+0x15",
            'gppf_ds_step_duration_seconds_count{job="gppf_ds"}': "10+0x15",
        },
        {"job": "gppf_ds", "severity": "critical"},
    ),
    "GppfDsStepsSkipped": (
        {
            'gppf_ds_steps_skipped_total{job="gppf_ds", instance="a:1", reason="non_finite_loss"}': "0x3 0+6x15",
            'gppf_ds_step_duration_seconds_count{job="gppf_ds", instance="a:1"}': "0+60x15",
        },
        {"job": "gppf_ds", "severity": "warning"},
    ),
    "GppfDsContributionsDropped": (
        {'gppf_ds_device_contributions_dropped_total{job="gppf_ds", task="digits"}': "0x3 1x20"},
        {"job": "gppf_ds", "task": "digits", "severity": "warning"},
    ),
    "GppfDsTaskSilent": (
        {'gppf_ds_images_total{job="gppf_ds", task="digits"}': "8x200", STEPS: "0+10x200"},
        {"job": "gppf_ds", "task": "digits", "severity": "warning"},
    ),
    "GppfDsWaitsForData": (
        {PARTS + '"data_wait"}': "0+8x60", PARTS + '"compute"}': "0+52x60"},
        {"job": "gppf_ds", "severity": "warning"},
    ),
    "GppfDsStraggler": (
        {PARTS + '"straggler_wait"}': "0+20x60", PARTS + '"compute"}': "0+40x60"},
        {"job": "gppf_ds", "severity": "warning"},
    ),
    "GppfDsUnreadableSamples": (
        {'gppf_ds_unreadable_samples_total{job="gppf_ds", task="digits"}': "0x3 1x20"},
        {"job": "gppf_ds", "task": "digits", "severity": "warning"},
    ),
    "GppfDsCheckpointOld": (
        {'gppf_ds_checkpoint_last_timestamp_seconds{job="gppf_ds"}': "1x300"},
        {"job": "gppf_ds", "severity": "warning"},
    ),
    "GppfDsDeadExperts": (
        {'gppf_ds_dead_expert_ratio{job="gppf_ds", layer="3"}': "0.5x100"},
        {"job": "gppf_ds", "layer": "3", "severity": "warning"},
    ),
}
FIRES = {
    "GppfDsTaskSilent": "30m",
    "GppfDsWaitsForData": "20m",
    "GppfDsStraggler": "20m",
    "GppfDsCheckpointOld": "250m",
    "GppfDsDeadExperts": "70m",
}
"""When, for those that do not within 13 minutes."""


def test_every_alert_has_its_case() -> None:
    rules = yaml.safe_load((MONITORING / "alerts.yml").read_text())["groups"][0]["rules"]
    assert {rule["alert"] for rule in rules} == set(CASES)


@pytest.mark.parametrize("alert", CASES)
def test_alerts_fire_when_they_should(alert: str, tmp_path: Path) -> None:
    promtool = needs("promtool")
    series, labels = CASES[alert]
    case = {
        "rule_files": [str(MONITORING / "alerts.yml")],
        "evaluation_interval": "1m",
        "tests": [
            {
                "interval": "1m",
                "input_series": [{"series": name, "values": values} for name, values in series.items()],
                "alert_rule_test": [
                    {"eval_time": "1m", "alertname": alert, "exp_alerts": []},
                    {"eval_time": FIRES.get(alert, "13m"), "alertname": alert, "exp_alerts": [{"exp_labels": labels}]},
                ],
            }
        ],
    }
    rules = yaml.safe_load((MONITORING / "alerts.yml").read_text())
    for rule in rules["groups"][0]["rules"]:
        rule.pop("annotations")  # promtool would compare them too
    (tmp_path / "alerts.yml").write_text(yaml.safe_dump(rules))
    case["rule_files"] = [str(tmp_path / "alerts.yml")]
    (tmp_path / "case.yml").write_text(yaml.safe_dump(case))
    command = [promtool, "test", "rules", str(tmp_path / "case.yml")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture
def watched_run(light_recipe: dict[str, Any], tmp_path: Path) -> Iterator[int]:
    """A run of two ranks that goes on until the test is done; the port of its first exporter."""
    port = free_port()
    light_recipe |= {"steps": 100_000, "metrics_port": port, "evaluate_every": 0, "log_every": 2}
    light_recipe["checkpoint"] = {"every": 5}
    recipe = write_recipe(light_recipe, tmp_path)
    program = "from deepspeed.launcher.runner import main; main()"
    options = ["--num_accelerators", "2", "--master_port", str(free_port()), "--module", "gppf_ds", "train"]
    with (tmp_path / "log").open("wb") as log:
        command = [sys.executable, "-c", program, *options, "--config", str(recipe)]
        process = subprocess.Popen(command, env=environment(), stdout=log, stderr=log)
    lines = tmp_path / "run/metrics.jsonl"
    deadline = time.monotonic() + 120
    while not lines.is_file():
        assert process.poll() is None, (tmp_path / "log").read_text()
        assert time.monotonic() < deadline, "training did not begin"
        time.sleep(0.1)
    yield port
    (tmp_path / "run" / "stop").touch()  # a signal to the launcher would leave its ranks behind
    process.wait(timeout=60)
    assert json.loads(lines.read_text().splitlines()[-1])["split"].keys() == {
        "compute",
        "data_wait",
        "straggler_wait",
        "communication",
    }


@pytest.fixture
def server(watched_run: int, tmp_path: Path) -> Iterator[str]:
    """The address of a Prometheus that looks at the run every second."""
    prometheus = needs("prometheus")
    done = configure("127.0.0.1 slots=2\n", watched_run, tmp_path, "--interval", "1s")
    (tmp_path / "prometheus.yml").write_text(done.stdout)
    address = f"127.0.0.1:{free_port()}"
    options = [f"--config.file={tmp_path}/prometheus.yml", f"--storage.tsdb.path={tmp_path}/tsdb"]
    with (tmp_path / "prometheus.log").open("wb") as log:
        process = subprocess.Popen([prometheus, *options, f"--web.listen-address={address}"], stdout=log, stderr=log)
    yield f"http://{address}"
    process.terminate()
    process.wait(timeout=30)


def ask(server: str, query: str) -> list[dict[str, Any]]:
    url = f"{server}/api/v1/query?query={urllib.parse.quote(query)}"
    with urllib.request.urlopen(url, timeout=10) as answer:
        return json.loads(answer.read())["data"]["result"]


def test_a_real_prometheus_answers_every_query_of_the_dashboard(server: str, watched_run: int) -> None:
    deadline = time.monotonic() + 90
    while True:
        try:
            steps = ask(server, "min(increase(gppf_ds_step_duration_seconds_count[20s]))")
            if steps and float(steps[0]["value"][1]) > 12:
                break
        except OSError:
            pass  # it is starting
        assert time.monotonic() < deadline, "Prometheus saw no steps"
        time.sleep(0.5)
    empty = []
    for query in QUERIES:
        found = ask(server, query.replace("$__rate_interval", "15s").replace("$job", "gppf_ds"))
        if not found and not any(word in query for word in WITHOUT_DATA):
            empty.append(query)
    assert not empty

    split = {one["metric"]["part"]: float(one["value"][1]) for one in ask(server, "gppf_ds_step_time_seconds_total")}
    assert split.keys() == {"compute", "data_wait", "straggler_wait", "communication"}
    whole = ask(server, "sum(gppf_ds_step_time_seconds_total) / sum(gppf_ds_step_duration_seconds_sum)")
    assert float(whole[0]["value"][1]) == pytest.approx(1, abs=0.3)  # the parts come every two steps
    assert len(ask(server, 'up{job="gppf_ds"} == 1')) == 2
    [rules] = json.loads(urllib.request.urlopen(f"{server}/api/v1/rules", timeout=10).read())["data"]["groups"]
    assert all(rule["health"] != "err" for rule in rules["rules"])

    scraped = urllib.request.urlopen(f"http://127.0.0.1:{watched_run}/metrics", timeout=10).read()
    done = subprocess.run([needs("promtool"), "check", "metrics"], input=scraped, capture_output=True, timeout=30)
    assert done.returncode == 0, done.stdout + done.stderr
