"""Temperature, Gumbel-softmax routes and their gradients (GPPF equation 1, appendix D.1)."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gppf_ds.backbone.controller import Controller, temperature
from gppf_ds.config import ControllerConfig
from gppf_ds.errors import UserError

torch.set_num_threads(1)


@pytest.mark.parametrize(
    ("step", "tau"),
    [(0, 5.0), (100_000, 3.891), (200_000, 2.782), (400_000, 0.564), (450_000, 0.01), (499_999, 0.01)],
)
def test_temperature_of_the_paper(step, tau):
    assert temperature(step, 500_000, ControllerConfig(decay_share=0.9)) == pytest.approx(tau, abs=5e-4)


@given(st.integers(0, 10**6), st.integers(1, 10**6), st.floats(0.01, 1))
def test_temperature_stays_in_its_range_and_never_rises(step, steps, share):
    config = ControllerConfig(decay_share=share)
    now, later = temperature(step, steps, config), temperature(step + 1, steps, config)
    assert 0.01 - 1e-12 <= later <= now <= 5.0


@pytest.mark.parametrize("bad", [{"temperature_end": 0.0}, {"temperature_start": 0.001}, {"decay_share": 0.0}])
def test_impossible_temperatures_are_refused(bad):
    with pytest.raises(UserError, match=r"controller\."):
        ControllerConfig(**bad)


def make(units: list[int], seed: int = 0) -> Controller:
    controller = Controller(["a", "b"], units)
    torch.manual_seed(seed)
    with torch.no_grad():
        for row in controller.logits.values():
            row.normal_()
    return controller


def test_every_unit_is_equally_likely_at_the_start():
    probabilities = Controller(["a"], [2, 1, 3]).probabilities("a")
    wanted = torch.tensor([[1 / 2, 1 / 2, 0], [1, 0, 0], [1 / 3, 1 / 3, 1 / 3]])
    torch.testing.assert_close(probabilities, wanted)
    # The paper's numbers: (T, L, N) logits.
    assert sum(p.numel() for p in Controller(["a"] * 1 + ["b"], [2] * 17).parameters()) == 2 * 17 * 2


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 100), st.integers(0, 10**6), st.floats(0.01, 5.0))
def test_soft_route_is_equation_one(seed, step, tau):
    controller = make([3, 3], seed)
    noise = controller.noise(seed, step, 0)
    route = controller.soft_route("a", noise, tau)
    p = torch.softmax(controller.logits["a"].double(), -1)
    torch.testing.assert_close(
        route.weights.double(), torch.softmax((p.log() + noise.double()) / tau, -1), rtol=1e-3, atol=1e-5
    )
    assert route.path is None
    torch.testing.assert_close(route.weights.sum(-1), torch.ones(2))
    assert controller.hard_path("a", noise) == tuple(route.weights.argmax(-1).tolist())


def test_hard_choices_follow_the_softmax():
    controller, draws = make([2, 3, 1], 3), 6000
    counts = torch.zeros(3, 3)
    for step in range(draws):
        for layer, unit in enumerate(controller.hard_path("a", controller.noise(1, step, 2))):
            counts[layer, unit] += 1
    p = controller.probabilities("a").detach()
    sigma = (draws * p * (1 - p)).sqrt()
    assert ((counts - draws * p).abs() <= 3 * sigma + 1e-3).all()


def test_gumbel_noise_has_the_right_distribution():
    controller = Controller(["a"], [4] * 8)
    noise = torch.stack([controller.noise(0, step, 0) for step in range(1000)]).double().flatten()
    assert noise.mean() == pytest.approx(0.5772, abs=0.03)
    assert noise.var() == pytest.approx(torch.pi**2 / 6, abs=0.06)
    for quantile in (-1.0, 0.0, 2.0):
        wanted = torch.exp(-torch.exp(torch.tensor(-quantile)))
        assert (noise < quantile).double().mean() == pytest.approx(float(wanted), abs=0.01)


def test_noise_is_a_function_of_seed_step_and_device():
    controller, other = make([2, 2]), make([2, 2], 5)
    assert torch.equal(controller.noise(1, 2, 3), other.noise(1, 2, 3))
    keys = [(1, 2, 3), (2, 2, 3), (1, 3, 3), (1, 2, 4), (1, 3, 2), (2, 1, 3), (0, 0, 0), (0, 0, 1), (0, 1, 0)]
    assert len({controller.noise(*key).numpy().tobytes() for key in keys}) == len(keys)


def test_noise_does_not_touch_the_global_generators():
    controller = make([2])
    before, drawn = torch.get_rng_state(), np.random.get_state()[1].copy()
    controller.noise(0, 0, 0)
    assert torch.equal(torch.get_rng_state(), before)
    assert np.array_equal(np.random.get_state()[1], drawn)


@pytest.mark.parametrize("tau", [5.0, 0.01])
def test_units_that_do_not_exist_are_never_chosen(tau):
    controller = make([1, 3, 2], 1)
    for step in range(300):
        noise = controller.noise(0, step, 0)
        soft, hard = controller.soft_route("a", noise, tau), controller.hard_route("a", noise, tau)
        assert all(unit < count for unit, count in zip(hard.path, [1, 3, 2], strict=True))
        for route in (soft, hard):
            assert torch.isfinite(route.weights).all()
        assert soft.weights[0].tolist() == [1.0, 0.0, 0.0]
        assert soft.weights[2, 2] == 0
    assert all(unit < count for unit, count in zip(controller.path("a"), [1, 3, 2], strict=True))


@pytest.mark.parametrize("tau", [5.0, 0.5])
def test_straight_through(tau):
    """Forward exactly 1; the gradient is that of u, the soft weight of the chosen unit."""
    controller = make([2, 3], 2)
    noise = controller.noise(0, 0, 0)
    hard = controller.hard_route("a", noise, tau)
    assert torch.equal(hard.weights.detach(), torch.ones(2, 3))
    hard.weights[1, hard.path[1]].backward()
    got = controller.logits["a"].grad.clone()
    controller.logits["a"].grad = None
    controller.soft_route("a", noise, tau).weights[1, hard.path[1]].backward()
    torch.testing.assert_close(got, controller.logits["a"].grad)
    assert (got[1] != 0).all()
    assert (got[0] == 0).all()
    assert torch.isfinite(got).all()
    assert controller.logits["b"].grad is None


def test_evaluation_takes_the_most_likely_unit():
    controller = Controller(["a"], [2, 3])
    with torch.no_grad():
        controller.logits["a"].copy_(torch.tensor([[0.0, 1.0, 9.0], [3.0, 1.0, 2.0]]))
    assert controller.path("a") == (1, 0)
