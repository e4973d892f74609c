"""Cross-task batch norm against batch norm on concatenated elements, computed in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gppf_ds.backbone import norm_kernels
from gppf_ds.backbone.norm import NormPolicy, cross_task_batch_norm, pooled_batch_norm

torch.set_num_threads(1)

CHANNELS = 3
# (slot, shape): two units in use, two devices of different shapes on the first of them; the third unit is nobody's.
LANES = [(0, (4, CHANNELS, 5, 7)), (1, (4, CHANNELS, 5, 7)), (0, (1, CHANNELS, 9, 3)), (1, (2, CHANNELS, 2, 2))]


def make_norms(count: int, momentum: float | None = 0.1) -> list[nn.BatchNorm2d]:
    norms = [nn.BatchNorm2d(CHANNELS, momentum=momentum) for _ in range(count)]
    for norm in norms:
        nn.init.normal_(norm.weight, 1, 0.3)
        nn.init.normal_(norm.bias)
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
    return norms


def make_lanes(seed: int = 0, lanes=LANES) -> list[tuple[int, Tensor]]:
    torch.manual_seed(seed)
    return [(k, (torch.randn(shape) * (1 + d) + 3 * d).requires_grad_()) for d, (k, shape) in enumerate(lanes)]


def share(x: Tensor, weighting: str) -> float:
    return {"element": x[:, 0].numel(), "device": 1, "sample": len(x)}[weighting]


def explicit(norms: list[nn.BatchNorm2d], lanes: list[tuple[int, Tensor]], policy: NormPolicy):
    """Outputs (float64, differentiable), and the running statistics after the step."""
    weights = [n.weight.detach().double().requires_grad_() for n in norms]
    biases = [n.bias.detach().double().requires_grad_() for n in norms]
    xs = [x.detach().double().requires_grad_() for _, x in lanes]

    def moments(members: list[Tensor]) -> tuple[Tensor, Tensor]:
        shares = torch.tensor([share(x, policy.weighting) for x in members], dtype=torch.float64)
        shares = shares / shares.sum()
        mean = sum(s * x.mean((0, 2, 3)) for s, x in zip(shares, members, strict=True))
        square = [((x - mean.view(1, -1, 1, 1)) ** 2).mean((0, 2, 3)) for x in members]
        return mean, sum(s * v for s, v in zip(shares, square, strict=True))

    outputs = []
    for (slot, _), x in zip(lanes, xs, strict=True):
        members = [y for (other, _), y in zip(lanes, xs, strict=True) if other == slot] if policy.synchronise else [x]
        mean, variance = (m.view(1, -1, 1, 1) for m in moments(members))
        normalised = (x - mean) / torch.sqrt(variance + norms[slot].eps)
        outputs.append(normalised * weights[slot].view(1, -1, 1, 1) + biases[slot].view(1, -1, 1, 1))
    running = []
    for slot, norm in enumerate(norms):
        members = [y for (other, _), y in zip(lanes, xs, strict=True) if other == slot]
        old_mean, old_var, tracked = (
            norm.running_mean.double(),
            norm.running_var.double(),
            int(norm.num_batches_tracked),
        )
        if members:
            mean, variance = moments(members)
            n = sum(y[:, 0].numel() for y in members)
            m = norm.momentum if norm.momentum is not None else 1 / (tracked + 1)
            old_mean = (1 - m) * old_mean + m * mean.detach()
            old_var = (1 - m) * old_var + m * variance.detach() * n / (n - 1)
            tracked += 1
        running.append((old_mean, old_var, tracked))
    return outputs, (weights, biases, xs), running


def close(got: Tensor, wanted: Tensor, tolerance: float = 2e-5) -> None:
    torch.testing.assert_close(got.double(), wanted.double(), rtol=tolerance, atol=tolerance)


def compare(norms: list[nn.BatchNorm2d], lanes: list[tuple[int, Tensor]], policy: NormPolicy) -> None:
    wanted, (weights, biases, xs), running = explicit(norms, lanes, policy)
    outputs = cross_task_batch_norm(norms, lanes, policy)
    targets = [torch.randn(x.shape).to(x.device) for x in xs]
    sum(((y - t) ** 2).sum() for y, t in zip(outputs, targets, strict=True)).backward()
    sum(((y - t.double()) ** 2).sum() for y, t in zip(wanted, targets, strict=True)).backward()
    for y, z in zip(outputs, wanted, strict=True):
        close(y, z)
    for (_, x), z in zip(lanes, xs, strict=True):
        close(x.grad, z.grad, 2e-4)
    for norm, weight, bias, (mean, variance, tracked) in zip(norms, weights, biases, running, strict=True):
        assert (norm.weight.grad is None) == (weight.grad is None)
        if weight.grad is not None:
            close(norm.weight.grad, weight.grad, 2e-4)
            close(norm.bias.grad, bias.grad, 2e-4)
        close(norm.running_mean, mean)
        close(norm.running_var, variance)
        assert norm.num_batches_tracked == tracked
        assert norm.num_batches_tracked.dtype == torch.int64


@pytest.mark.parametrize("lanes", [LANES, LANES[:1]])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    "kind", ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))]
)
def test_kernels_of_every_device_and_memory_layout(kind, layout, lanes):
    made = [
        (slot, x.detach().to(kind).contiguous(memory_format=layout).requires_grad_())
        for slot, x in make_lanes(lanes=lanes)
    ]
    compare([norm.to(kind) for norm in make_norms(3)], made, NormPolicy())


def reduce_written_out(grad, x, mean, invstd, weight, input_g, weight_g, bias_g):
    """batch_norm_backward_reduce as torch's Normalization.cuh computes it."""
    assert grad.stride() == x.stride()
    assert grad.dtype == x.dtype
    assert mean.dtype == invstd.dtype == weight.dtype == torch.float32
    centred = (grad.float() * (x.float() - mean.view(1, -1, 1, 1))).sum((0, 2, 3))
    total = grad.float().sum((0, 2, 3))
    return total, centred, centred * invstd, total


