"""The lego backbone against timm's own models, and its routes."""

from __future__ import annotations

import copy
import gc
import itertools
import weakref

import pytest
import timm
import torch
from torch import Tensor, nn

from gppf_ds.backbone.controller import Controller, Route
from gppf_ds.backbone.lego import LegoBackbone, Pass
from gppf_ds.backbone.norm import NormPolicy
from gppf_ds.config import BackboneConfig

torch.set_num_threads(1)

TINY = {"layers": [1, 2, 1, 1], "channels": [4, 8, 8, 8]}
GROUP_NORM = {"layers": [1, 1, 1, 1], "channels": [32, 32, 32, 32], "zero_init_last": False}
MODELS = [("resnet18", {"channels": [4, 8, 8, 8]}), ("resnet50", TINY), ("resnet50d", TINY)]


def make(name: str = "resnet50", options: dict | None = None, seed: int = 0, **config) -> LegoBackbone:
    backbone = LegoBackbone(BackboneConfig(name=name, options=TINY if options is None else options, **config), seed)
    torch.manual_seed(seed)
    with torch.no_grad():  # away from the zeros and ones that norms start with
        for module in backbone.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_(0, 0.2)
                module.running_mean.normal_(0, 0.2)
                module.running_var.uniform_(0.5, 1.5)
    return backbone


def plain(backbone: LegoBackbone, path: tuple[int, ...] | None = None) -> nn.Module:
    """The path as timm's own model, by renaming alone."""
    path = path or (0,) * len(backbone.layers)
    state = {
        layer.timm_name(key): value.clone()
        for layer, unit in zip(backbone.layers, path, strict=True)
        for key, value in layer.units[str(unit)].state_dict().items()
    }
    model = timm.create_model(backbone.config.name, features_only=True, **backbone.config.options)
    model.load_state_dict(state, strict=True)
    return model


def hard(path: tuple[int, ...], units: int) -> Route:
    return Route(torch.ones(len(path), units), path)


def one_hot(path: tuple[int, ...], units: int) -> Route:
    return Route(nn.functional.one_hot(torch.tensor(path), units).float(), None)


def soft(backbone: LegoBackbone, seed: int = 0) -> Route:
    generator = torch.Generator().manual_seed(seed)
    shape = (len(backbone.layers), max(backbone.units))
    return Route(torch.softmax(torch.randn(shape, generator=generator), -1), None)


