"""MoE-MLP against its formula, against dense MLPs, and against itself with more experts."""

from __future__ import annotations

from typing import Any

import one_by_one
import pytest
import torch
from timm.layers import Mlp

from gppf_ds.backbone.moe.call import Call
from gppf_ds.backbone.moe.mlp import MoeMlp
from gppf_ds.errors import UserError

torch.set_num_threads(1)

WIDTH, HIDDEN = 12, 8
ROUTERS = {"a": [0, 1, 2, 3, 4, 5], "b": [7, 2, 4]}
"""Expert 6 is nobody's."""


def make(**options: Any) -> Any:
    """A layer whose routers are far from undecided, in fp64."""
    torch.manual_seed(0)
    settings: dict[str, Any] = {"experts": range(8), "routers": ROUTERS, "top_k": {"a": 3, "b": 2}, **options}
    layer: Any = MoeMlp(WIDTH, HIDDEN, **settings)
    for router in layer.routers.values():
        torch.nn.init.normal_(router.weight)
    return layer.double()


def tokens(*shape: int) -> Any:
    torch.manual_seed(1)
    return torch.randn(*shape, WIDTH, dtype=torch.float64, requires_grad=True)


def dense(layer: Any, expert: str) -> Mlp:
    """timm's MLP with an expert's weights."""
    mlp = Mlp(WIDTH, layer.experts[expert].fc1.out_features).to(layer.experts[expert].fc1.weight.dtype)
    mlp.load_state_dict(layer.experts[expert].state_dict())
    return mlp


def test_one_expert_is_the_dense_mlp() -> None:
    layer = make(experts=[5], routers={"a": [5]}, top_k={"a": 1}).float()
    x = tokens(3, 7).float()
    torch.testing.assert_close(layer(x, Call("a")), dense(layer, "5")(x), rtol=0, atol=1e-6)