def elemt_written_out(grad, x, mean, invstd, weight, sum_dy, sum_dy_xmu, count):
    """batch_norm_backward_elemt, likewise."""
    assert grad.stride() == x.stride()
    assert {t.dtype for t in (mean, invstd, weight, sum_dy, sum_dy_xmu)} == {torch.float32}
    assert count.dtype == torch.int32
    mean, invstd, weight, sum_dy, sum_dy_xmu = (t.view(1, -1, 1, 1) for t in (mean, invstd, weight, sum_dy, sum_dy_xmu))
    centre, slope = sum_dy / count.sum(), invstd * invstd * sum_dy_xmu / count.sum()
    return ((grad.float() - centre - (x.float() - mean) * slope) * weight * invstd).to(x.dtype)


def write_out_kernels(monkeypatch) -> None:
    monkeypatch.setattr(norm_kernels, "fused", lambda x: True)
    monkeypatch.setattr(torch, "batch_norm_backward_reduce", reduce_written_out)
    monkeypatch.setattr(torch, "batch_norm_backward_elemt", elemt_written_out)


@pytest.mark.parametrize("synchronise", [True, False])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("weighting", ["element", "device", "sample"])
def test_what_the_kernels_of_a_gpu_are_told(monkeypatch, weighting, layout, synchronise):
    """They have no CPU version: here stands what they compute, and the test above runs them where there is a GPU."""
    write_out_kernels(monkeypatch)
    lanes = [(k, x.detach().contiguous(memory_format=layout).requires_grad_()) for k, x in make_lanes()]
    compare(make_norms(3), lanes, NormPolicy(weighting, synchronise))


@pytest.mark.parametrize("written_out", [False, True])
def test_a_frozen_norm_beside_one_that_learns(monkeypatch, written_out):
    if written_out:
        write_out_kernels(monkeypatch)
    norms, lanes = make_norms(2), make_lanes()
    norms[1].eval()
    plain = nn.BatchNorm2d(CHANNELS).eval()
    plain.load_state_dict(norms[1].state_dict())
    copies = [(slot, x.detach().clone().requires_grad_()) for slot, x in lanes]
    outputs = cross_task_batch_norm(norms, lanes, NormPolicy())
    for (slot, x), (_, copy), y in zip(lanes, copies, outputs, strict=True):
        if slot == 1:
            wanted = plain(copy)
            close(y, wanted)
            target = torch.randn(y.shape)
            (got,) = torch.autograd.grad((y * target).sum(), x, retain_graph=True)
            close(got, torch.autograd.grad((wanted * target).sum(), copy)[0])


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_gradient_is_laid_out_as_the_map_whatever_comes(monkeypatch, layout):
    write_out_kernels(monkeypatch)
    (slot, x), *_ = make_lanes()
    x = x.detach().contiguous(memory_format=layout).requires_grad_()
    (y,) = pooled_batch_norm(make_norms(3), [(slot, x)], NormPolicy())
    y.sum().backward()  # its gradient is one number for all elements
    assert x.grad.is_contiguous(memory_format=layout)
    close(x.grad, torch.zeros_like(x))


