"""Forward passes on tensors that claim to lie on a GPU: is everything there, and does the host ever have to wait?

torch's fake tensors know shapes and devices but no values, so that this needs no GPU. Backward does: autograd has a
thread of its own for every real one.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gppf_ds.backbone import norm
from gppf_ds.backbone.controller import Controller, Route
from gppf_ds.backbone.lego import LegoBackbone, Pass
from gppf_ds.backbone.norm import NormPolicy
from gppf_ds.config import BackboneConfig, MoeConfig

GPU = "cuda"
NARROW = {"layers": [1, 1, 1, 1], "channels": [8, 8, 16, 16]}
MODELS: dict[str, dict[str, Any]] = {
    "resnet50": NARROW,
    "vit_tiny_patch16_224": {"embed_dim": 48, "depth": 2, "num_heads": 3},
    "swin_tiny_patch4_window7_224": {"embed_dim": 24, "depths": [1, 2, 1, 1], "num_heads": [1, 2, 4, 8]},
    "convnext_atto": {"depths": [1, 1, 2, 1], "dims": [8, 16, 24, 32]},
}

pytestmark = pytest.mark.skipif(torch.version.cuda is None, reason="this torch is built without GPUs")


class Copies(TorchDispatchMode):
    """Notes what mixes devices: copies from one to the other, and indices that come from the host."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        tensors = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, Tensor)]
        # A number of the host is handed to a kernel with the call.
        mixed = {t.device.type for t in tensors if t.dim() or t.device.type == GPU}
        if len(mixed) > 1:
            self.found.append(str(func))
        return out


def onto_gpu(module: nn.Module, dtype: torch.dtype = torch.float32) -> None:
    for child in module.modules():
        for name, parameter in child._parameters.items():
            if parameter is not None:
                child._parameters[name] = nn.Parameter(torch.empty(parameter.shape, dtype=dtype, device=GPU))
        for name, buffer in child._buffers.items():
            if buffer is not None:
                child._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device=GPU)


@pytest.mark.parametrize("units", [[0, 1, 2], [0, 2]])
@pytest.mark.parametrize("routing", ["soft", "hard"])
@pytest.mark.parametrize("name", MODELS)
def test_a_forward_pass_stays_on_its_device(
    monkeypatch: pytest.MonkeyPatch, name: str, routing: str, units: list[int]
) -> None:
    # The one operator of ours that torch cannot fake.
    monkeypatch.setattr(norm, "moments", lambda x: tuple(torch.empty(2, x.shape[1], device=x.device)))
    config = BackboneConfig(name=name, options=MODELS[name], units=3)
    layers = len(LegoBackbone(BackboneConfig(name=name, options=MODELS[name], units=1)).layers)
    backbone = LegoBackbone(config, kept=[units] * layers).train()
    controller = Controller(["a"], backbone.units)
    with FakeTensorMode():
        onto_gpu(backbone)
        onto_gpu(controller)
        weights = controller.probabilities("a")
        route = Route(weights, tuple(units[:1] * layers) if routing == "hard" else None, "a")
        images = torch.empty(2, 3, 64, 96, device=GPU)
        with Copies() as copies:
            maps = backbone([Pass(images, route), Pass(images, route)], NormPolicy())
    assert {x.device.type for own in maps for x in own} == {GPU}
    assert not copies.found


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "swin_tiny_patch4_window7_224"])
def test_tokens_find_their_experts_without_the_host(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    moe = MoeConfig(mlp_experts=6, mlp_top_k=2, attention_experts=6)
    config = BackboneConfig(name=name, options=MODELS[name], units=1, moe=moe)
    backbone = LegoBackbone(config, tasks=["a", "b"]).train()
    with FakeTensorMode():
        onto_gpu(backbone, torch.bfloat16)  # the one kernel wants 16 bits
        route = Route(torch.ones(len(backbone.layers), 1, device=GPU), (0,) * len(backbone.layers), "b")
        sizes = torch.tensor([[64, 96], [64, 64]], device=GPU)
        one = Pass(torch.empty(2, 3, 64, 96, dtype=torch.bfloat16, device=GPU), route, sizes=sizes)
        with Copies() as copies:  # waiting for a value would raise: there is none
            backbone([one], NormPolicy())
    assert {x.device.type for x in one.statistics.values()} == {GPU}
    assert not copies.found


def test_a_copy_is_noticed() -> None:
    with FakeTensorMode(), Copies() as copies:
        torch.zeros(3, device=GPU)[[0, 2]]
    assert copies.found == ["aten._to_copy.default"]
