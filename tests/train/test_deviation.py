"""What counts as an error of the engine, and what is rounding."""

from __future__ import annotations

import math

import torch

from gppf_ds.simt.masked import Fragment
from gppf_ds.train.deviation import buffer_errors, relative, state_errors, update_errors

TOLERANCE = 1e-5


def stepped(name: str, gradients: dict[str, torch.Tensor], rate: float = 0.01):
    """Parameters before and after one step, and the optimizer."""
    torch.manual_seed(2)
    start = {n: torch.randn_like(g) for n, g in gradients.items()}
    named = {n: p.clone().requires_grad_() for n, p in start.items()}
    kind = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}[name]
    options = {"momentum": 0.9} if name == "sgd" else {}
    optimizer = kind(named.values(), lr=rate, **options)
    for n, parameter in named.items():
        parameter.grad = gradients[n].clone()
    optimizer.step()
    return start, named, optimizer


def gradients() -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    # The second one is 0 in exact arithmetic.
    return {"weight": torch.randn(50), "noise": 1e-8 * torch.randn(50)}


def both(name: str, factor: float, rate: float = 0.01) -> tuple[dict[str, float], dict[str, float]]:
    """Errors of state and of updates, of an engine whose gradients are ``factor`` times too large."""
    wrong = {n: g * factor for n, g in gradients().items()}
    wrong["noise"] = -wrong["noise"]  # another rounding
    _, got, engine = stepped(name, wrong, rate)
    start, wanted, optimizer = stepped(name, gradients(), rate)
    fragments = [Fragment(n, 0, p.detach(), dict(engine.state[p])) for n, p in got.items()]
    values = {n: p.detach() for n, p in got.items()}
    return state_errors(fragments, optimizer, wanted), update_errors(values, wanted, start, optimizer)


def test_another_rounding_is_no_error() -> None:
    for name in ("sgd", "adamw"):
        for errors in both(name, 1.0):
            assert max(errors.values()) < TOLERANCE, (name, errors)


def test_a_wrong_average_is_an_error_even_at_a_tiny_learning_rate() -> None:
    for name in ("sgd", "adamw"):
        state, _ = both(name, 1.01, rate=1e-6)
        assert max(state.values()) > 1e-3, name
    _, updates = both("sgd", 0.5, rate=1e-5)
    assert updates["weight"] > 10 * TOLERANCE


def test_state_that_only_one_side_has_is_an_error() -> None:
    _, wanted, optimizer = stepped("sgd", gradients())
    assert all(error == math.inf for error in state_errors([], optimizer, wanted).values())


def test_state_is_put_together_from_the_parts_of_all_ranks() -> None:
    _, named, optimizer = stepped("adamw", gradients())
    state = optimizer.state[named["weight"]]

    def part(start: int, end: int) -> Fragment:
        values = {kind: value if value.dim() == 0 else value[start:end] for kind, value in state.items()}
        return Fragment("weight", start, torch.zeros(end - start), values)

    whole = Fragment("noise", 0, torch.zeros(50), dict(optimizer.state[named["noise"]]))
    assert set(state_errors([part(20, 50), whole, part(0, 20)], optimizer, named).values()) == {0.0}


def test_buffers_and_single_values() -> None:
    wanted = {"a.running_mean": torch.tensor([1.0, 2.0]), "b.running_mean": torch.zeros(2)}
    got = {"a.running_mean": torch.tensor([1.0, 2.0]), "b.running_mean": torch.full((2,), 1e-7)}
    assert max(buffer_errors(got, wanted).values()) < 1e-6
    assert relative(torch.tensor(1.1), torch.tensor(1.0)) > 0.09
    assert math.isnan(relative(torch.tensor(math.nan), torch.tensor(1.0)))
