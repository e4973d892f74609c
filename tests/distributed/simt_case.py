"""Cases of the exactness matrix: five steps of the engine on real ranks against the single-process reference.

Run on every rank with a json list of cases as its only argument; rank 0 prints the worst relative error of each case,
and how far it ends from the first.
"""

from __future__ import annotations

import json
import sys

import torch
from dense_head import DenseHead
from torch import Tensor, nn

from distributed import reference
from gppf_ds.backbone.controller import Controller
from gppf_ds.backbone.lego import LegoBackbone, Pass
from gppf_ds.config import BackboneConfig, ControllerConfig, EngineConfig, OptimizerConfig, RunConfig, ScheduleConfig
from gppf_ds.simt.engine import SimtEngine, StepReport
from gppf_ds.simt.job import start_distributed
from gppf_ds.simt.model import Job, SimtModel
from gppf_ds.simt.optimizer import learning_rate
from gppf_ds.simt.reduction import ALONE_BYTES
from gppf_ds.simt.schedule import Schedule
from gppf_ds.tasks.task import Batch, Head

STEPS = 5
SHAPES = {"a": (4, 3, 32, 32), "b": (2, 3, 48, 32), "c": (3, 3, 32, 64), "idle": (2, 3, 32, 32)}
WEIGHTS = {"a": 2.0, "b": 1.0, "c": 1.0, "idle": 0.05}


Targets = tuple[Tensor, float]
"""Labels, and a factor on the loss: 1, or nan on a device that is to fail."""


class PoolHead(Head):
    def __init__(self, channels: int, outputs: int) -> None:
        super().__init__()
        self.linear = nn.Linear(channels, outputs)

    def loss(self, features: list[Tensor], targets: Targets) -> dict[str, Tensor]:
        labels, factor = targets
        return {"loss": factor * nn.functional.cross_entropy(self.linear(features[-1].mean((2, 3))), labels)}

    def predict(self, features: list[Tensor], targets: Targets) -> list[Tensor]:
        return list(self.linear(features[-1].mean((2, 3))))


@torch.no_grad()
def leave_zero(model: nn.Module, controller: Controller) -> None:
    """Moves all away from the zeros that biases, last norms and controllers start with: relative errors need a size."""
    for parameter in model.parameters():
        parameter += 0.1 * torch.randn_like(parameter)
    for row in controller.logits.values():
        row += torch.randn_like(row)


def build(config: RunConfig) -> tuple[SimtModel, Controller, Schedule]:
    backbone = LegoBackbone(config.backbone, config.seed)
    backbone.layers[1].before = nn.AvgPool2d(3, stride=2, padding=1)  # a max has kinks; see configuration
    torch.manual_seed(1)
    channels = backbone.channels
    heads = {
        "a": PoolHead(channels[-1], 5),
        "b": DenseHead(channels[1]),
        "c": PoolHead(channels[-1], 5),
        "idle": PoolHead(channels[-1], 7),
    }
    model = SimtModel(backbone, heads, {"a": 1.0, "b": 0.5, "c": 1.0, "idle": 1.0})
    controller = Controller(list(heads), backbone.units)
    leave_zero(model, controller)
    schedule = Schedule.from_weights(WEIGHTS, ScheduleConfig(), config.seed)
    return model, controller, schedule


def batch(step: int, device: int, task: str, failing: bool = False) -> Batch:
    generator = torch.Generator().manual_seed(1000 * step + device)
    shape = SHAPES[task]
    images = torch.randn(shape, generator=generator) * (1 + device) + device
    labels = torch.randint(5, (shape[0],), generator=generator)
    return Batch(images, (labels, float("nan") if failing else 1.0))


def tasks_of(schedule: Schedule, step: int, num_devices: int) -> list[str]:
    return [schedule.tasks[t] for t in schedule(step, num_devices)]


def uses(name: str, task: str, path: tuple[int, ...] | None) -> bool:
    """Whether a device with this task and path uses a parameter."""
    parts = name.split(".")
    if parts[0] == "heads":
        return parts[2] == task
    return path is None or path[int(parts[2])] == int(parts[4])


