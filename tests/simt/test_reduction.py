"""Which gradients travel together, and when: the ranks must not differ in it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from gppf_ds.simt.reduction import LayerwiseReduction, split_into_parts
from gppf_ds.simt.usage import Owner, owner_of

SIZES = {
    "heads.bank.a.w": 3,
    "heads.bank.b.w": 100,
    "backbone.layers.0.units.0.w": 1,
    "backbone.layers.1.units.0.w": 10,
    "backbone.layers.1.units.1.w": 20,
    "backbone.layers.2.units.0.w": 30,
}
LAYERS = 3
COUNTS: dict[Owner, int] = {("task", "a"): 2, ("task", "b"): 0, ("unit", "1", "1"): 0}


class Work:
    def wait(self) -> None:
        """Of a message that has arrived."""


def reduction(bucket_values: int) -> LayerwiseReduction:
    parameters = {name: nn.Parameter(torch.zeros(size)) for name, size in SIZES.items()}
    named = [(name, p, owner_of(name)) for name, p in parameters.items()]
    rows = [(nn.Parameter(torch.zeros(2)), ("task", "a")), (nn.Parameter(torch.zeros(2)), ("task", "b"))]
    sizes = {p: p.numel() for p in parameters.values()}
    return LayerwiseReduction(split_into_parts(named, rows, LAYERS, lambda _: None), sizes, 4 * bucket_values)


@pytest.mark.parametrize(
    ("bucket_values", "at_layers"),
    [
        (0, {2: [3 + 30], 1: [10], 0: []}),  # the hook of a layer runs when all above it are done, the heads first
        (34, {2: [], 1: [3 + 30 + 10], 0: []}),
        (10**6, {2: [], 1: [], 0: []}),
    ],
)
def test_small_layers_wait_for_the_next(
    monkeypatch: pytest.MonkeyPatch, bucket_values: int, at_layers: dict[int, list[int]]
) -> None:
    sent: list[int] = []

    def all_reduce(flat: Tensor, **_: Any) -> Work:
        sent.append(flat.numel())
        return Work()

    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    monkeypatch.setattr(dist, "get_world_size", lambda peers: 2)
    made = reduction(bucket_values)
    counts = dict.fromkeys((owner_of(name) for name in SIZES), 2) | COUNTS
    for _ in range(2):  # every step alike
        made.begin(counts, 1.0, strict=True)
        for layer in reversed(range(LAYERS)):
            before = len(sent)
            made.backward_reached(layer)
            assert sent[before:] == at_layers[layer]
        made.finish()
        assert sum(sent) == 3 + 30 + 10 + 1 + 2  # what nobody uses is not sent: a head, a unit, a row
        sent.clear()


@pytest.mark.parametrize(
    ("alone_values", "messages"),
    [(10**6, [3 + 100 + 1 + 10 + 20 + 30 + 2 + 2]), (20, [3 + 1 + 10 + 2 + 2, 100, 30, 20])],
)
def test_gradients_stay_where_they_are_found_and_hold_the_sum(
    monkeypatch: pytest.MonkeyPatch, alone_values: int, messages: list[int]
) -> None:
    sent: list[int] = []
    monkeypatch.setattr(dist, "all_reduce", lambda flat, **_: (sent.append(flat.mul_(2).numel()), Work())[1])
    monkeypatch.setattr(dist, "get_world_size", lambda peers: 2)
    made = reduction(0)
    made.alone_bytes = 4 * alone_values
    parameters = [p for part in made.parts for group in part.values() for p, _ in group]
    for number, parameter in enumerate(parameters):
        parameter.grad = torch.full_like(parameter, float(number))
    held = [parameter.grad for parameter in parameters]
    made.begin(dict.fromkeys((owner_of(name) for name in SIZES), 4), 1.0, strict=True)
    made.finish()
    assert sent == messages
    for number, (parameter, gradient) in enumerate(zip(parameters, held, strict=True)):
        assert parameter.grad is gradient
        assert torch.equal(gradient, torch.full_like(parameter, number * 2 / 4))


def test_a_gradient_that_travels_alone_is_sent_in_the_order_of_its_values(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[Tensor] = []
    monkeypatch.setattr(dist, "all_reduce", lambda flat, **_: (sent.append(flat), Work())[1])
    monkeypatch.setattr(dist, "get_world_size", lambda peers: 2)
    parameter = nn.Parameter(torch.zeros(3, 4))
    owner: Owner = ("task", "a")
    made = LayerwiseReduction([{None: [(parameter, owner)]}], {parameter: 12})
    made.alone_bytes = 1
    values = torch.arange(12.0).view(3, 4)
    parameter.grad = values.t().contiguous().t()  # as a rank may hold it whose products came out transposed
    made.begin({owner: 1}, 1.0, strict=True)
    made.finish()
    assert sent[0].is_contiguous()
    sent[0].mul_(2)
    assert torch.equal(parameter.grad, 2 * values)
