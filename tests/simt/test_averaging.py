"""The task average, with several ranks simulated one after another."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from gppf_ds.simt.averaging import scale_for_average

torch.set_num_threads(1)

A, B, ALL = ("task", "a"), ("task", "b"), ("all",)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.sampled_from("ab"), min_size=1, max_size=6), st.integers(0, 1000))
def test_the_sum_over_ranks_is_the_average_over_users(tasks, seed):
    """Each rank runs one task; the rule of GPPF section 3.2, written out."""
    generator = torch.Generator().manual_seed(seed)
    own = [{o: torch.randn(3, 2, generator=generator) for o in (ALL, ("task", task))} for task in tasks]
    counts = {ALL: len(tasks), A: tasks.count("a"), B: tasks.count("b")}
    reduced: dict = {}
    for gradients in own:
        parameters = [(nn.Parameter(torch.zeros(3, 2)), owner) for owner in (A, ALL, B)]
        for parameter, owner in parameters:
            if owner in gradients:
                parameter.grad = gradients[owner].clone()
        listed = scale_for_average(parameters, counts)
        used = [(p, o) for p, o in parameters if counts[o]]
        assert [g.shape for g in listed] == [(3, 2)] * len(used)
        assert all(g is p.grad for g, (p, _) in zip(listed, used, strict=True))
        for parameter, owner in parameters:
            if counts[owner] == 0:
                assert parameter.grad is None
            else:
                reduced[owner] = reduced.get(owner, 0) + parameter.grad
    for owner in (A, B, ALL):
        users = [g[owner] for g in own if owner in g]
        if users:
            torch.testing.assert_close(reduced[owner], sum(users) / len(users))
        else:
            assert owner not in reduced


def test_a_parameter_that_only_others_used_gets_zeros():
    parameter = nn.Parameter(torch.ones(2, 3))
    (gradient,) = scale_for_average([(parameter, A)], {A: 2})
    assert parameter.grad is gradient
    assert torch.equal(gradient, torch.zeros(2, 3))


def test_the_loss_scale_is_taken_away():
    parameter = nn.Parameter(torch.zeros(2))
    parameter.grad = torch.tensor([3.0, -1.5]) * 2.0**16
    (gradient,) = scale_for_average([(parameter, A)], {A: 3}, loss_scale=2.0**16)
    assert torch.equal(gradient, torch.tensor([1.0, -0.5]))


@pytest.mark.parametrize("devices", [1, 4, 49, 16_384])  # 49 * (1 / 49) is not 1
def test_backward_that_starts_from_the_mean_leaves_nothing_to_scale_for_what_all_use(devices):
    shared, head = (nn.Parameter(torch.zeros(2)) for _ in range(2))
    shared.grad, head.grad = (torch.tensor([3.0, -1.5]) / devices for _ in range(2))
    before, version = shared.grad.clone(), shared.grad._version
    scale_for_average([(shared, ALL), (head, A)], {ALL: devices, A: 3}, loss_scale=1 / devices)
    assert torch.equal(shared.grad, before)
    assert shared.grad._version == version  # nobody wrote into it
    torch.testing.assert_close(head.grad, torch.tensor([1.0, -0.5]))


def test_a_parameter_that_nobody_used_gets_none():
    parameter = nn.Parameter(torch.ones(2))
    parameter.grad = torch.zeros(2)
    assert scale_for_average([(parameter, A)], {A: 0}) == []
    assert parameter.grad is None


@pytest.mark.parametrize("value", [1e-30, float("nan")])
def test_a_gradient_where_nobody_uses_the_parameter_is_an_error(value):
    parameter = nn.Parameter(torch.ones(2))
    parameter.grad = torch.tensor([0.0, value])
    with pytest.raises(RuntimeError, match="no device uses it"):
        scale_for_average([(parameter, A)], {A: 0})
