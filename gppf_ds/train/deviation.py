"""How far an engine is from the reference, in numbers that rounding alone leaves small.

An error is the norm of the difference of two tensors over the norm of the wanted one. What rounding alone decides must
not count, so each denominator has a floor, and what Adam stepped is compared in Adam's own metric:

* Gradients show in the optimizer's state (momentum, moments), whatever the learning rate. A tensor whose gradient is 0
  in exact arithmetic (a bias in front of a batch norm) holds rounding noise; its error is taken relative to the root
  mean square of that kind of state over the whole model.
* Parameters are compared relative to their change in the step, since in a warm-up the change is small; but not to less
  than 1 % of their value, below which fp32 has no digits for it.
* Adam divides a gradient by its own size, and so blows noise up to full steps. Elements that it stepped are weighted by
  the root of their second moment, which takes that factor away again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from gppf_ds.simt.masked import Fragment

Tensors = Mapping[str, Tensor]


def state_errors(fragments: Sequence[Fragment], optimizer: torch.optim.Optimizer, named: Tensors) -> dict[str, float]:
    """Of every optimizer state; infinite where only one side has it.

    Args:
        fragments: of all ranks of the engine.
        optimizer: of the reference.
        named: its parameters.
    """
    parts: dict[tuple[str, str], list[tuple[int, Tensor]]] = {}
    for fragment in fragments:
        for kind, value in fragment.state.items():
            parts.setdefault((fragment.name, kind), []).append((fragment.start, value))
    got = {key: _joined(values) for key, values in parts.items()}
    wanted = {
        (name, kind): value.detach().cpu().reshape(-1)
        for name, parameter in named.items()
        for kind, value in optimizer.state.get(parameter, {}).items()
        if value is not None
    }
    floors = {kind: rms([value for (_, other), value in wanted.items() if other == kind]) for _, kind in wanted}
    errors = {".".join(key): relative(got[key], wanted[key], floors[key[1]]) for key in wanted.keys() & got.keys()}
    return errors | {".".join(key): float("inf") for key in wanted.keys() ^ got.keys()}


def _joined(parts: Sequence[tuple[int, Tensor]]) -> Tensor:
    """A whole flat state tensor; the one number of a state that is one number, which every part repeats."""
    ordered = [value for _, value in sorted(parts, key=lambda part: part[0])]
    return ordered[0].view(-1) if ordered[0].dim() == 0 else torch.cat([value.view(-1) for value in ordered])


def update_errors(got: Tensors, named: Tensors, start: Tensors, optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """Of what one optimizer step made of every parameter.

    Args:
        got: the engine's parameters after the step.
        named: the reference's.
        start: before the step, the same for both.
        optimizer: of the reference.
    """
    moments = {name: optimizer.state.get(p, {}).get("exp_avg_sq") for name, p in named.items()}
    metric = {n: torch.ones(()) if moment is None else moment.sqrt().cpu() for n, moment in moments.items()}
    wanted = {name: p.detach().cpu() for name, p in named.items()}
    updates = {name: (wanted[name] - start[name]) * metric[name] for name in wanted}
    floor = rms(list(updates.values()))
    errors = {}
    for name, value in wanted.items():
        at_least = torch.stack([updates[name].double().norm(), 0.01 * (value * metric[name]).double().norm()]).max()
        difference = ((got[name] - value) * metric[name]).double().norm()
        errors[name] = float(difference / at_least.clamp_min(max(floor * value.numel() ** 0.5, 1e-30)))
    return errors


def buffer_errors(got: Tensors, wanted: Tensors) -> dict[str, float]:
    """Of every buffer in ``wanted``, with a floor for each kind (running_mean, running_var, ...)."""
    kinds = {name: name.rpartition(".")[2] for name in wanted}
    floors = {kind: rms([b for n, b in wanted.items() if kinds[n] == kind]) for kind in kinds.values()}
    return {name: relative(got[name], buffer.cpu(), floors[kinds[name]]) for name, buffer in wanted.items()}


def relative(got: Tensor, wanted: Tensor, floor: float = 0.0) -> float:
    """Norm of the difference over norm of what is wanted, an element of which counts as ``floor`` at least."""
    at_least = wanted.double().norm().clamp_min(max(floor * wanted.numel() ** 0.5, 1e-30))
    return float((got.double() - wanted.double()).norm() / at_least)


def rms(tensors: Sequence[Tensor]) -> float:
    """The root mean square of all elements together."""
    count = sum(tensor.numel() for tensor in tensors)
    return (sum(float(tensor.double().square().sum()) for tensor in tensors) / count) ** 0.5