def reference_run(
    config: RunConfig, num_devices: int, groups: list[list[int]], failing: list[list[int]]
) -> tuple[SimtModel, Controller, list]:
    """The reference's network, controllers, and which parameters were used in each step.

    Args:
        config: of the run.
        num_devices: of all ranks.
        groups: which devices share batch statistics: all of one accumulation group, over all ranks.
        failing: (step, device) whose loss is not finite: they take part in batch statistics and in nothing else.
    """
    model, controller, schedule = build(config)
    model.train()
    holder = type("Routes", (), {"controller": controller, "config": config})
    parameters = dict(model.named_parameters())
    wd = config.optimizer.weight_decay
    param_groups = [
        {"params": [p for p in parameters.values() if p.dim() > 1], "weight_decay": wd},
        {"params": [p for p in parameters.values() if p.dim() <= 1], "weight_decay": 0.0},
    ]
    if config.optimizer.name == "sgd":
        optimizer = torch.optim.SGD(param_groups, lr=0.1, momentum=config.optimizer.momentum)
    else:
        optimizer = torch.optim.AdamW(param_groups, lr=0.1, eps=config.optimizer.epsilon)
    adam = torch.optim.Adam(controller.parameters(), lr=config.controller.learning_rate)
    usage = []
    for step in range(STEPS):
        tasks = tasks_of(schedule, step, num_devices)
        totals: dict[str, Tensor] = {}
        rows: list[Tensor] = [torch.zeros(()) for _ in tasks]
        valid = [[step, d] not in failing for d in range(num_devices)]
        routes = [SimtEngine.route(holder, task, step, device) for device, task in enumerate(tasks)]
        for group in groups:
            batches = [batch(step, d, tasks[d]) for d in group]
            maps = reference.features(model.backbone.layers, [b.images for b in batches], [routes[d] for d in group])
            losses = [
                sum(model.heads.bank[tasks[d]].loss(m, b.targets).values()) * model.heads.loss_weights[tasks[d]]
                for d, m, b in zip(group, maps, batches, strict=True)
                if valid[d]
            ]
            weights = [routes[d].weights for d in group]
            total = sum(losses, 0.0 * maps[0][-1].sum())  # of something even where every device fails
            gradients = torch.autograd.grad(total, [*parameters.values(), *weights], materialize_grads=True)
            for name, gradient in zip(parameters, gradients, strict=False):
                totals[name] = totals.get(name, 0) + gradient
            for d, gradient in zip(group, gradients[len(parameters) :], strict=True):
                rows[d] = torch.autograd.grad(routes[d].weights, controller.logits[tasks[d]], gradient)[0]

        world = num_devices if config.engine.average == "world" else 0
        usage.append({})
        for name, parameter in parameters.items():
            users = sum(uses(name, tasks[d], routes[d].path) for d in range(num_devices) if valid[d])
            parameter.grad = totals[name] / (world or users) if world or users else None
            usage[-1][name] = users > 0
        for task, row in controller.logits.items():
            users = [d for d in range(num_devices) if tasks[d] == task and valid[d]]
            total = sum((rows[d] for d in users), torch.zeros_like(row))
            row.grad = total / (world or len(users)) if world or users else None
        if config.optimizer.clip_norm:
            nn.utils.clip_grad_norm_(parameters.values(), config.optimizer.clip_norm)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, config)
        optimizer.step()
        adam.step()
    return model, controller, usage


def relative(got: Tensor, wanted: Tensor) -> float:
    return float((got.double() - wanted.double()).norm() / wanted.double().norm().clamp_min(1e-12))


def configuration(case: dict) -> RunConfig:
    routing = case.get("routing", "soft")
    return RunConfig(
        output="unused",
        steps=2 * STEPS,
        seed=3,
        backbone=BackboneConfig(
            # Nothing with a kink, where rounding decides between two gradients that differ by more than rounding.
            options={"layers": [1, 1, 1, 1], "channels": [4, 8, 8, 8], "act_layer": "gelu"},
            routing=routing,
            checkpoint=case.get("checkpoint", False),
        ),
        # In hard mode a unit followed by convolution and batch norm alone has no gradient with respect to its factor
        # but rounding noise, which Adam would blow up to full steps: there the rows stand still.
        controller=ControllerConfig(learning_rate=0.01 if routing == "soft" else 0.0),
        optimizer=OptimizerConfig(
            name=case.get("optimizer", "sgd"),
            learning_rate=case.get("learning_rate", 0.02),
            weight_decay=0.05,
            # Near a gradient of 0 Adam multiplies its rounding, up to 1e-5 here, by learning rate / epsilon.
            epsilon=1e-3,
            clip_norm=case.get("clip", 0.0),
        ),
        engine=EngineConfig(
            zero_stage=case.get("stage", 0),
            precision=case.get("precision", "fp32"),
            devices_per_rank=case.get("devices", 1),
            accumulation=case.get("accumulation", 1),
            offload_optimizer=case.get("offload", False),
            average=case.get("average", "task"),
            timeout=60,
        ),
    )


