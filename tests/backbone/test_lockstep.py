"""Lockstep execution of timm's blocks against the blocks themselves."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from timm.layers import DropBlock2d, DropPath
from torch import nn

from gppf_ds.backbone.lockstep import Lockstep, is_stochastic
from gppf_ds.backbone.norm import NormPolicy

torch.set_num_threads(1)


def block(seed: int = 0, name: str = "resnet50", **options) -> nn.Module:
    torch.manual_seed(seed)
    model = timm.create_model(name, layers=[1, 1, 1, 1], channels=[8, 8, 8, 8], zero_init_last=False, **options)
    return model.layer2[0]


def channels(module: nn.Module) -> int:
    return module.downsample[0].in_channels if isinstance(module.downsample[0], nn.Conv2d) else module.conv1.in_channels


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("resnet50", {}),
        ("resnet18", {}),
        ("resnet50d", {}),
        ("resnet50", {"block_args": {"attn_layer": "se"}}),
        ("resnetblur50", {}),
        # Blocks whose norm carries its activation.
        ("resnet50", {"block_args": {"attn_layer": "cbam"}}),
        ("skresnet18", {}),
    ],
)
@pytest.mark.parametrize("training", [True, False])
def test_one_lane_is_the_module(name, options, training):
    module = block(0, name, **options).train(training)
    twin = copy.deepcopy(module)
    x = torch.randn(4, channels(module), 12, 10)
    (got,) = Lockstep([module])([module], [(0, x)], NormPolicy())
    torch.testing.assert_close(got, twin(x), rtol=1e-4, atol=1e-5)
    for key, buffer in twin.named_buffers():
        torch.testing.assert_close(module.get_buffer(key), buffer, rtol=1e-4, atol=1e-5)


def test_two_lanes_of_one_module_are_one_batch():
    module = block().train()
    twin = copy.deepcopy(module)
    one, two = torch.randn(2, 32, 8, 8), torch.randn(3, 32, 8, 8) + 2
    got = Lockstep([module])([module], [(0, one), (0, two)], NormPolicy())
    wanted = twin(torch.cat([one, two]))
    torch.testing.assert_close(torch.cat(got), wanted, rtol=1e-4, atol=1e-5)
    torch.cat(got).square().mean().backward()
    wanted.square().mean().backward()
    for (name, p), q in zip(module.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-3, atol=1e-5, msg=name)
    for key, buffer in twin.named_buffers():
        torch.testing.assert_close(module.get_buffer(key), buffer, rtol=1e-4, atol=1e-5)


def test_lanes_of_different_units_do_not_mix():
    units = [block(seed).train() for seed in range(2)]
    twins = copy.deepcopy(units)
    x = torch.randn(2, 32, 8, 8)
    got = Lockstep(units)(units, [(1, x), (0, x)], NormPolicy())
    torch.testing.assert_close(got[0], twins[1](x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got[1], twins[0](x), rtol=1e-4, atol=1e-5)


def test_a_module_without_batch_norm_is_called_whole():
    units = [nn.Sequential(nn.Conv2d(3, 4, 1), nn.GroupNorm(2, 4)) for _ in range(2)]
    x = torch.randn(1, 3, 4, 4)
    got = Lockstep(units)(units, [(0, x), (1, x)], NormPolicy())
    assert torch.equal(got[0], units[0](x))
    assert torch.equal(got[1], units[1](x))


def test_frozen_norms_use_their_running_statistics():
    module = block().train()
    for child in module.modules():
        if isinstance(child, nn.BatchNorm2d):
            child.eval()
            child.running_mean.normal_()
    x = torch.randn(2, 32, 8, 8)
    before = {k: b.clone() for k, b in module.named_buffers()}
    (got,) = Lockstep([module])([module], [(0, x)], NormPolicy())
    assert torch.equal(got, module(x))
    assert all(torch.equal(b, before[k]) for k, b in module.named_buffers())


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x) if x.sum() > 0 else x


def test_a_block_that_branches_on_values_is_refused():
    with pytest.raises(torch.fx.proxy.TraceError):
        Lockstep([Branching()])


@pytest.mark.parametrize(
    ("module", "wanted"),
    [
        (nn.Dropout(0.1), True),
        (nn.Dropout(0.0), False),
        (nn.Dropout2d(0.1), True),
        (DropPath(0.1), True),
        (DropPath(0.0), False),
        (DropBlock2d(0.1), True),
        (nn.Sequential(nn.Conv2d(1, 1, 1), nn.Sequential(DropPath(0.5))), True),
        (nn.Conv2d(1, 1, 1), False),
    ],
)
def test_what_draws_random_numbers_is_known(module, wanted):
    assert is_stochastic(module) is wanted


def test_reseeding_goes_with_lane_and_position_in_training_only():
    module = block(drop_path_rate=0.5)
    calls: list[tuple[int, int]] = []
    lanes = [(0, torch.randn(2, 32, 8, 8)) for _ in range(2)]
    lockstep = Lockstep([module])
    lockstep([module.train()], lanes, NormPolicy(), lambda lane, position: calls.append((lane, position)))
    assert [lane for lane, _ in calls] == [0, 1]
    assert len({position for _, position in calls}) == 1
    calls.clear()
    lockstep([module.eval()], lanes, NormPolicy(), lambda lane, position: calls.append((lane, position)))
    assert calls == []
