"""``gppf-ds verify``: the first steps of a recipe, on the ranks it runs on, against the single-process reference.

The engine goes first, on all ranks. Then rank 0 makes the same steps with the reference, with the devices of all ranks
on one process. Every step of the reference starts from the parameters and controllers that the engine had: so a rule
that does not hold shows in the step where it is broken, and rounding does not grow from step to step.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from gppf_ds.backbone.norm import BatchNormRule, NormPolicy, pooled_batch_norm
from gppf_ds.config import BackboneConfig
from gppf_ds.errors import UserError
from gppf_ds.simt.agreement import agree, describe
from gppf_ds.simt.engine import SimtEngine
from gppf_ds.simt.job import resolve_precision
from gppf_ds.simt.loss_scale import LossScale
from gppf_ds.simt.masked import Fragment
from gppf_ds.simt.reference import Reference
from gppf_ds.train.deviation import buffer_errors, relative, state_errors, update_errors
from gppf_ds.train.feed import Feed
from gppf_ds.train.recipe import Recipe
from gppf_ds.train.start import start
from gppf_ds.train.table import ruled

TOLERANCE = {"fp32": 1e-5, "bf16": 0.05, "fp16": 0.01}
"""bf16 keeps 8 bits, fp16 11. Both sides round in the same places, save where gradients meet in another order."""

LOSS_SCALE = 1024.0
"""Of the first step with fp16: what a run starts with often overflows, and a step that does proves little."""

PATIENCE = timedelta(days=1)
"""How long the ranks wait for the reference."""


@dataclass
class Observed:
    """What the engine did, as one rank saw it. Tensors are on the CPU."""

    losses: dict[tuple[int, int], float] = field(default_factory=dict)
    """By step and device."""
    scales: list[float] = field(default_factory=list)
    """The loss scale of every step."""
    changed: list[set[str]] = field(default_factory=list)
    """After every step: the parameters of which this rank saw the values or the optimizer state change."""
    values: list[dict[str, Tensor]] = field(default_factory=list)
    """Before the first and after every step: the parameters. Rank 0 keeps them all, the others the last."""
    rows: list[dict[str, Tensor]] = field(default_factory=list)
    """Before the first and after every step: the controllers."""
    buffers: dict[str, Tensor] = field(default_factory=dict)
    """Of the backbone, after the last step."""
    fragments: list[Fragment] = field(default_factory=list)
    """The optimizer state that this rank owns, after the last step."""


@dataclass
class Told:
    """What a rank tells rank 0 of it."""

    losses: dict[tuple[int, int], float]
    changed: list[set[str]]
    fragments: list[Fragment]
    digests: dict[str, str]
    """Of everything that all ranks must hold alike."""


@dataclass(frozen=True)
class Finding:
    """The verdict on one rule."""

    rule: str
    error: float
    """The worst relative error; 0 or infinite where bits are compared."""
    where: str
    tolerance: float

    @property
    def holds(self) -> bool:
        return self.error <= self.tolerance


def verify(run: Recipe, device: torch.device, steps: int, tolerance: float | None) -> bool:
    """Prints the table on rank 0, and returns on every rank whether all rules hold. A collective call.

    Args:
        run: the recipe.
        device: of this rank.
        steps: how many.
        tolerance: of relative errors; None for that of :data:`TOLERANCE`.

    Raises:
        UserError: too many steps, or none that changed anything; too little memory.
    """
    config = run.config
    precision = resolve_precision(config.engine.precision, device)
    if not 1 <= steps <= config.steps:
        raise UserError(f"--verify_steps must lie between 1 and steps ({config.steps}), not {steps}.")
    # What is compared to the fifth digit must be computed to more.
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.deterministic = True
    feed = Feed(config, config.trained(run.tasks))
    ours = _run_engine(run, feed, device, steps)
    if not any(ours.changed):
        raise UserError(f"not one of {steps} steps had finite gradients ({precision}): raise --verify_steps.")
    told = Told(ours.losses, ours.changed, ours.fragments, _digests(ours))
    main = dist.get_rank() == 0
    waiting, alone = dist.new_group(backend="gloo", timeout=PATIENCE), dist.new_group([0])
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.gather_object(told, everyone if main else None, group=waiting)
    verdict = [True]
    if main:
        limit = TOLERANCE[precision] if tolerance is None else tolerance
        rule = None if precision == "fp32" else _as_the_engine(config.backbone, alone)
        findings = _compare(run, feed, device, ours, everyone, limit, rule)
        print(table(findings, config.engine.zero_stage, precision), flush=True)
        verdict = [all(finding.holds for finding in findings)]
    dist.broadcast_object_list(verdict, group=waiting)
    return verdict[0]


def table(findings: Sequence[Finding], stage: int, precision: str) -> str:
    """rule | ZeRO stage | worst relative error | verdict."""
    rows = [("rule", "ZeRO stage", "worst relative error", "verdict")]
    for finding in findings:
        verdict = "ok" if finding.holds else f"MISMATCH (tolerance {finding.tolerance:.0e})"
        rows.append((finding.rule, f"{stage}, {precision}", f"{finding.error:.1e}  {finding.where}", verdict))
    return ruled(rows)


def _run_engine(run: Recipe, feed: Feed, device: torch.device, steps: int) -> Observed:
    """The job itself, from its first step."""
    config = run.config
    begun = start(config, run.tasks)
    agree(describe(begun.model, feed.sizes))
    engine = SimtEngine(begun.model, begun.controller, config, device)
    if engine.loss_scale:
        engine.loss_scale = LossScale(LOSS_SCALE)
    mine = [d for group in engine.devices() for d in group]
    batches = feed.batches(0, steps, dict.fromkeys(feed.sizes, 0), mine, engine.num_devices)
    seen = Observed(values=[engine.full_parameters()], rows=[_rows(engine)])
    before = _parts(engine)
    for step in range(steps):
        groups = [[feed.job(next(batches), engine) for _ in group] for group in engine.devices()]
        seen.scales.append(engine.loss_scale.value if engine.loss_scale else 1.0)
        report = engine.step(step, feed.tasks(step, engine.num_devices), groups)
        seen.losses |= {(step, d): sum(own.terms.values()) for d, own in zip(mine, report.losses, strict=True)}
        after = _parts(engine)
        seen.rows.append(_rows(engine))
        seen.values.append(engine.full_parameters())
        seen.changed.append(_changed(before, after) | _changed(seen.values[-2], seen.values[-1]))
        before = after
        if engine.rank > 0:
            del seen.values[0]
    seen.buffers = {n: b.cpu().clone() for n, b in engine.model.named_buffers() if n.startswith("backbone.")}
    seen.fragments = [replace(f, state={k: _on_cpu(v) for k, v in f.state.items()}) for f in engine.fragments()]
    return seen


def _parts(engine: SimtEngine) -> dict[str, Tensor]:
    """The parts of parameters that this rank steps and their optimizer state, under keys that start ``name@``."""
    return {
        f"{f.name}@{f.start}@{kind}": _on_cpu(value)
        for f in engine.fragments()
        for kind, value in {"master": f.master, **f.state}.items()
    }


def _rows(engine: SimtEngine) -> dict[str, Tensor]:
    return {task: _on_cpu(row) for task, row in engine.controller.logits.items()}


def _changed(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> set[str]:
    keys = [key for key, value in after.items() if key not in before or not torch.equal(value, before[key])]
    return {key.partition("@")[0] for key in keys}


def _on_cpu(value: Any) -> Tensor:
    return torch.as_tensor(value).detach().cpu().clone()


def _digests(seen: Observed) -> dict[str, str]:
    rows = {f"controller.{task}": row for task, row in seen.rows[-1].items()}
    return {
        name: hashlib.sha256(value.contiguous().view(-1).view(torch.uint8).numpy().data).hexdigest()
        for name, value in {**seen.values[-1], **seen.buffers, **rows}.items()
    }


def _compare(
    run: Recipe,
    feed: Feed,
    device: torch.device,
    ours: Observed,
    everyone: Sequence[Told],
    tolerance: float,
    rule: BatchNormRule | None,
) -> list[Finding]:
    """Makes the same steps with the reference and judges every rule."""
    begun = start(replace(run.config, backbone=replace(run.config.backbone, checkpoint=False)), run.tasks)
    model, controller = begun.model, begun.controller
    precision = resolve_precision(run.config.engine.precision, device)
    reference = Reference(model.to(device), controller.to(device), run.config, precision, rule)
    parameters, rows = dict(model.named_parameters()), dict(controller.logits.items())
    losses = {key: value for told in everyone for key, value in told.losses.items()}
    num_devices = len(losses) // len(ours.changed)
    batches = feed.batches(0, len(ours.changed), dict.fromkeys(feed.sizes, 0), range(num_devices), num_devices)
    loss_errors: dict[str, float] = {}
    parameter_errors: dict[str, float] = {}
    row_errors: dict[str, float] = {}
    moved, idle = [], 0
    for step in range(len(ours.changed)):
        _start_from(parameters, ours.values[step])
        _start_from(rows, ours.rows[step])
        prepared = [feed.prepare(next(batches), device) for _ in range(num_devices)]
        terms, users = _step(reference, step, feed.tasks(step, num_devices), prepared, ours.scales[step])
        for d, own in enumerate(terms):
            got, wanted = torch.tensor(losses[step, d]), torch.tensor(sum(own.values()))
            loss_errors[f"step {step}, device {d}"] = relative(got, wanted)
        updates = update_errors(ours.values[step + 1], parameters, ours.values[step], reference.optimizer)
        parameter_errors |= {f"step {step}, {name}": error for name, error in updates.items()}
        updates = update_errors(ours.rows[step + 1], rows, ours.rows[step], reference.controller_optimizer)
        row_errors |= {f"step {step}, {name}": error for name, error in updates.items()}
        unused = {name for name, count in users.items() if count == 0 and run.config.engine.average == "task"}
        moved += [f"step {step}, {name}" for told in everyone for name in sorted(unused & told.changed[step])]
        idle += len(unused)

    buffers = {name: buffer for name, buffer in model.named_buffers() if name in ours.buffers}
    fragments = [fragment for told in everyone for fragment in told.fragments]
    return [
        _worst("losses", loss_errors, tolerance),
        _worst("gradients (optimizer state)", state_errors(fragments, reference.optimizer, parameters), tolerance),
        _worst("parameter updates", parameter_errors, tolerance),
        _worst("controller updates", row_errors, tolerance),
        _worst("running statistics", buffer_errors(ours.buffers, buffers), tolerance),
        _exact("idle parameters untouched", moved, f"{idle} times idle"),
        _exact("ranks hold the same values", _differing(everyone), f"{len(everyone)} ranks"),
    ]


def _as_the_engine(config: BackboneConfig, alone: dist.ProcessGroup) -> BatchNormRule:
    """Cross-task batch norm of all devices on one rank, which is ``alone`` in its group, rounded as the engine rounds.

    With 16 bits another order of operations moves gradients by tens of percents, where losses choose (boxes, pixels):
    more than many a broken rule would. That the formula is right is for fp32 to say.
    """
    policy = NormPolicy(config.norm_weighting, config.norm_sync == "cross_task", alone)
    return policy if dist.get_world_size() == 1 else partial(pooled_batch_norm, policy=policy)


@torch.no_grad()
def _start_from(named: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    for name, tensor in named.items():
        tensor.copy_(values[name])


def _step(
    reference: Reference, step: int, tasks: Sequence[str], batches: Sequence[Any], loss_scale: float
) -> tuple[list[dict[str, float]], dict[str, int]]:
    try:
        return reference.step(step, tasks, batches, loss_scale)
    except torch.OutOfMemoryError as error:
        raise UserError(
            "verify computes the devices of all ranks on rank 0, whose memory is too small for that: lower the tasks' "
            "batch_size on the command line (--tasks.NAME.init_args.batch_size)."
        ) from error


def _differing(everyone: Sequence[Told]) -> list[str]:
    """The values of which a rank has another copy than rank 0."""
    first = everyone[0].digests
    return [
        f"{name}, rank {r}" for r, told in enumerate(everyone) for name in first if told.digests[name] != first[name]
    ]


def _worst(rule: str, errors: Mapping[str, float], tolerance: float) -> Finding:
    """A value that is no number is the worst of all."""
    where = max(errors, key=lambda name: float("inf") if errors[name] != errors[name] else errors[name], default="")
    return Finding(rule, errors.get(where, 0.0), where, tolerance)


def _exact(rule: str, differing: Sequence[str], note: str) -> Finding:
    return Finding(rule, float("inf") if differing else 0.0, differing[0] if differing else note, 0.0)
