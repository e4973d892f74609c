"""The product's reference against the tests' own, which runs the blocks layer by layer without any lockstep."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from distributed import simt_case
from torch import nn

from gppf_ds.simt.reference import Reference, batch_norm, uses

torch.set_num_threads(1)

DEVICES = 4


@pytest.mark.parametrize(
    "case",
    [
        {"clip": 0.5, "accumulation": 2},
        {"routing": "hard", "optimizer": "adamw", "learning_rate": 0.001},
        {"failing": [[1, 0], [2, 0], [2, 1], [2, 2], [2, 3], [3, 1]]},
    ],
    ids=str,
)
def test_both_references_agree(case: dict[str, Any]) -> None:
    config, failing = simt_case.configuration(case), case.get("failing", [])
    model, controller, schedule = simt_case.build(config)
    reference = Reference(model, controller, config)
    span = DEVICES // config.engine.accumulation
    groups = [list(range(start, start + span)) for start in range(0, DEVICES, span)]
    wanted, wanted_controller, usage = simt_case.reference_run(config, DEVICES, groups, failing)
    for step in range(simt_case.STEPS):
        tasks = simt_case.tasks_of(schedule, step, DEVICES)
        batches = [simt_case.batch(step, d, task, [step, d] in failing) for d, task in enumerate(tasks)]
        _, users = reference.step(step, tasks, batches)
        assert {name: count > 0 for name, count in users.items()} == usage[step]
    for (name, got), value in zip(model.state_dict().items(), wanted.state_dict().values(), strict=True):
        torch.testing.assert_close(got, value, rtol=1e-4, atol=2e-6, msg=lambda text, name=name: f"{name}: {text}")
    for task, row in wanted_controller.logits.items():
        torch.testing.assert_close(controller.logits[task], row, rtol=1e-4, atol=2e-6)


def test_batch_norm_of_equal_shapes_is_torchs_on_the_joined_batch() -> None:
    norms = [nn.BatchNorm2d(3), nn.BatchNorm2d(3)]
    twin = nn.BatchNorm2d(3)
    one, two = torch.randn(2, 3, 4, 5), torch.randn(4, 3, 4, 5) + 2
    got = batch_norm(norms, [(1, one), (1, two)])
    torch.testing.assert_close(torch.cat(got), twin(torch.cat([one, two])))
    torch.testing.assert_close(norms[1].state_dict(), twin.state_dict())
    assert norms[0].num_batches_tracked == 0


@pytest.mark.parametrize(("weighting", "mean"), [("element", 4 * 1 / 6), ("device", 0.5), ("sample", 1 / 3)])
def test_weighting(weighting: Any, mean: float) -> None:
    """One device with 2 images of 1 element and value 0, one with 1 image of 4 elements and value 1."""
    norm = nn.BatchNorm2d(1, momentum=1.0)
    batch_norm([norm], [(0, torch.zeros(2, 1, 1, 1)), (0, torch.ones(1, 1, 2, 2))], weighting)
    assert float(norm.running_mean) == pytest.approx(mean)


def test_who_uses_a_parameter() -> None:
    unit, head = "backbone.layers.2.units.1.conv.weight", "heads.bank.depth.conv.weight"
    assert uses(unit, "depth", None)
    assert uses(unit, "depth", (0, 0, 1))
    assert not uses(unit, "depth", (1, 1, 0))
    assert uses(head, "depth", (0, 0, 0))
    assert not uses(head, "digits", (0, 0, 0))
