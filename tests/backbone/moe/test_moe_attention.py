"""MoE-attention against its formula and against multi-query attention, with and without windows."""

from __future__ import annotations

from typing import Any

import one_by_one
import pytest
import torch
import torch.nn.functional as F

from gppf_ds.backbone.moe.attention import MoeAttention
from gppf_ds.backbone.moe.call import Call

torch.set_num_threads(1)

WIDTH, HEAD = 12, 8
ROUTERS = {"a": [0, 1, 2, 3, 4, 5], "b": [7, 2, 4]}


def make(**options: Any) -> Any:
    """A layer whose routers are far from undecided, in fp64."""
    torch.manual_seed(0)
    settings: dict[str, Any] = {"experts": range(8), "routers": ROUTERS, "top_k": {"a": 3, "b": 2}, **options}
    layer: Any = MoeAttention(WIDTH, HEAD, **settings)
    for router in layer.routers.values():
        torch.nn.init.normal_(router.weight)
    for name, parameter in layer.named_parameters():
        if "position_bias" in name:
            torch.nn.init.normal_(parameter)
    return layer.double()


def tokens(*shape: int) -> Any:
    torch.manual_seed(1)
    return torch.randn(*shape, WIDTH, dtype=torch.float64, requires_grad=True)


def test_all_heads_at_equal_gates_are_multi_query_attention() -> None:
    heads = 4
    layer = make(experts=range(heads), routers={"a": range(heads)}, top_k={"a": heads}).float()
    torch.nn.init.zeros_(layer.routers["a"].weight)
    x = tokens(2, 9).float()
    experts: list[Any] = list(layer.experts.values())
    queries = torch.stack([expert.query(x) for expert in experts], 1)
    keys, values = (part.unsqueeze(1).expand(-1, heads, -1, -1) for part in layer.key_value(x).chunk(2, -1))
    seen = F.scaled_dot_product_attention(queries, keys, values).transpose(1, 2).flatten(2)
    expected = F.linear(seen, torch.cat([expert.output.weight for expert in experts], 1))
    torch.testing.assert_close(heads * layer(x, Call("a")), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("task", ["a", "b"])
@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
@pytest.mark.parametrize(
    "options", [{}, {"gate_norm": "full", "key_value_bias": False}, {"window": (2, 3)}], ids=["plain", "full", "window"]
)
def test_output_and_every_gradient_are_those_of_the_formula(task: str, masked: bool, options: dict[str, Any]) -> None:
    layer, x = make(**options), tokens(4, 6)
    mask = torch.zeros(2, 6, 6, dtype=torch.float64)
    mask[1, :3, 3:] = mask[1, 3:, :3] = -100
    given = mask if masked else None
    ours = layer(x, Call(task), given)
    slow = one_by_one.attention(layer, x, task, given)
    torch.testing.assert_close(ours, slow)
    one_by_one.assert_same(one_by_one.gradients(layer, x, ours), one_by_one.gradients(layer, x, slow))


def test_experts_without_tokens_have_no_gradient() -> None:
    layer, call = make(window=(2, 3)), Call("b")
    layer(tokens(4, 6), call).sum().backward()
    counts = call.statistics[0][1].tolist()
    assert counts[0] == 0 < counts[7]
    for slot, count in enumerate(counts):
        for parameter in layer.experts[str(slot)].parameters():
            assert (parameter.grad is None) == (count == 0)


@pytest.mark.parametrize("window", [None, (2, 3)])
def test_padding_is_not_routed_but_a_key(window: tuple[int, int] | None) -> None:
    layer, x = make(window=window), tokens(4, 6)
    padding = torch.rand(4, 6) < 0.4
    call, plain = Call("a", padding), Call("a")
    y, expected = layer(x, call), layer(x, plain)
    torch.testing.assert_close(y, expected.masked_fill(padding[..., None], 0))
    assert call.statistics[0][1].sum() == 3 * (~padding).sum()
    alone = Call("a")
    layer.route(x[~padding], alone)
    torch.testing.assert_close(call.statistics[0], alone.statistics[0])


def test_k_may_change_at_run_time() -> None:
    layer, x = make(), tokens(2, 5)
    layer.top_k["a"] = 5
    torch.testing.assert_close(layer(x, Call("a")), one_by_one.attention(layer, x, "a"))


def test_new_experts_change_nothing_for_old_routers() -> None:
    old, x = make(window=(2, 3)), tokens(40, 6)
    top_k = {"a": 3, "b": 2, "c": 4}
    new = make(window=(2, 3), experts=[8, *range(8), 9], routers={**ROUTERS, "c": range(10)}, top_k=top_k)
    new.load_state_dict({**new.state_dict(), **old.state_dict()})
    for task in ROUTERS:
        assert torch.equal(old(x, Call(task)), new(x, Call(task)))


def test_two_runs_are_equal() -> None:
    runs = []
    for _ in range(2):
        layer, x = make(window=(2, 3)).float(), tokens(40, 6).detach().float().requires_grad_()
        y = layer(x, Call("a"))
        runs.append([y, *one_by_one.gradients(layer, x, y).values()])
    for one, other in zip(*runs, strict=True):
        assert (one is None and other is None) or torch.equal(one, other)


@pytest.mark.parametrize("window", [None, (2, 3)])
def test_bf16_autocast_routes_in_fp32(window: tuple[int, int] | None) -> None:
    layer, x = make(window=window).float(), tokens(8, 6).detach().float().requires_grad_()
    mask = torch.zeros(2, 6, 6)
    plain, mixed = Call("a"), Call("a")
    full = layer(x, plain, mask)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x, mixed, mask)
    assert y.dtype == torch.bfloat16
    assert torch.equal(plain.statistics[0], mixed.statistics[0])
    torch.testing.assert_close(y.float(), full, rtol=0.1, atol=0.05)
    one_by_one.assert_same(
        one_by_one.gradients(layer, x, y.float()), one_by_one.gradients(layer, x, full), rtol=0.1, atol=0.3
    )
