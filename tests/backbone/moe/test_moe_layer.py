"""What routers choose and what they leave for the mutual-information loss; the sorted rows and their two products."""

from __future__ import annotations

from typing import Any

import one_by_one
import pytest
import torch
from torch import nn

from gppf_ds.backbone.moe import attention, experts
from gppf_ds.backbone.moe.attention import MoeAttention
from gppf_ds.backbone.moe.call import Call
from gppf_ds.backbone.moe.dispatch import Dispatch
from gppf_ds.backbone.moe.mlp import MoeMlp
from gppf_ds.backbone.moe.router import Router

torch.set_num_threads(1)

VISIBLE = [4, 0, 3]


def make(**options: Any) -> Any:
    torch.manual_seed(0)
    layer: Any = MoeMlp(16, 8, range(6), {"a": VISIBLE}, {"a": 2}, **options)
    nn.init.normal_(layer.routers["a"].weight)
    return layer


def tokens() -> Any:
    torch.manual_seed(1)
    return torch.randn(30, 16, requires_grad=True)


def test_a_router_starts_small_but_not_at_zero() -> None:
    torch.manual_seed(0)
    router = Router(256, range(64))
    assert 0.015 < router.weight.std() < 0.025
    assert router.weight.abs().max() > 0.03
    state = router.state_dict()
    assert set(state) == {"weight", "probability", "usage", "updates"}
    assert state["probability"].shape == state["usage"].shape == (64,)
    assert not any(state[name].any() for name in ("probability", "usage", "updates"))


@pytest.mark.parametrize("source", ["probs", "gates"])
@pytest.mark.parametrize("gate_norm", ["topk", "full"])
def test_statistics_are_those_of_the_definition(source: Any, gate_norm: Any) -> None:
    layer, x, call = make(mi_source=source, gate_norm=gate_norm), tokens(), Call("a")
    layer(x, call)
    probs = (x @ layer.routers["a"].weight.t()).softmax(-1)
    best, chosen = probs.topk(2)
    gates = best / best.sum(-1, keepdim=True) if gate_norm == "topk" else best
    expected = torch.zeros(3, 6)
    summed = probs if source == "probs" else torch.zeros_like(probs).scatter(1, chosen, gates)
    expected[0, VISIBLE] = summed.sum(0)
    expected[1, VISIBLE] = torch.bincount(chosen.flatten(), minlength=3).float()
    expected[2, VISIBLE] = (probs * probs.log()).sum(0)
    (found,) = call.statistics
    torch.testing.assert_close(found, expected)


def test_the_gradient_of_statistics_reaches_the_router_alone_unless_told_otherwise() -> None:
    found: dict[bool, Any] = {}
    for detach in (True, False):
        layer, x, call = make(detach_statistics=detach), tokens(), Call("a")
        layer(x, call)
        weights = torch.arange(18.0).view(3, 6)
        (weights * call.statistics[0]).sum().backward()
        assert all(parameter.grad is None for parameter in layer.experts.parameters())
        found[detach] = (call.statistics[0], layer.routers["a"].weight.grad, x.grad)
    for alike in (0, 1):
        assert torch.equal(found[True][alike], found[False][alike])
    assert found[True][1].abs().max() > 0.1
    assert found[True][2] is None
    assert found[False][2].abs().max() > 0.1


def test_statistics_of_an_evaluation_have_no_graph() -> None:
    layer, call = make(), Call("a")
    with torch.no_grad():
        layer(tokens(), call)
    assert not call.statistics[0].requires_grad


def test_rows_are_sorted_and_find_back() -> None:
    torch.manual_seed(0)
    slots = torch.stack([torch.randperm(5)[:3] for _ in range(40)])
    slots[[3, 17]] = 5
    dispatch = Dispatch(slots, 5, padded=True)
    assert torch.equal(dispatch.slots, slots.flatten().sort().values)
    assert dispatch.sizes == [int((slots == expert).sum()) for expert in range(5)]
    x, choices = torch.randn(40, 7), torch.randn(40, 3, 7)
    assert torch.equal(dispatch.unsort(dispatch.spread(x)), x[:, None].expand(-1, 3, -1))
    assert torch.equal(dispatch.unsort(dispatch.sort(choices)), choices)
    gates = torch.rand(40, 3)
    torch.testing.assert_close(dispatch.total(dispatch.sort(choices)), choices.sum(1))
    torch.testing.assert_close(dispatch.collect(dispatch.sort(choices), gates), (choices * gates[..., None]).sum(1))


def test_the_ways_of_rows_have_the_gradients_of_indexing() -> None:
    torch.manual_seed(0)
    dispatch = Dispatch(torch.stack([torch.randperm(4)[:2] for _ in range(6)]), 4, padded=False)
    double: dict[str, Any] = {"dtype": torch.float64, "requires_grad": True}
    x, choices, rows = (torch.randn(*shape, 3, **double) for shape in ((6,), (6, 2), (12,)))
    gates = torch.rand(6, 2, **double)
    assert torch.autograd.gradcheck(dispatch.spread, x)
    assert torch.autograd.gradcheck(dispatch.sort, choices)
    assert torch.autograd.gradcheck(dispatch.unsort, rows)
    assert torch.autograd.gradcheck(dispatch.total, rows)
    assert torch.autograd.gradcheck(dispatch.collect, (rows, gates))