def test_equal_experts_are_the_dense_mlp_if_gates_are_renormalised() -> None:
    layer = make().float()
    for expert in layer.experts.values():
        expert.load_state_dict(layer.experts["0"].state_dict())
    x = tokens(3, 7).float()
    torch.testing.assert_close(layer(x, Call("a")), dense(layer, "0")(x), rtol=0, atol=1e-6)
    layer.gate_norm = "full"
    chosen = layer.routers["a"](x.flatten(0, 1)).exp().topk(3).values.sum(-1)
    expected = dense(layer, "0")(x) * chosen.view(3, 7, 1)
    torch.testing.assert_close(layer(x, Call("a")), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("task", ["a", "b"])
@pytest.mark.parametrize("options", [{}, {"gate_norm": "full"}, {"shared": 2}], ids=str)
def test_output_and_every_gradient_are_those_of_the_formula(task: str, options: dict[str, Any]) -> None:
    layer, x = make(**options), tokens(5, 4)
    ours = layer(x, Call(task))
    slow = one_by_one.mlp(layer, x.flatten(0, 1), task).view_as(x)
    torch.testing.assert_close(ours, slow)
    one_by_one.assert_same(one_by_one.gradients(layer, x, ours), one_by_one.gradients(layer, x, slow))


def test_experts_without_tokens_have_no_gradient() -> None:
    layer, x = make(), tokens(6)
    call = Call("b")
    layer(x, call).sum().backward()
    counts = call.statistics[0][1].tolist()
    assert counts[0] == 0 < counts[7]
    for slot, count in enumerate(counts):
        for parameter in layer.experts[str(slot)].parameters():
            assert (parameter.grad is None) == (count == 0)
    assert layer.routers["a"].weight.grad is None


def test_frozen_experts_pass_the_gradient_on() -> None:
    layer, x = make(), tokens(9)
    slow = one_by_one.gradients(layer, x, one_by_one.mlp(layer, x, "a"))
    layer.experts.requires_grad_(False)
    (layer(x, Call("a")) * torch.randn(9, WIDTH, generator=torch.Generator().manual_seed(7)).double()).sum().backward()
    assert all(parameter.grad is None for parameter in layer.experts.parameters())
    one_by_one.assert_same(
        {"x": x.grad, "routers.a.weight": layer.routers["a"].weight.grad},
        slow,
        rtol=1e-5,
        atol=1e-6,
    )


def test_k_may_change_at_run_time() -> None:
    layer, x = make(), tokens(6)
    for k in (1, 6, 3):
        layer.top_k["a"] = k
        call = Call("a")
        torch.testing.assert_close(layer(x, call), one_by_one.mlp(layer, x, "a"))
        assert call.statistics[0][1].sum() == 6 * k
    layer.top_k["a"] = 7
    with pytest.raises(UserError, match="'a': top_k is 7, but its router sees 6"):
        layer(x, Call("a"))


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(UserError, match="'b': top_k is 4, but its router sees 3"):
        make(top_k={"a": 1, "b": 4})
    with pytest.raises(UserError, match=r"'b': its router sees experts \[7\]"):
        make(experts=range(7))


@pytest.mark.parametrize("shared", [0, 1])
def test_padding_is_neither_routed_nor_counted(shared: int) -> None:
    layer, x = make(shared=shared), tokens(4, 6)
    padding = torch.rand(4, 6) < 0.4
    filled: Any = x.detach().masked_fill(padding[..., None], torch.nan).requires_grad_()
    call, alone = Call("a", padding), Call("a")
    y = layer(filled, call)
    expected = layer(x[~padding], alone)
    torch.testing.assert_close(y[~padding], expected, rtol=0, atol=1e-14)
    assert torch.equal(y[padding], torch.zeros_like(y[padding]))
    torch.testing.assert_close(call.statistics[0], alone.statistics[0])
    assert call.statistics[0][1].sum() == 3 * (~padding).sum()
    (y.square().sum() + call.statistics[0].square().sum()).backward()
    assert torch.equal(filled.grad[padding], torch.zeros_like(y[padding]))
    assert filled.grad.isfinite().all()
    assert all(p.grad is None or p.grad.isfinite().all() for p in layer.parameters())


def test_nothing_but_padding_gives_zeros() -> None:
    layer, x, call = make(), tokens(2, 3), Call("a", torch.ones(2, 3, dtype=torch.bool))
    y = layer(x, call)
    assert torch.equal(y, torch.zeros_like(x))
    assert torch.equal(call.statistics[0], torch.zeros_like(call.statistics[0]))
    y.sum().backward()
    assert x.grad is not None
    assert all(parameter.grad is None for parameter in layer.experts.parameters())


def test_new_experts_change_nothing_for_old_routers() -> None:
    old, x = make(), tokens(50)
    new = make(experts=[8, *range(8), 9], routers={**ROUTERS, "c": range(10)}, top_k={"a": 3, "b": 2, "c": 4})
    new.load_state_dict({**new.state_dict(), **old.state_dict()})
    for task in ROUTERS:
        before, after = Call(task), Call(task)
        assert torch.equal(old(x, before), new(x, after))
        assert torch.equal(before.statistics[0], after.statistics[0][:, 1:9])
        assert not after.statistics[0][:, [0, 9]].any()


def test_removing_experts_that_nobody_chose_changes_nothing() -> None:
    layer, x, call = make(), tokens(3), Call("a")
    y = layer(x, call)
    used = [slot for slot, count in enumerate(call.statistics[0][1].tolist()) if count]
    assert 3 <= len(used) < 6
    small = make(experts=used, routers={"a": used}, top_k={"a": 3})
    state = {name: value for name, value in layer.state_dict().items() if name in small.state_dict()}
    kept = [ROUTERS["a"].index(expert) for expert in used]
    small.load_state_dict({n: v[kept] if n.startswith("routers.") and v.dim() else v for n, v in state.items()})
    torch.testing.assert_close(small(x, Call("a")), y, rtol=0, atol=1e-14)


def test_two_runs_are_equal() -> None:
    runs = []
    for _ in range(2):
        layer, x, call = make().float(), tokens(300).detach().float().requires_grad_(), Call("a")
        y = layer(x, call)
        runs.append([y, *one_by_one.gradients(layer, x, y).values(), call.statistics[0]])
    for one, other in zip(*runs, strict=True):
        assert (one is None and other is None) or torch.equal(one, other)


def test_routing_is_fp32_under_autocast() -> None:
    layer, x = make().float(), tokens(200).detach().float()
    plain, mixed = Call("a"), Call("a")
    full = layer(x, plain)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer.routers["a"](x).dtype == torch.float32
        y = layer(x, mixed)
    assert y.dtype == torch.bfloat16
    assert mixed.statistics[0].dtype == torch.float32
    assert torch.equal(plain.statistics[0], mixed.statistics[0])
    torch.testing.assert_close(y.float(), full, rtol=0.1, atol=0.05)


def test_gradients_under_autocast_come_back_in_fp32() -> None:
    layer, x = make().float(), tokens(40).detach().float().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x, Call("a"))
    rough = one_by_one.gradients(layer, x, y.float())
    assert all(grad is None or grad.dtype == torch.float32 for grad in rough.values())
    exact = one_by_one.gradients(layer, x, layer(x, Call("a")))
    one_by_one.assert_same(rough, exact, rtol=0.1, atol=0.3)
