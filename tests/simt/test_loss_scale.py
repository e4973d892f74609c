"""The loss scale against the rule of torch's GradScaler, its reference."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gppf_ds.simt import loss_scale
from gppf_ds.simt.loss_scale import LossScale

torch.set_num_threads(1)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.booleans(), max_size=40))
def test_it_goes_as_torchs_scaler(overflows: list[bool]) -> None:
    patience, loss_scale.PATIENCE = loss_scale.PATIENCE, 3
    try:
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40, growth_interval=3)
        parameter = torch.nn.Parameter(torch.zeros(1))
        optimizer = torch.optim.SGD([parameter], lr=0.0)
        ours = LossScale(2.0**40)
        for overflow in overflows:
            scaler.scale(parameter.sum()).backward()
            parameter.grad = torch.full((1,), float("inf") if overflow else 1.0)
            scaler.step(optimizer)
            scaler.update()
            ours.update(overflow)
            assert ours.value == scaler.get_scale()
    finally:
        loss_scale.PATIENCE = patience


def test_it_starts_as_torchs_scaler() -> None:
    theirs = torch.amp.GradScaler("cpu")
    assert LossScale().value == theirs.state_dict()["scale"]
    assert theirs.get_growth_interval() == loss_scale.PATIENCE


def test_it_stays_above_one() -> None:
    ours = LossScale(2.0)
    for _ in range(3):
        ours.update(overflow=True)
    assert ours.value == 1.0