@pytest.mark.parametrize(
    ("release", "with_kernel"),
    [
        ("2.6.0", []),
        ("2.7.1+cu126", []),
        ("2.8.0+cu128", [(9, 0)]),
        ("2.9.0", [(8, 0), (9, 0), (12, 0)]),
        ("2.11.0+cu130", [(8, 0), (9, 0), (12, 0)]),
    ],
)
def test_the_one_kernel_is_called_only_where_this_torch_has_it(
    release: str, with_kernel: list[tuple[int, int]]
) -> None:
    assert [gpu for gpu in [(7, 0), (8, 0), (9, 0), (12, 0)] if experts.has_kernel(gpu, release)] == with_kernel


@pytest.mark.parametrize("bias", [True, False])
def test_one_kernel_and_the_loop_agree(bias: bool) -> None:
    """torch has the grouped product for CPUs too, if not a fast one."""
    torch.manual_seed(0)
    layers = [nn.Linear(16, 8, bias=bias) for _ in range(5)]
    slots = torch.randint(0, 4, (50, 2))  # nobody chooses the last
    slots[slots == 1] = 0  # nor the second
    slots[[4, 9]] = 5
    dispatch = Dispatch(slots, 5, padded=True)
    x = torch.randn(50, 16).masked_fill((slots == 5)[:, :1], 0)
    found = []
    for product in (experts.looped_linear, experts.grouped_linear):
        given = x.clone().requires_grad_()
        out = product(layers, dispatch.spread(given), dispatch)
        assert torch.equal(out[sum(dispatch.sizes) :], torch.zeros(4, 8))
        parameters = [parameter for layer in layers for parameter in layer.parameters()]
        total = (dispatch.total(out) * torch.linspace(-1, 1, 50)[:, None]).sum()
        grads = torch.autograd.grad(total, [given, *parameters], allow_unused=True)
        found.append([out, grads[0][(slots != 5)[:, 0]], *grads[1:]])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(torch.zeros_like(other) if one is None else one, other)


@pytest.mark.parametrize("kind", ["mlp", "attention"])
@pytest.mark.parametrize("padded", [False, True], ids=["", "padded"])
def test_layers_agree_on_both_products(kind: str, padded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    rest: dict[str, Any] = {"experts": range(6), "routers": {"a": range(5)}, "top_k": {"a": 2}}
    layer: Any = MoeMlp(16, 8, **rest) if kind == "mlp" else MoeAttention(16, 8, window=(2, 3), **rest)
    x = torch.randn(4, 6, 16, requires_grad=True)
    padding = torch.rand(4, 6) < 0.4 if padded else None
    found = []
    for grouped in (False, True):
        for module in (experts, attention):
            monkeypatch.setattr(module, "one_kernel", lambda *_, chosen=grouped: chosen)
        call = Call("a", padding)
        y = layer(x, call)
        found.append((y, one_by_one.gradients(layer, x, y), call.statistics[0]))
    (ours, grads, counted), (kernel, kernel_grads, kernel_counted) = found
    torch.testing.assert_close(ours, kernel)
    assert torch.equal(counted, kernel_counted)
    one_by_one.assert_same(grads, kernel_grads, rtol=1e-4, atol=1e-5)
    assert not kernel_grads[f"experts.5.{'fc1' if kind == 'mlp' else 'query'}.weight"].any()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("kind", ["mlp", "attention"])
@pytest.mark.parametrize("padded", [False, True], ids=["", "padded"])
def test_a_gpu_is_never_waited_for(kind: str, padded: bool) -> None:
    torch.manual_seed(0)
    rest: dict[str, Any] = {"experts": range(8), "routers": {"a": range(7)}, "top_k": {"a": 3}}
    layer: Any = MoeMlp(64, 32, **rest) if kind == "mlp" else MoeAttention(64, 32, window=(3, 4), **rest)
    x = torch.randn(16, 12, 64, requires_grad=True)
    padding = torch.rand(16, 12) < 0.3 if padded else None
    expected = layer(x, Call("a", padding))
    slow = one_by_one.gradients(layer, x, expected)
    layer, given = layer.cuda(), x.detach().cuda().requires_grad_()
    call = Call("a", None if padding is None else padding.cuda())
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(7)).cuda()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.autocast("cuda", torch.bfloat16):
            y = layer(given, call)
        (weights * y).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(y.float().cpu(), expected, rtol=0.1, atol=0.05)
    fast = {"x": given.grad, **{name: parameter.grad for name, parameter in layer.named_parameters()}}
    cpu = {name: None if grad is None else grad.cpu() for name, grad in fast.items()}
    one_by_one.assert_same(cpu, slow, rtol=0.1, atol=0.3)