def images(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def total(maps: list[list[Tensor]]) -> Tensor:
    return sum((x * torch.sin(x)).mean() for device in maps for x in device)


def close(one: Tensor, two: Tensor, tolerance: float = 1e-4) -> None:
    torch.testing.assert_close(one, two, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("size", [(64, 64), (65, 97)])
@pytest.mark.parametrize(("name", "options"), MODELS)
@pytest.mark.parametrize("routing", ["soft", "hard"])
def test_one_unit_is_timms_model(name, options, size, routing):
    backbone = make(name, options, units=1)
    model = plain(backbone)
    x = images(3, 3, *size)
    depth = len(backbone.layers)
    route = hard((0,) * depth, 1) if routing == "hard" else one_hot((0,) * depth, 1)
    with torch.no_grad():
        maps = backbone.eval()([Pass(x, route)], NormPolicy())[0]
        wanted = model.eval()(x)
    assert [m.shape[1] for m in maps] == list(backbone.channels)
    for got, y in zip(maps, wanted, strict=True):
        assert torch.equal(got, y)

    maps, wanted = backbone.train()([Pass(x, route)], NormPolicy())[0], model.train()(x)
    for got, y in zip(maps, wanted, strict=True):
        close(got, y)
    total([maps]).backward()
    total([wanted]).backward()
    renamed = {layer.timm_name(key): p for layer in backbone.layers for key, p in layer.units["0"].named_parameters()}
    assert renamed.keys() == dict(model.named_parameters()).keys()
    for key, p in model.named_parameters():
        close(renamed[key].grad, p.grad, 1e-3)
    buffers = {layer.timm_name(key): b for layer in backbone.layers for key, b in layer.units["0"].named_buffers()}
    for key, b in model.named_buffers():
        close(buffers[key], b)


def test_unit_zero_does_not_depend_on_the_number_of_units():
    one, three = (LegoBackbone(BackboneConfig(options=TINY, units=n), 5) for n in (1, 3))
    for a, b in zip(one.layers, three.layers, strict=True):
        for key, value in a.units["0"].state_dict().items():
            assert torch.equal(b.units["0"].state_dict()[key], value)
    first, second = (dict(three.layers[1].units[str(k)].named_parameters()) for k in (0, 1))
    assert not torch.equal(first["conv1.weight"], second["conv1.weight"])


@pytest.mark.parametrize("training", [True, False])
def test_one_hot_soft_weights_are_the_hard_path(training):
    path = (1, 0, 1, 1, 0, 1)
    backbone = make().train(training)
    twin = copy.deepcopy(backbone)
    x = images(2, 3, 64, 64)
    with torch.no_grad():
        for got, wanted in zip(
            backbone([Pass(x, one_hot(path, 2))], NormPolicy())[0],
            twin([Pass(x, hard(path, 2))], NormPolicy())[0],
            strict=True,
        ):
            close(got, wanted, 1e-6)
    if not training:
        maps = backbone([Pass(x, hard(path, 2))], NormPolicy())[0]
        for got, wanted in zip(maps, plain(backbone, path).eval()(x), strict=True):
            assert torch.equal(got, wanted)


def test_soft_mixing_is_equation_one():
    backbone = make(units=3).eval()
    route, x = soft(backbone), images(2, 3, 64, 64)
    maps = backbone([Pass(x, route)], NormPolicy())[0]
    y, wanted = x, []
    for index, layer in enumerate(backbone.layers):
        y = layer.before(y)
        y = sum(route.weights[index, k] * unit(y) for k, unit in enumerate(layer.units.values()))
        if layer.tap:
            wanted.append(y)
    for got, y in zip(maps, wanted, strict=True):
        close(got, y, 1e-5)


@pytest.mark.parametrize("routing", ["soft", "hard"])
def test_two_devices_together_are_batch_norm_over_both(routing):
    """Both take the same route, so that they must equal one batch of all images, gradients included."""
    backbone = make().train()
    twin = copy.deepcopy(backbone)
    route = soft(backbone) if routing == "soft" else hard((1, 0, 0, 1, 1, 0), 2)
    one, two = images(2, 3, 64, 64), images(3, 3, 64, 64, seed=1) * 2 + 1
    maps = backbone([Pass(one, route), Pass(two, route)], NormPolicy())
    joined = [torch.cat(pair) for pair in zip(*maps, strict=True)]
    wanted = twin([Pass(torch.cat([one, two]), route)], NormPolicy())[0]
    for got, y in zip(joined, wanted, strict=True):
        close(got, y)
    total([joined]).backward()
    total([wanted]).backward()
    for p, q in zip(backbone.parameters(), twin.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None)
        if p.grad is not None:
            close(p.grad, q.grad, 1e-3)
    for b, c in zip(backbone.buffers(), twin.buffers(), strict=True):
        close(b, c)


def test_hard_mode_runs_only_the_chosen_units():
    backbone = make().train()
    calls: dict[tuple[int, int], int] = {}

    def count(index: int, unit: int):
        def hook(*_):
            calls[index, unit] = calls.get((index, unit), 0) + 1

        return hook

    for index, layer in enumerate(backbone.layers):
        for unit, block in enumerate(layer.units.values()):
            block.conv1.register_forward_hook(count(index, unit))
    paths = [(1, 0, 1, 1, 0, 1), (1, 1, 0, 1, 0, 0)]
    backbone([Pass(images(1, 3, 64, 64), hard(p, 2)) for p in paths], NormPolicy())
    wanted: dict[tuple[int, int], int] = {}
    for path in paths:
        for key in enumerate(path):
            wanted[key] = wanted.get(key, 0) + 1
    assert calls == wanted


def test_straight_through():
    """The output is the unit's own; every logit of the task's row learns, and no weight of another unit does."""
    backbone = make().train()
    controller = Controller(["a", "b"], backbone.units)
    with torch.no_grad():
        controller.logits["a"].normal_()
    route = controller.hard_route("a", controller.noise(0, 0, 0), 0.7)
    buffers = {name: b.clone() for name, b in backbone.named_buffers()}
    twin = copy.deepcopy(backbone)
    x = images(2, 3, 64, 64)
    maps = backbone([Pass(x, route)], NormPolicy())[0]
    for got, wanted in zip(maps, twin([Pass(x, hard(route.path, 2))], NormPolicy())[0], strict=True):
        assert torch.equal(got, wanted)
    total([maps]).backward()
    gradient = controller.logits["a"].grad
    assert (gradient != 0).all()
    assert torch.isfinite(gradient).all()
    assert controller.logits["b"].grad is None
    for index, layer in enumerate(backbone.layers):
        for unit, block in enumerate(layer.units.values()):
            used = unit == route.path[index]
            assert all((p.grad is not None) == used for p in block.parameters())
            for name, buffer in block.named_buffers():
                old = buffers[f"layers.{index}.units.{unit}.{name}"]
                assert used or torch.equal(buffer, old)


def test_soft_gradient_of_the_weights_is_that_of_equation_one():
    backbone = make(options={"layers": [1, 1, 1, 1], "channels": [4, 4, 4, 4]}).eval().double()
    x = images(1, 3, 32, 32).double()

    def loss(weights: Tensor) -> Tensor:
        return total(backbone([Pass(x, Route(weights, None))], NormPolicy()))

    weights = soft(backbone).weights.double().requires_grad_()
    assert torch.autograd.gradcheck(loss, weights)


@pytest.mark.parametrize("routing", ["soft", "hard"])
@pytest.mark.parametrize(
    "noise", [{}, {"drop_path_rate": 0.5}, {"drop_block_rate": 0.2}, {"drop_path_rate": 0.3, "drop_block_rate": 0.1}]
)
def test_activation_checkpointing_changes_nothing(routing, noise):
    options = {**TINY, **noise}
    torch.manual_seed(0)
    one, two = make(options=options).train(), make(options=options, checkpoint=True).train()
    results = []
    for backbone in (one, two):
        weights = soft(backbone).weights.requires_grad_()
        paths = ((1, 0, 1, 1, 0, 1), (0, 0, 1, 0, 0, 1)) if routing == "hard" else (None, None)
        passes = [
            Pass(images(2, 3, 64, size, seed=d), Route(weights, path), (3, 7, d))
            for d, (size, path) in enumerate(zip((64, 96), paths, strict=True))
        ]
        loss = total(backbone(passes, NormPolicy()))
        torch.manual_seed(99 + len(results))  # whatever the heads drew in between
        loss.backward()
        results.append((loss.detach(), weights.grad))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
    for (name, p), q in zip(one.named_parameters(), two.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        assert p.grad is None or torch.equal(p.grad, q.grad), name
    for (name, b), c in zip(one.named_buffers(), two.buffers(), strict=True):
        assert torch.equal(b, c), name


@pytest.mark.parametrize("routing", ["soft", "hard"])
def test_channels_last_changes_the_order_in_memory_alone(routing, monkeypatch):
    results = []
    for last in (False, True):
        backbone = make(units=2).train()
        monkeypatch.setattr(backbone, "channels_last", lambda kind, last=last: last)
        orders: set[bool] = set()

        def note(layer, inputs, outputs, orders=orders):
            for x in outputs:
                orders.add(x.is_contiguous(memory_format=torch.channels_last))
                x.register_hook(lambda grad: orders.add(grad.is_contiguous(memory_format=torch.channels_last)))

        for layer in backbone.layers:
            layer.register_forward_hook(note)
        weights = soft(backbone).weights.requires_grad_()
        paths = ((1, 0, 1, 1, 0, 1), (0, 0, 1, 0, 0, 1)) if routing == "hard" else (None, None)
        passes = [
            Pass(images(2, 3, 64, size, seed=d), Route(weights, path))
            for d, (size, path) in enumerate(zip((64, 96), paths, strict=True))
        ]
        maps = backbone(passes, NormPolicy())
        assert all(x.is_contiguous() for device in maps for x in device)
        total(maps).backward()
        assert orders == {last}
        results.append((weights.grad, backbone))
    (one_grad, one), (two_grad, two) = results
    close(one_grad, two_grad, 1e-5)
    for (name, p), q in zip(one.named_parameters(), two.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        assert p.grad is None or float((p.grad - q.grad).norm() / p.grad.norm()) < 1e-4, name
    for (name, b), c in zip(one.named_buffers(), two.buffers(), strict=True):
        assert torch.allclose(b, c, rtol=1e-5, atol=1e-6), name


def test_maps_of_resnets_lie_channels_last_in_16_bits():
    resnet, convnext = make(), make("convnext_atto", {"depths": (1, 1, 1, 1), "dims": (8, 8, 8, 8)})
    for precision, expected in ((torch.float32, False), (torch.bfloat16, True), (torch.float16, True)):
        with torch.autocast("cpu", precision, enabled=precision != torch.float32):
            assert resnet.channels_last("cpu") is expected
            assert not convnext.channels_last("cpu")


@pytest.mark.parametrize(
    ("name", "options", "policy"),
    [
        ("resnet50_gn", GROUP_NORM, NormPolicy()),
        ("resnet50", TINY, NormPolicy(synchronise=False)),
    ],
)
@pytest.mark.parametrize("noise", [{"drop_path_rate": 0.5}, {"drop_block_rate": 0.3}])
def test_a_devices_noise_does_not_depend_on_its_neighbours(name, options, policy, noise):
    """Without cross-task statistics nothing couples the devices, so alone or beside others gives the same."""
    backbone = make(name, {**options, **noise}).train()
    passes = [Pass(images(4, 3, 64, 64, seed=d), soft(backbone, d), (3, 7, d)) for d in range(3)]
    together = backbone(passes, policy)
    for device, order in itertools.product(range(3), (0, 1)):
        torch.manual_seed(order)
        alone = backbone([passes[device]], policy)[0]
        for got, wanted in zip(alone, together[device], strict=True):
            assert torch.equal(got, wanted)


def test_noise_differs_between_devices_steps_and_units():
    backbone = make("resnet50_gn", {**GROUP_NORM, "drop_path_rate": 0.5}).train()
    x, route = images(8, 3, 64, 64), soft(backbone)
    keys = [(3, 7, 0), (3, 7, 1), (3, 8, 0), (4, 7, 0)]
    outputs = [backbone([Pass(x, route, key)], NormPolicy())[0][-1] for key in keys]
    for one, two in itertools.combinations(outputs, 2):
        assert not torch.equal(one, two)


def test_evaluation_needs_no_gradient_and_changes_no_buffer():
    backbone = make().eval()
    before = [b.clone() for b in backbone.buffers()]
    with torch.no_grad():
        backbone([Pass(images(1, 3, 64, 64), soft(backbone))], NormPolicy())
    assert all(torch.equal(b, old) for b, old in zip(backbone.buffers(), before, strict=True))


def test_watching_backward_keeps_no_graph_in_memory():
    """Whatever a forward saves for backward is gone when its results are."""
    backbone = make().train()
    reached: list[int] = []
    backbone.after_backward = reached.append
    boxes: list[weakref.ref] = []

    class Box:
        def __init__(self, tensor: Tensor) -> None:
            self.tensor = tensor
            boxes.append(weakref.ref(self))

    with torch.autograd.graph.saved_tensors_hooks(Box, lambda box: box.tensor):
        passes = [Pass(images(2, 3, 32, 32, seed=k), soft(backbone, k)) for k in range(2)]
        features = backbone(passes, NormPolicy())
        sum(x.square().mean() for maps in features for x in maps).backward()
    assert reached == list(range(len(backbone.layers) - 1, 0, -1))
    del features
    gc.collect()
    assert boxes
    assert not any(box() for box in boxes)
