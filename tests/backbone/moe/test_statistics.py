"""The mutual-information loss: its identities, its bounds, and its gradient under the task average."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gppf_ds.backbone.moe.router import Router
from gppf_ds.backbone.moe.statistics import entropy, keep_running, losses, mutual_information, routing_of, running_rows
from gppf_ds.config import MoeConfig

torch.set_num_threads(1)

TASKS, EXPERTS = ["a", "b", "c"], 4
CONFIG = MoeConfig(mlp_experts=EXPERTS, mlp_top_k=2, mutual_information=0.3, momentum=0.9)


def layer_of(tasks: list[str] = TASKS) -> Any:
    """What the losses need of an MoE layer."""
    torch.manual_seed(1)
    holder = nn.Module()
    holder.routers = nn.ModuleDict({task: Router(6, range(EXPERTS)) for task in tasks})
    holder.count = EXPERTS
    for router in holder.routers.values():
        router.weight.data *= 30
    return holder


def statistics(layer: Any, task: str, tokens: Tensor) -> Tensor:
    logs = layer.routers[task](tokens)
    chosen = nn.functional.one_hot(logs.topk(2).indices, EXPERTS).sum((0, 1)).float()
    return torch.stack([logs.exp().sum(0), chosen, (logs.exp() * logs).sum(0)])


def test_it_is_the_information_between_task_and_expert() -> None:
    rows = torch.rand(3, 5).double()
    rows /= rows.sum(-1, keepdim=True)
    joint = rows / 3
    wanted = (joint * (joint / (joint.sum(0) * joint.sum(1, keepdim=True))).log()).sum()
    torch.testing.assert_close(mutual_information(rows), wanted)
    torch.testing.assert_close(wanted, entropy(joint.sum(0)) - entropy(rows).mean())
    assert 0 < float(wanted) < math.log(3)


@pytest.mark.parametrize(("tasks", "experts"), [(2, 4), (4, 2)])
def test_its_bounds(tasks: int, experts: int) -> None:
    uniform = torch.full((tasks, experts), 1 / experts, requires_grad=True)
    value = mutual_information(uniform)
    value.backward()
    assert float(value.detach()) == pytest.approx(0, abs=1e-6)
    # Along any direction that keeps the sums of the rows.
    assert float((uniform.grad - uniform.grad.mean(-1, keepdim=True)).abs().max()) < 1e-6
    apart = nn.functional.one_hot(torch.arange(tasks) % experts, experts).float()
    assert float(mutual_information(apart)) == pytest.approx(math.log(min(tasks, experts)), abs=1e-6)


def test_a_task_that_never_ran_does_not_count() -> None:
    rows = torch.tensor([[0.9, 0.1], [0.2, 0.8]])
    torch.testing.assert_close(mutual_information(torch.cat([rows, torch.zeros(1, 2)])), mutual_information(rows))


def test_the_task_average_gives_every_router_its_exact_gradient() -> None:
    """Two devices run a, one runs b, with other numbers of tokens; c ran before."""
    layer, layers = layer_of(), {}
    layers["1.mlp"] = layer
    tokens = {"a0": torch.randn(7, 6), "a1": torch.randn(40, 6), "b0": torch.randn(3, 6), "c0": torch.randn(5, 6)}
    routing_of(layers, TASKS, [("c", {"1.mlp": statistics(layer, "c", tokens["c0"]).detach()})], CONFIG)
    before = running_rows(layer, TASKS).clone()

    rows = [layer.routers["a"](torch.cat([tokens["a0"], tokens["a1"]])).exp().mean(0)]
    rows += [layer.routers["b"](tokens["b0"]).exp().mean(0), before[2]]
    wanted = torch.autograd.grad(-0.3 * mutual_information(torch.stack(rows)), [layer.routers[t].weight for t in "ab"])

    own = [(name[0], {"1.mlp": statistics(layer, name[0], tokens[name])}) for name in ("a0", "a1", "b0")]
    routing = routing_of(layers, TASKS, own, CONFIG)
    routing.loss.backward()
    for task, devices, exact in (("a", 2, wanted[0]), ("b", 1, wanted[1])):
        torch.testing.assert_close(layer.routers[task].weight.grad / devices, exact)
    assert layer.routers["c"].weight.grad is None
    torch.testing.assert_close(routing.loss.detach(), -0.3 * mutual_information(torch.stack(rows)).detach())
    assert routing.users["1.mlp"].shape == (3, EXPERTS)
    assert routing.users["1.mlp"][0].max() == 2
    assert not routing.users["1.mlp"][2].any()


def test_running_rows_start_with_the_first_and_move_with_the_momentum() -> None:
    layer = layer_of(["a", "b"])
    first, second = torch.rand(2, 3, EXPERTS)
    for one in (first, second):
        keep_running(layer, ["a", "b"], torch.stack([one, torch.zeros(3, EXPERTS)]), 0.9)
    wanted = 0.9 * first[0] / first[0].sum() + 0.1 * second[0] / second[0].sum()
    torch.testing.assert_close(layer.routers["a"].probability, wanted)
    torch.testing.assert_close(layer.routers["a"].usage.sum(), torch.tensor(1.0))
    assert layer.routers["a"].updates == 2
    assert layer.routers["b"].updates == 0
    assert not layer.routers["b"].probability.any()


def test_token_level_information_and_concentration() -> None:
    layer = layer_of(["a"])
    tokens = torch.randn(9, 6)
    probabilities = layer.routers["a"](tokens).exp()
    mean = probabilities.mean(0)
    sums = statistics(layer, "a", tokens)[None]
    for name, wanted in (
        ("token_mutual_information", entropy(probabilities).mean() - entropy(mean)),
        ("concentration", entropy(mean)),
    ):
        config = MoeConfig(mlp_experts=EXPERTS, mlp_top_k=2, mutual_information=0.0, **{name: 0.5})
        torch.testing.assert_close(losses(sums, torch.zeros(1, EXPERTS), config), 0.5 * wanted)


def test_no_device_of_this_rank() -> None:
    layer = layer_of()
    routing = routing_of({"1.mlp": layer}, TASKS, [], CONFIG)
    assert float(routing.loss) == 0
    assert not routing.users["1.mlp"].any()