def snapshot(engine: SimtEngine) -> dict[tuple[str, int], dict[str, Tensor]]:
    """Values and optimizer state of every parameter part on this rank."""
    return {
        (f.name, f.start): {"values": f.master.clone(), **{k: torch.as_tensor(v).clone() for k, v in f.state.items()}}
        for f in engine.fragments()
    }


def engine_run(engine: SimtEngine, schedule: Schedule, failing: list[list[int]]) -> list[StepReport]:
    """Five steps; under the task average what no device uses in one must come out of it bit for bit as it went in."""
    reports = []
    for step in range(STEPS):
        tasks = tasks_of(schedule, step, engine.num_devices)
        groups = []
        for group in engine.devices():
            jobs = []
            for d in group:
                data = batch(step, d, tasks[d], [step, d] in failing)
                passing = Pass(data.images, engine.route(tasks[d], step, d), (engine.config.seed, step, d))
                jobs.append(Job(d, tasks[d], data, passing))
            groups.append(jobs)
        before = snapshot(engine)
        report = engine.step(step, tasks, groups)
        reports.append(report)
        for part, state in snapshot(engine).items():
            if report.counts[engine.owners[part[0]]] == 0 and engine.config.engine.average == "task":
                assert state.keys() == before[part].keys(), part
                assert all(torch.equal(state[kind], before[part][kind]) for kind in state), part
    return reports


def run(case: dict, device: torch.device, first: dict[str, Tensor]) -> dict[str, Tensor]:
    """One case; returns the parameters that it ends with. ``first`` are those of the first case."""
    config, failing = configuration(case), case.get("failing", [])
    model, controller, schedule = build(config)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    engine = SimtEngine(model, controller, config, device)
    engine.reduction.bucket_bytes = case.get("bucket_bytes", 0)  # 0: every layer's gradients leave on their own
    engine.reduction.alone_bytes = case.get("alone_bytes", ALONE_BYTES)
    if engine.loss_scale:
        engine.loss_scale.value = case.get("loss_scale", 1024.0)
    reports = engine_run(engine, schedule, failing)
    overflowed = [step for step, report in enumerate(reports) if report.skipped == "loss_scale_overflow"]
    failing = failing + [[step, d] for step in overflowed for d in range(engine.num_devices)]

    groups, span = config.engine.accumulation, engine.num_devices // config.engine.accumulation
    sharing = [list(range(g * span, (g + 1) * span)) for g in range(groups)]
    wanted, wanted_controller, usage = reference_run(config, engine.num_devices, sharing, failing)
    parameters = {name: p.detach() for name, p in engine.full_parameters().items()}
    values = {**parameters, **dict(engine.model.named_buffers())}
    # With 16 bits only how far a parameter moved says something: all of it is mostly where it started.
    origin = {} if config.engine.precision == "fp32" else start
    errors = {
        name: relative(values[name] - origin.get(name, 0), tensor.detach() - origin.get(name, 0))
        for name, tensor in [*wanted.named_parameters(), *wanted.named_buffers()]
    }
    for task, row in wanted_controller.logits.items():
        errors[f"controller.{task}"] = relative(engine.controller.logits[task].detach(), row.detach())
    for step, report in enumerate(reports):
        for name, used in usage[step].items():
            assert used == (report.counts[engine.owners[name]] > 0), (step, name)
    idle = [name for name in usage[0] if not all(step[name] for step in usage)]
    if engine.rank == 0:
        worst = max(errors, key=errors.__getitem__)
        result = {"worst": worst, "error": errors[worst], "sometimes_idle": len(idle), "overflowed": overflowed}
        result["from_first"] = max((relative(parameters[name], value) for name, value in first.items()), default=0.0)
        print("RESULT", json.dumps(result), flush=True)
    return parameters


def main() -> None:
    torch.set_num_threads(1)
    device = start_distributed(60.0)
    first: dict[str, Tensor] = {}
    for case in json.loads(sys.argv[1]):
        parameters = run(case, device, first)
        first = first or parameters


if __name__ == "__main__":
    main()