@pytest.mark.parametrize("synchronise", [True, False])
@pytest.mark.parametrize("weighting", ["element", "device", "sample"])
def test_values_gradients_and_running_statistics(weighting, synchronise):
    lanes = make_lanes()
    norms = make_norms(3)
    compare(norms, lanes, NormPolicy(weighting, synchronise))
    assert norms[2].weight.grad is None


@settings(deadline=None, max_examples=40)
@given(
    st.lists(
        st.tuples(st.integers(0, 2), st.integers(1, 4), st.integers(2, 6), st.integers(1, 6)), min_size=1, max_size=5
    ),
    st.sampled_from(["element", "device", "sample"]),
    st.booleans(),
)
def test_any_set_of_lanes(shapes, weighting, synchronise):
    lanes = make_lanes(1, [(k, (n, CHANNELS, h, w)) for k, n, h, w in shapes])
    if all(x[:, 0].numel() > 3 for _, x in lanes):  # the gradient of fewer elements is all rounding
        compare(make_norms(3), lanes, NormPolicy(weighting, synchronise))


def test_equals_torch_on_concatenated_elements():
    lanes = [(0, x) for _, x in make_lanes(2)]
    (norm,), twin = make_norms(1), nn.BatchNorm2d(CHANNELS)
    twin.load_state_dict(norm.state_dict())
    flat = [x.detach().transpose(0, 1).flatten(1) for _, x in lanes]
    column = torch.cat(flat, 1).t()[:, :, None, None].requires_grad_()
    wanted = twin(column)
    outputs = cross_task_batch_norm([norm], lanes, NormPolicy())
    weight = torch.randn(column.shape)
    (wanted * weight).sum().backward()
    pieces = weight[:, :, 0, 0].t().split([f.shape[1] for f in flat], 1)
    sum((y.transpose(0, 1).flatten(1) * piece).sum() for y, piece in zip(outputs, pieces, strict=True)).backward()
    got = torch.cat([y.detach().transpose(0, 1).flatten(1) for y in outputs], 1)
    close(got, wanted.detach()[:, :, 0, 0].t())
    close(torch.cat([x.grad.transpose(0, 1).flatten(1) for _, x in lanes], 1), column.grad[:, :, 0, 0].t(), 1e-4)
    for name in ("weight", "bias"):
        close(getattr(norm, name).grad, getattr(twin, name).grad, 1e-4)
    for name, buffer in twin.named_buffers():
        close(norm.get_buffer(name), buffer)


def test_without_synchronisation_each_device_is_torch_alone():
    lanes = [(0, x) for _, x in make_lanes(3)]
    (norm,) = make_norms(1)
    outputs = cross_task_batch_norm([norm], lanes, NormPolicy(synchronise=False))
    targets = [torch.randn_like(x) for _, x in lanes]
    sum((y * t).sum() for y, t in zip(outputs, targets, strict=True)).backward()
    for (_, x), y, target in zip(lanes, outputs, targets, strict=True):
        twin = x.detach().clone().requires_grad_()
        alone = F.batch_norm(twin, None, None, norm.weight.detach(), norm.bias.detach(), True, 0, norm.eps)
        close(y, alone)
        (alone * target).sum().backward()
        close(x.grad, twin.grad, 1e-4)


def test_momentum_none_is_the_mean_of_all_steps():
    (norm,) = make_norms(1, momentum=None)
    means = []
    for seed in range(3):
        lanes = [(0, x) for _, x in make_lanes(seed)]
        cross_task_batch_norm([norm], lanes, NormPolicy())
        means.append(torch.cat([x.transpose(0, 1).flatten(1) for _, x in lanes], 1).mean(1))
    close(norm.running_mean, torch.stack(means).mean(0).detach(), 1e-4)
    assert norm.num_batches_tracked == 3


@pytest.mark.parametrize("offset", [1e2, 1e4])
def test_precision_where_the_mean_dwarfs_the_deviation(offset):
    torch.manual_seed(0)
    lanes = [(0, torch.randn(4, CHANNELS, 16, 16) + offset), (0, torch.randn(2, CHANNELS, 32, 8) + offset + 1)]
    lanes = [(k, x.requires_grad_()) for k, x in lanes]
    (norm,) = make_norms(1)
    wanted, (_, _, xs), running = explicit([norm], lanes, NormPolicy())
    outputs = cross_task_batch_norm([norm], lanes, NormPolicy())
    targets = [torch.randn(x.shape) for x in xs]
    sum((y * t).sum() for y, t in zip(outputs, targets, strict=True)).backward()
    sum((y * t.double()).sum() for y, t in zip(wanted, targets, strict=True)).backward()
    ulp = offset * 2**-23  # of the input: no fp32 kernel can do better
    for y, z in zip(outputs, wanted, strict=True):
        assert (y.double() - z).abs().max() < 4 * ulp
    for (_, x), z in zip(lanes, xs, strict=True):
        assert (x.grad.double() - z.grad).abs().max() < 4 * ulp
    assert (norm.running_var.double() - running[0][1]).abs().max() < 0.1 * ulp  # 0.1 is the momentum


