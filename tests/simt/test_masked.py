"""Stepping flat partitions: torch's rule for parameters without a gradient, bit for bit."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from gppf_ds.simt.masked import MaskedOptimizer, Partition, Segment, fragments_of

torch.set_num_threads(1)

SIZES = {"conv": 12, "split": 10, "head": 5, "bias": 3}
# Two partitions of two groups, as one rank of ZeRO holds them: padding in between, and a parameter cut by the border.
LAYOUT = [
    (20, [Segment("conv", 0, 0, 12), Segment("split", 4, 12, 6)], 0.05),
    (9, [Segment("head", 0, 0, 5), Segment("bias", 0, 6, 3)], 0.0),
]
OPTIMIZERS = {
    "sgd": lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=0.9),
    "nesterov": lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=0.9, nesterov=True),
    "plain_sgd": lambda groups: torch.optim.SGD(groups, lr=0.1),
    "adamw": lambda groups: torch.optim.AdamW(groups, lr=0.1),
}


def build(kind: str):
    generator = torch.Generator().manual_seed(0)
    flats = [nn.Parameter(torch.randn(size, generator=generator)) for size, _, _ in LAYOUT]
    groups = [{"params": [f], "weight_decay": wd} for f, (_, _, wd) in zip(flats, LAYOUT, strict=True)]
    base = OPTIMIZERS[kind](groups)
    pieces: dict[str, nn.Parameter] = {}
    reference_groups = []
    for flat, (_, segments, wd) in zip(flats, LAYOUT, strict=True):
        mine = {s.name: nn.Parameter(part(flat, s).clone()) for s in segments}
        pieces |= mine
        reference_groups.append({"params": list(mine.values()), "weight_decay": wd})
    partitions = [Partition(f, i, segments) for i, (f, (_, segments, _)) in enumerate(zip(flats, LAYOUT, strict=True))]
    return flats, base, MaskedOptimizer(base, partitions), pieces, OPTIMIZERS[kind](reference_groups)


def part(flat: Tensor, segment: Segment) -> Tensor:
    return flat.detach()[segment.offset : segment.offset + segment.length]


@pytest.mark.parametrize("kind", list(OPTIMIZERS))
def test_equals_torch_with_missing_gradients(kind):
    flats, base, masked, pieces, reference = build(kind)
    padding = [flat.detach().clone() for flat in flats]
    generator = torch.Generator().manual_seed(1)
    for step in range(10):
        users = {name: int(torch.randint(3, (), generator=generator)) for name in SIZES}
        masked.users = users.__getitem__
        for flat, (_, segments, _) in zip(flats, LAYOUT, strict=True):
            flat.grad = torch.randn(flat.shape, generator=generator)
            for s in segments:
                pieces[s.name].grad = part(flat.grad, s).clone() if users[s.name] else None
        for optimizer in (base, reference):
            for group in optimizer.param_groups:
                group["lr"] = 0.1 / (step + 1)
        unused = {s.name: (v.clone(), copy.deepcopy(masked.optimizer.state.get(v))) for s, v in masked.views}
        base.step()
        reference.step()
        for segment, view in masked.views:
            assert torch.equal(view, pieces[segment.name]), (step, segment.name)
            state, wanted = masked.optimizer.state.get(view, {}), reference.state.get(pieces[segment.name], {})
            assert state.keys() == wanted.keys()
            for key, value in wanted.items():
                assert value is None or torch.equal(state[key], value), (step, segment.name, key)
            if not users[segment.name]:
                before, old = unused[segment.name]
                assert torch.equal(view, before)
                assert str(masked.optimizer.state.get(view)) == str(old)
            assert view.grad is None
    # The views are the flat tensors' own memory, and padding is nobody's.
    for flat, old, (_, segments, _) in zip(flats, padding, LAYOUT, strict=True):
        outside = torch.ones(len(flat), dtype=torch.bool)
        for s in segments:
            outside[s.offset : s.offset + s.length] = False
            assert torch.equal(part(flat, s), pieces[s.name])
        assert outside.any()
        assert torch.equal(flat[outside], old[outside])


def test_a_flat_tensor_without_a_gradient_stands_still():
    """ZeRO steps one group at a time where it offloads: the others have no gradient then."""
    flats, base, masked, _, _ = build("adamw")
    before = [flat.detach().clone() for flat in flats]
    masked.users = lambda name: 1
    flats[0].grad = torch.ones_like(flats[0])
    base.step()
    assert not torch.equal(flats[0], before[0])
    assert torch.equal(flats[1], before[1])


def test_a_rank_that_owns_nothing():
    flat = nn.Parameter(torch.zeros(4))
    base = torch.optim.SGD([flat], lr=0.1)
    masked = MaskedOptimizer(base, [Partition(flat, 0, [])])
    flat.grad = torch.ones(4)
    base.step()
    assert torch.equal(flat, torch.zeros(4))
    assert masked.views == []


def test_fragments_are_the_live_values_and_leave_out_empty_state():
    _, base, masked, _, _ = build("sgd")
    triples = [(s.name, s.start, v) for s, v in masked.views]
    fragments = {f.name: f for f in fragments_of(triples, masked.optimizer.state)}
    assert (fragments["split"].start, fragments["split"].master.shape) == (4, (6,))
    assert all(f.state == {} for f in fragments.values())
    for group in base.param_groups:
        group["params"][0].grad = torch.ones_like(group["params"][0])
    base.step()
    after = {f.name: f for f in fragments_of(triples, masked.optimizer.state)}
    assert list(after["conv"].state) == ["momentum_buffer"]
    assert fragments["conv"].master.data_ptr() == after["conv"].master.data_ptr()
