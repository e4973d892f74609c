"""gppf-ds plan: the arithmetic of the simulation with told costs, the proposals, and a measurement that is complete."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from conftest import write_recipe
from distributed.ranks import environment

from gppf_ds import shipped_configs
from gppf_ds.cli import main
from gppf_ds.config import RunConfig, ScheduleConfig
from gppf_ds.errors import UserError
from gppf_ds.simt.schedule import Schedule
from gppf_ds.tasks.classification import Classification
from gppf_ds.train import cost_file, measure, rebalance, recipe
from gppf_ds.train.plan import foresee, official_sizes, report
from gppf_ds.train.simulation import Cost, Costs, Layout, Tasks, simulate

# GPPF appendix D.1, and seconds of a device by estimate.
WEIGHTS = {"in21k": 4.0, "coco": 2.5, "lvis": 2.5, "o365": 4.0, "oi": 4.0, "ade": 1.0, "stuff": 2.0, "voc": 1.0}
BATCHES = {"in21k": 96, "coco": 8, "lvis": 8, "o365": 12, "oi": 12, "ade": 8, "stuff": 8, "voc": 8}
SECONDS = {"in21k": 0.27, "coco": 1.03, "lvis": 1.03, "o365": 1.55, "oi": 1.55, "ade": 0.3, "stuff": 0.3, "voc": 0.3}


def cost(*seconds: float, batch_size: int = 4, memory: float = 0.0) -> Cost:
    return Cost(batch_size, seconds, (0.0,) * len(seconds), memory)


def fixed(*tasks: int) -> Tasks:
    return lambda step: np.array(tasks)


def paper(memory: float = 0.0, capacity: float | None = None) -> Costs:
    costs = {name: cost(s, batch_size=BATCHES[name], memory=memory) for name, s in SECONDS.items()}
    return Costs(costs, capacity=capacity)


def of_the_paper(settings: ScheduleConfig, layout: Layout) -> Tasks:
    schedule = Schedule.from_weights(WEIGHTS, settings, 0, layout.per_rank, layout.groups)
    return lambda step: schedule(step, layout.devices)


def test_a_step_is_as_long_as_its_slowest_rank_in_every_phase() -> None:
    costs = Costs({"a": cost(1.0, 5.0), "b": cost(3.0, 1.0)}, seconds=0.5, memory=7.0)
    found = simulate(fixed(0, 1), costs, Layout(2, 1, 1), range(3))
    assert found.step_seconds == pytest.approx(3 + 5 + 0.5)
    assert found.busy == pytest.approx((2 + 3 + 0.5) / 8.5)
    assert found.devices == {"a": 1.0, "b": 1.0}
    assert found.memory == 7.0


def test_a_ranks_devices_add_up_and_groups_follow_each_other() -> None:
    costs = Costs({"a": cost(1.0, memory=10.0), "b": cost(3.0, memory=1.0)}, seconds=0.5, group_seconds=0.25)
    # Device (group, rank, place): group 0 has ranks (a, a) and (b, b), group 1 (a, b) and (a, b).
    found = simulate(fixed(0, 0, 1, 1, 0, 1, 0, 1), costs, Layout(2, 2, 2), range(2))
    assert found.step_seconds == pytest.approx(6 + 4 + 0.5 + 2 * 0.25)
    assert found.busy == pytest.approx((4 + 4 + 1) / (10 + 1))
    assert found.memory == 20.0


def test_present_is_the_share_of_steps_with_the_task() -> None:
    found = simulate(
        lambda step: np.array([step % 2, 1]), Costs({"a": cost(1.0), "b": cost(1.0)}), Layout(2, 1, 1), range(4)
    )
    assert found.present == {"a": 0.5, "b": 1.0}
    assert found.devices == {"a": 0.5, "b": 1.5}
    assert found.images("b") == 6.0


def test_a_batch_of_another_size_has_the_same_start() -> None:
    found = Cost(8, (1.0, 0.4), (0.2, 0.4), 80.0).at(4)
    assert found.seconds == pytest.approx((0.6, 0.4))
    assert (found.batch_size, found.memory) == (4, 40.0)
    assert found.at(8).seconds == pytest.approx((1.0, 0.4))


def test_what_two_devices_spend_once_is_no_devices_own() -> None:
    shared = measure._shared(cost(1.0, 0.5, 0.2), cost(1.6, 1.1, 0.0))
    assert shared == pytest.approx((0.4, 0.0, 0.2))  # the last two as far as noise may take them
    whole = Cost(4, (2.0, 1.0, 0.1), (0.3, 0.9, 0.1), 50.0)
    own = measure._own(whole, shared, 10.0)
    assert own.seconds == pytest.approx((1.6, 1.0, 0.0))
    assert own.start == pytest.approx((0.3, 0.9, 0.0))
    assert own.memory == 40.0
    assert measure._own(whole, [], 0.0) == whole


def test_independent_draws_in_the_papers_setting_are_busy_for_61_percent() -> None:
    layout = Layout(56, 1, 1)
    found = simulate(of_the_paper(ScheduleConfig(), layout), paper(), layout, range(300))
    assert found.step_seconds == pytest.approx(1.55)
    assert found.busy == pytest.approx(0.61, abs=0.01)


def test_the_proposal_for_the_paper_is_busy_for_90_percent_and_nobody_sees_less() -> None:
    layout = Layout(56, 1, 1)
    before = simulate(of_the_paper(ScheduleConfig(), layout), paper(), layout, range(100))
    proposals = rebalance.propose(paper(), layout, of_the_paper, range(100))
    best = rebalance.choose(proposals, 0.9)
    assert best.forecast.busy > 0.9
    assert best.forecast.step_seconds < 0.7 * before.step_seconds
    total = sum(WEIGHTS.values())
    for proposal in proposals:
        for name, weight in WEIGHTS.items():
            images = proposal.layout.devices * weight / total * proposal.forecast.batch_sizes[name]
            assert images >= 56 * weight / total * BATCHES[name]
    filled = [p for p in proposals if p.filled]
    assert all(p.forecast.busy > 0.95 for p in filled)
    assert filled[0].forecast.step_seconds == pytest.approx(before.step_seconds)


def test_proposals_stay_within_the_memory() -> None:
    layout = Layout(56, 1, 1)
    proposals = rebalance.propose(paper(memory=10.0, capacity=11.0), layout, of_the_paper, range(10))
    assert [p.fits for p in proposals if p.layout.per_rank == 1] == [True, False]
    assert rebalance.choose(proposals, 0.9).forecast.memory <= 11.0
    with pytest.raises(UserError, match="no proposal fits"):
        rebalance.choose(rebalance.propose(paper(10.0, 5.0), layout, of_the_paper, range(10)), 0.9)


def test_small_batches_are_not_divided() -> None:
    costs = Costs({"a": cost(1.0, batch_size=2), "b": cost(3.0, batch_size=8)})

    def schedules(settings: ScheduleConfig, layout: Layout) -> Tasks:
        return lambda step: np.arange(layout.devices) % 2

    proposals = rebalance.propose(costs, Layout(2, 1, 1), schedules, range(1))
    assert [(p.layout.per_rank, p.forecast.batch_sizes) for p in proposals] == [
        (1, {"a": 2, "b": 8}),
        (1, {"a": 6, "b": 8}),
    ]


def test_the_table_of_tasks() -> None:
    tasks = {
        "a": Classification("x", batch_size=4, weight=3.0, loss_weight=0.5),
        "b": Classification("x", batch_size=2),
    }
    config = RunConfig(output="run", steps=100, schedule=ScheduleConfig(kind="stratified"))
    costs = Costs({"a": cost(0.5), "b": cost(0.5, batch_size=2)})
    forecast, layout = foresee(config, tasks, costs, 4)
    assert layout == Layout(4, 1, 1)
    assert forecast.devices == {"a": 3.0, "b": 1.0}
    head, _, a, b, *_, finish = report(config, tasks, costs, forecast, {"a": 600}).splitlines()
    cells = {name: [cell.strip() for cell in line.split("|")] for name, line in (("head", head), ("a", a), ("b", b))}
    found = dict(zip(cells["head"], cells["a"], strict=True))
    # 12 images in each of 100 steps of half a second; a learning rate of 0.02, three quarters of it, half of the loss.
    assert found["images/day"] == f"{12 * 2 * 86400:,}"
    assert found["epochs"] == "2.00"
    assert found["rate shared"] == "7.50e-03"
    assert found["rate own"] == "1.00e-02"
    assert dict(zip(cells["head"], cells["b"], strict=True))["epochs"] == "?"
    assert "100 steps take 0:00:50" in finish


def test_official_sizes_of_public_sets() -> None:
    run = recipe.read(["--config", str(shipped_configs() / "recipes" / "gppf15m_r50.yaml")])
    found = official_sizes({**run.tasks, "own": Classification("x", batch_size=1)})
    assert list(found) == list(run.tasks)
    assert (found["coco"], found["voc2012aug"]) == (118_287, 10_582)


def test_cost_files_come_back_as_they_were(tmp_path: Path) -> None:
    costs = Costs({"a": Cost(8, (0.5, 0.25), (0.1, 0.0), 1e9)}, 0.125, 2e9, 8e10)
    cost_file.write(tmp_path / "costs.yaml", costs)
    assert cost_file.read(tmp_path / "costs.yaml", {"a": 8}) == costs
    assert cost_file.read(tmp_path / "costs.yaml", {"a": 4}).tasks["a"].seconds == pytest.approx((0.3, 0.125))


def test_cost_files_may_be_short(tmp_path: Path) -> None:
    (tmp_path / "costs.json").write_text('{"tasks": {"a": 0.5, "b": {"seconds": 1, "memory": 1e9}}}')
    found = cost_file.read(tmp_path / "costs.json", {"a": 8, "b": 2})
    assert found.tasks["a"] == Cost(8, (0.5,), (0.0,), 0.0)
    assert found.tasks["b"].memory == 1e9


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("tasks: [", "neither YAML nor json"),
        ("a: 1", "needs a key tasks"),
        ("tasks: {b: 1}", r"no tasks\.a"),
        ("tasks: {a: fast}", r"tasks\.a must be a mapping"),
        ("tasks: {a: {second: 1}}", "no key 'second'"),
        ("tasks: {a: {memory: 1}}", "needs seconds"),
        ("tasks: {a: 0}", "must be above 0"),
        ("tasks: {a: [1, -1]}", "must be a number from 0"),
        ("tasks: {a: {seconds: 1, start: 2}}", r"tasks\.a\.start"),
        ("tasks: {a: {seconds: 1, batch_size: 0}}", r"tasks\.a\.batch_size"),
        ("{tasks: {a: 1}, rank: {speed: 1}}", "no key 'speed'"),
    ],
)
def test_bad_cost_files_get_a_sentence(tmp_path: Path, text: str, sentence: str) -> None:
    (tmp_path / "costs.yaml").write_text(text)
    with pytest.raises(UserError, match=sentence) as error:
        cost_file.read(tmp_path / "costs.yaml", {"a": 4})
    assert "costs.yaml" in str(error.value)


@pytest.fixture
def told(tmp_path: Path) -> Path:
    (tmp_path / "costs.yaml").write_text("tasks: {digits: {seconds: 0.1}, distance: {seconds: [0.9]}}")
    return tmp_path / "costs.yaml"


@pytest.fixture
def plan(tmp_path: Path, told: Path, light_recipe: dict[str, Any]) -> Callable[..., int]:
    """The command with told costs on a recipe with these settings."""

    def call(settings: dict[str, Any], *arguments: str) -> int:
        file = write_recipe({**light_recipe, **settings}, tmp_path)
        return main(["plan", str(file), "--devices", "4", "--costs", str(told), *arguments])

    return call


def test_plan_writes_a_short_recipe_that_inherits(
    tmp_path: Path, plan: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "below" / "balanced.yaml"
    assert plan({}, "--balance", str(out)) == 0
    printed = capsys.readouterr().out
    assert "taken" in printed
    assert "busy" in printed
    content = yaml.safe_load(out.read_text())
    assert content["inherit"] == "../recipe.yaml"
    assert set(content) <= {"inherit", "output", "engine", "schedule", "tasks"}
    before, after = (recipe.read(["--config", str(path)]) for path in (tmp_path / "recipe.yaml", out))
    assert after.config.schedule.kind == "balanced"
    assert after.config.optimizer == before.config.optimizer
    assert after.config.steps == before.config.steps
    assert after.config.output != before.config.output
    devices = after.config.engine.devices_per_rank
    for name, task in before.tasks.items():
        assert after.tasks[name].weight == task.weight
        assert devices * after.tasks[name].batch_size >= task.batch_size


def test_plan_takes_overrides_of_the_recipe(plan: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    assert plan({}, "--engine.devices_per_rank", "3") == 0
    assert "4 ranks x 3 devices" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("settings", "arguments", "sentence"),
    [
        ({"schedule": {"kind": "per_batch"}}, ["--balance", "new.yaml"], "schedule.kind per_batch"),
        ({}, ["--balance", "new.yaml", "--steps", "5"], "put --steps into that"),
        ({}, ["--balance", "costs.yaml"], "is there already"),
        ({}, ["--devices", "0"], "--devices must be at least 1"),
    ],
)
def test_plan_says_what_it_cannot_do(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    plan: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
    settings: dict[str, Any],
    arguments: list[str],
    sentence: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert plan(settings, *arguments) == 2
    assert sentence in capsys.readouterr().err


def test_plan_measures_every_task(tmp_path: Path, light_recipe: dict[str, Any]) -> None:
    """In a process of its own; what is compared is what holds on any machine, however busy."""
    file = write_recipe({**light_recipe, "loader": {"workers": 0}}, tmp_path)
    saved = tmp_path / "costs.yaml"
    command = ["-m", "gppf_ds", "plan", str(file), "--devices", "2", "--save-costs", str(saved)]
    done = subprocess.run([sys.executable, *command], env=environment(), capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "measured on 1 rank" in done.stdout
    costs = cost_file.read(saved, {"digits": 4, "distance": 2})
    for measured in costs.tasks.values():
        assert len(measured.seconds) == 3
        assert all(0 <= start <= seconds < 60 for start, seconds in zip(measured.start, measured.seconds, strict=True))
        assert sum(measured.seconds) > 0
        assert measured.memory > 0
    assert costs.seconds > 0
    assert costs.group_seconds >= 0
    assert costs.memory > 0
    assert costs.capacity is None