def test_running_statistics_of_an_unused_unit_stay_bit_for_bit():
    norms = make_norms(3)
    before = {name: b.clone() for name, b in norms[2].named_buffers()}
    for seed in range(3):
        cross_task_batch_norm(norms, make_lanes(seed), NormPolicy())
    for name, buffer in norms[2].named_buffers():
        assert torch.equal(buffer, before[name])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_input_does_not_poison_running_statistics(value):
    lanes = make_lanes()
    with torch.no_grad():
        lanes[0][1][0, 1, 0, 0] = value
    norms = make_norms(2)
    poisoned = {name: b.clone() for name, b in norms[0].named_buffers()}
    healthy = norms[1].running_mean.clone()
    outputs = cross_task_batch_norm(norms, lanes, NormPolicy())
    assert not torch.isfinite(outputs[0]).all()
    assert torch.isfinite(outputs[1]).all()
    for name, buffer in norms[0].named_buffers():
        assert torch.equal(buffer, poisoned[name])
    assert not torch.equal(norms[1].running_mean, healthy)


def test_a_single_element_leaves_running_statistics_alone():
    (norm,) = make_norms(1)
    before = norm.running_var.clone()
    (y,) = cross_task_batch_norm([norm], [(0, torch.randn(1, CHANNELS, 1, 1))], NormPolicy())
    close(y[0, :, 0, 0], norm.bias.detach())
    assert torch.equal(norm.running_var, before)


def test_activation_checkpointing_updates_running_statistics_once():
    lanes = make_lanes()
    plain, twin = make_norms(2), make_norms(2)
    for one, two in zip(plain, twin, strict=True):
        two.load_state_dict(one.state_dict())
    xs = [x for _, x in lanes]

    def run(norms: list[nn.BatchNorm2d], *values: Tensor) -> Tensor:
        pairs = [(k, x) for (k, _), x in zip(lanes, values, strict=True)]
        return sum(y.square().sum() * y.mean() for y in cross_task_batch_norm(norms, pairs, NormPolicy()))

    run(plain, *xs).backward()
    wanted = [x.grad.clone() for x in xs]
    for x in xs:
        x.grad = None
    checkpoint(run, twin, *xs, use_reentrant=False).backward()
    for x, grad in zip(xs, wanted, strict=True):
        assert torch.equal(x.grad, grad)
    for one, two in zip(plain, twin, strict=True):
        assert two.num_batches_tracked == 1
        for name, buffer in one.named_buffers():
            assert torch.equal(two.get_buffer(name), buffer)


def test_bfloat16_input():
    torch.manual_seed(0)
    exact = [(k, x.detach().bfloat16()) for k, x in make_lanes(5)]
    lanes = [(k, x.clone().requires_grad_()) for k, x in exact]
    norms = make_norms(2)
    wanted, (weights, biases, xs), running = explicit(norms, exact, NormPolicy())
    outputs = cross_task_batch_norm(norms, lanes, NormPolicy())
    assert all(y.dtype == torch.bfloat16 for y in outputs)
    targets = [torch.randn(x.shape).bfloat16() for x in xs]
    sum((y.float() * t).sum() for y, t in zip(outputs, targets, strict=True)).backward()
    sum((y * t.double()).sum() for y, t in zip(wanted, targets, strict=True)).backward()
    for y, z in zip(outputs, wanted, strict=True):
        close(y, z, 2e-2)
    for (_, x), z in zip(lanes, xs, strict=True):
        assert x.grad.dtype == torch.bfloat16
        close(x.grad, z.grad, 2e-2)
    for norm, weight, bias, (mean, variance, _) in zip(norms, weights, biases, running, strict=True):
        assert norm.weight.grad.dtype == torch.float32
        close(norm.weight.grad, weight.grad, 2e-3)
        close(norm.bias.grad, bias.grad, 2e-3)
        close(norm.running_mean, mean)
        close(norm.running_var, variance)
