"""Heads run apart from the graph; their gradients must be those of ordinary end-to-end autograd."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from dense_head import DenseHead
from torch import Tensor, nn

from gppf_ds.backbone.controller import Controller
from gppf_ds.backbone.lego import LegoBackbone, Pass
from gppf_ds.backbone.norm import NormPolicy
from gppf_ds.config import BackboneConfig
from gppf_ds.errors import UserError
from gppf_ds.simt.model import Job, SimtModel
from gppf_ds.tasks.task import Batch, Head

torch.set_num_threads(1)

LOSS_WEIGHTS = {"cls": 1.0, "dense": 0.5, "idle": 2.0}
SHAPES = {"cls": (3, 3, 64, 64), "dense": (2, 3, 64, 96)}


class ClsHead(Head):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.dropout = nn.Dropout(0.5)
        self.linear = nn.Linear(channels, 5)
        self.frozen = nn.Parameter(torch.ones(2), requires_grad=False)

    def loss(self, features: list[Tensor], targets: Any) -> dict[str, Tensor]:
        labels, factor = targets
        pooled = self.dropout(features[-1].mean((2, 3)))
        return {"ce": nn.functional.cross_entropy(self.linear(pooled), labels) * factor}

    def predict(self, features: list[Tensor], targets: Any) -> list[Tensor]:
        return list(self.linear(features[-1].mean((2, 3))))


def build(batch_norm: NormPolicy | None = None) -> SimtModel:
    backbone = LegoBackbone(BackboneConfig(options={"layers": [1, 1, 1, 1], "channels": [4, 4, 8, 8]}))
    torch.manual_seed(1)
    channels = backbone.channels
    heads = {"cls": ClsHead(channels[-1]), "dense": DenseHead(channels[1]), "idle": ClsHead(channels[-1])}
    model = SimtModel(backbone, heads, LOSS_WEIGHTS, batch_norm)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn_like(p)
    return model.train()


def jobs_of(controller: Controller, tasks: list[str], factors: list[float] | None = None) -> list[Job]:
    made = []
    for device, task in enumerate(tasks):
        generator = torch.Generator().manual_seed(device)
        images = torch.randn(SHAPES[task], generator=generator)
        factor = 1.0 if factors is None else factors[device]
        targets = (torch.randint(5, (len(images),), generator=generator), factor)
        route = controller.soft_route(task, controller.noise(0, 0, device), 1.0)
        made.append(Job(device, task, Batch(images, targets), Pass(images, route, (0, 0, device))))
    return made


def end_to_end(model: SimtModel, jobs: list[Job], keep: list[int]) -> Tensor:
    """What the step means: the weighted losses in one graph, dropout off."""
    features = model.backbone([job.passing for job in jobs], model.batch_norm)
    losses = [
        sum(model.heads.bank[job.task].loss(maps, job.batch.targets).values()) * LOSS_WEIGHTS[job.task]
        for job, maps in zip(jobs, features, strict=True)
    ]
    return sum(losses[device] for device in keep)


def no_dropout(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0


def assert_same_gradients(got: nn.Module, wanted: nn.Module, tolerance: float = 1e-4) -> None:
    for (name, p), q in zip(got.named_parameters(), wanted.parameters(), strict=True):
        reference = torch.zeros_like(q) if q.grad is None else q.grad
        value = torch.zeros_like(p) if p.grad is None else p.grad
        torch.testing.assert_close(value, reference, rtol=tolerance, atol=1e-6, msg=name)


@pytest.mark.parametrize("loss_scale", [1.0, 1024.0])
@pytest.mark.parametrize("tasks", [["cls"], ["dense"], ["cls", "dense"], ["cls", "cls", "dense", "cls"]])
def test_gradients_are_those_of_end_to_end_autograd(tasks, loss_scale):
    model = build()
    no_dropout(model)
    controller = Controller(list(LOSS_WEIGHTS), model.backbone.units)
    twin, other = copy.deepcopy(model), copy.deepcopy(controller)
    loss, outcomes, _ = model(jobs_of(controller, tasks), loss_scale)
    (loss * loss_scale).backward()  # as a loss scaler does it
    wanted = end_to_end(twin, jobs_of(other, tasks), list(range(len(tasks))))
    (wanted * loss_scale).backward()
    torch.testing.assert_close(loss, wanted)
    assert_same_gradients(model, twin)
    assert_same_gradients(controller, other)
    assert all(outcome.finite for outcome in outcomes)
    assert [sorted(o.terms) for o in outcomes] == [["ce"] if t == "cls" else ["far", "near"] for t in tasks]
    assert all(p.grad is None for p in model.heads.bank["idle"].parameters())
    if "dense" in tasks:
        assert not model.heads.bank["dense"].unused.grad.any()


def test_terms_are_unweighted_and_the_sum_is_weighted():
    model = build()
    controller = Controller(list(LOSS_WEIGHTS), model.backbone.units)
    loss, (outcome,), _ = model(jobs_of(controller, ["dense"]))
    assert float(loss.detach()) == pytest.approx(0.5 * sum(outcome.terms.values()), rel=1e-5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("who", [0, 2])
def test_a_non_finite_loss_drops_its_device_alone(bad, who):
    model = build()
    no_dropout(model)
    tasks = ["cls", "cls", "dense"]
    factors = [bad if device == who else 1.0 for device in range(3)]
    controller = Controller(list(LOSS_WEIGHTS), model.backbone.units)
    twin, other = copy.deepcopy(model), copy.deepcopy(controller)
    loss, outcomes, _ = model(jobs_of(controller, tasks, factors))
    loss.backward()
    kept = [device for device in range(3) if device != who]
    wanted = end_to_end(twin, jobs_of(other, tasks), kept)
    wanted.backward()
    assert [o.finite for o in outcomes] == [device != who for device in range(3)]
    torch.testing.assert_close(loss, wanted)
    assert_same_gradients(model, twin)
    assert_same_gradients(controller, other)


class Cliff(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * float("inf")


class CliffHead(ClsHead):
    def loss(self, features: list[Tensor], targets: Any) -> dict[str, Tensor]:
        return super().loss([Cliff.apply(x) for x in features], targets)


def test_a_finite_loss_with_a_non_finite_gradient_is_dropped_too():
    model = build()
    model.heads.bank["cls"].__class__ = CliffHead
    controller = Controller(list(LOSS_WEIGHTS), model.backbone.units)
    loss, (first, second), _ = model(jobs_of(controller, ["cls", "dense"]))
    loss.backward()
    assert not first.finite
    assert second.finite
    assert torch.isfinite(torch.tensor(first.terms["ce"]))
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in model.parameters())
    assert not model.heads.bank["cls"].linear.weight.grad.any()


def test_no_finite_device_at_all_gives_zeros():
    model = build()
    controller = Controller(list(LOSS_WEIGHTS), model.backbone.units)
    loss, outcomes, _ = model(jobs_of(controller, ["cls"], [float("nan")]))
    loss.backward()
    assert loss == 0
    assert not outcomes[0].finite
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_a_heads_noise_does_not_depend_on_its_neighbours():
    """Without cross-task statistics nothing couples the devices: losses must be the same alone and beside others."""
    model = build(NormPolicy(synchronise=False))
    controller = Controller(list(LOSS_WEIGHTS), model.backbone.units)
    jobs = jobs_of(controller, ["cls", "dense", "cls"])
    together = model(jobs)[1]
    for order, job in enumerate(jobs):
        torch.manual_seed(order)
        assert model([job])[1][0].terms == together[job.device].terms
    assert together[0].terms != together[2].terms


def test_prediction_uses_the_path_and_keeps_no_graph():
    model = build().eval()
    controller = Controller(list(LOSS_WEIGHTS), model.backbone.units)
    (job,) = jobs_of(controller, ["dense"])
    predictions = model.predict("dense", job.batch, job.passing)
    assert len(predictions) == 2
    assert predictions[0].shape == (2, 16, 24)
    assert not predictions[0].requires_grad


def test_what_does_not_learn_rests() -> None:
    model = build()
    model.freeze_all_but(["heads.bank.cls.linear.*", "backbone.layers.2.units.1.*"])
    model.eval().train()
    learning = {name.rpartition(".")[0] for name, p in model.named_parameters() if p.requires_grad}
    assert all(name.startswith(("heads.bank.cls.linear", "backbone.layers.2.units.1")) for name in learning)
    norms = {n: m.training for n, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)}
    assert {name for name, training in norms.items() if training} == {n for n in norms if "layers.2.units.1" in n}
    assert model.heads.bank["cls"].dropout.training
    assert not model.heads.bank["cls"].frozen.requires_grad
    with pytest.raises(
        UserError, match=r"trainable: no parameter's name fits 'heads.bank.cls.lin.*there is heads.bank.cls"
    ):
        model.freeze_all_but(["heads.bank.cls.lin.*"])


def test_frozen_units_normalise_with_their_running_statistics() -> None:
    """In one layer with units that learn, and with the gradient that a plain batch norm in evaluation mode has."""
    frozen, learns = (nn.BatchNorm2d(3) for _ in range(2))
    for norm in (frozen, learns):
        norm.running_mean.uniform_(-1, 1)
        norm.running_var.uniform_(0.5, 2)
    frozen.eval().requires_grad_(False)
    before = copy.deepcopy(frozen.state_dict())
    xs = [torch.randn(2, 3, 4, 4, requires_grad=True) for _ in range(3)]
    outputs = NormPolicy()([frozen, learns], [(0, xs[0]), (1, xs[1]), (0, xs[2])])
    weights = [torch.randn_like(y) for y in outputs]
    grads = torch.autograd.grad(sum((y * w).sum() for y, w in zip(outputs, weights, strict=True)), xs)
    plain = [frozen(xs[0]), copy.deepcopy(learns)(xs[1]), frozen(xs[2])]
    wanted = torch.autograd.grad(sum((y * w).sum() for y, w in zip(plain, weights, strict=True)), xs)
    for got, want in zip((*outputs, *grads), (*plain, *wanted), strict=True):
        assert torch.allclose(got, want, atol=1e-6)
    assert all(torch.equal(value, before[name]) for name, value in frozen.state_dict().items())
    assert learns.num_batches_tracked == 1
