"""Lockstep execution: several inputs pass through copies of one module together, op by op.

Batch norm couples the devices of a step, so a rank that holds several devices, or runs several units of a lego layer,
must bring all of them to a norm before any can leave it. A block is traced once by torch.fx; its graph is then run
by every lane, and at batch norms the lanes wait for each other. timm's blocks stay as they are, names included.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Generator, Sequence
from typing import Any, cast

from timm.layers import BatchNormAct2d, DropBlock2d, DropPath
from torch import Tensor, fx, nn

from gppf_ds.backbone.norm import BatchNormRule

Lane = tuple[int, Tensor]
"""The unit that runs, and its input."""


def has_batch_norm(module: nn.Module) -> bool:
    return any(isinstance(child, nn.BatchNorm2d) for child in module.modules())


def is_stochastic(module: nn.Module) -> bool:
    """Whether a forward in training draws random numbers."""
    noisy = nn.modules.dropout._DropoutNd | DropPath | DropBlock2d
    return any(isinstance(m, noisy) and _rate(m) > 0 for m in module.modules())


def _rate(module: nn.Module) -> float:
    return float(getattr(module, "p", None) or getattr(module, "drop_prob", None) or 0.0)


class _Proxy(fx.Proxy):
    """Keeps ``x += y`` in place, as the block has it; fx alone makes another map of it."""

    def __iadd__(self, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", operator.iadd, (self, other), {})


class _Tracer(fx.Tracer):
    """Opens only modules that hold a batch norm."""

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, nn.BatchNorm2d) or not has_batch_norm(m)


class Lockstep:
    """Runs the units of a lego layer lane by lane.

    Units may differ in everything but their batch norms, which must be as many, and of the same widths, in each.

    Args:
        units: of the layer.

    Raises:
        torch.fx.proxy.TraceError: a forward branches on values, so that lanes could part ways.
        ValueError: the units' batch norms do not correspond.
    """

    def __init__(self, units: Sequence[nn.Module]) -> None:
        self.graphs = [list(_Tracer().trace(unit).nodes) if has_batch_norm(unit) else [] for unit in units]
        self.norms = [_norm_names(unit, graph) for unit, graph in zip(units, self.graphs, strict=True)]
        self.noisy = [{name for name, module in unit.named_modules() if is_stochastic(module)} for unit in units]
        widths = [
            [unit.get_submodule(name).num_features for name in names]
            for unit, names in zip(units, self.norms, strict=True)
        ]
        if any(own != widths[0] for own in widths):
            raise ValueError(f"the units of a layer differ in their batch norms: {widths}")

    def __call__(
        self,
        units: Sequence[nn.Module],
        lanes: Sequence[Lane],
        batch_norm: BatchNormRule,
        reseed: Callable[[int, int], None] | None = None,
    ) -> list[Tensor]:
        """The output of ``units[k](x)`` for every lane (k, x).

        Args:
            units: the units of the layer.
            lanes: what this rank runs.
            batch_norm: what batch norms in training do.
            reseed: called with (lane, position) before anything that draws random numbers.
        """
        if not self.norms[0]:
            return [_call(units[k], x, lane, 0, reseed if self.noisy[k] else None) for lane, (k, x) in enumerate(lanes)]
        # Where one unit learns, all lanes meet: those of frozen units bring the same collectives to every rank.
        meet = any(unit.training for unit in units)
        runs = [
            _run(self.graphs[k], units[k], x, lane, reseed, self.noisy[k], meet) for lane, (k, x) in enumerate(lanes)
        ]
        names = zip(*self.norms, strict=True)
        inputs, outputs = _advance(runs, [None] * len(runs))
        while not outputs:
            norms: list[Any] = [unit.get_submodule(name) for unit, name in zip(units, next(names), strict=True)]
            if meet:
                meeting = [(k, x) for (k, _), x in zip(lanes, inputs, strict=True)]
                inputs, outputs = _advance(runs, batch_norm(norms, meeting))
        return outputs


def _norm_names(unit: nn.Module, graph: Sequence[fx.Node]) -> list[str]:
    """The batch norms of a traced unit, in the order in which its forward comes to them."""
    targets = [str(node.target) for node in graph if node.op == "call_module"]
    return [target for target in targets if isinstance(unit.get_submodule(target), nn.BatchNorm2d)]


_Run = Generator[Tensor, Tensor | None, Tensor]
"""A lane under way: it hands out the input of each batch norm in training and is sent the normalised map."""


def _advance(runs: Sequence[_Run], normalised: Sequence[Tensor | None]) -> tuple[list[Tensor], list[Tensor]]:
    """Lets every lane go on to its next batch norm, or to its end: (inputs of the norm, outputs), one of them empty."""
    inputs, outputs = [], []
    for run, y in zip(runs, normalised, strict=True):
        try:
            inputs.append(run.send(y))
        except StopIteration as end:
            outputs.append(end.value)
    return inputs, outputs


def _run(
    graph: Sequence[fx.Node],
    unit: nn.Module,
    x: Tensor,
    lane: int,
    reseed: Callable[[int, int], None] | None,
    noisy: Collection[str],
    meet: bool,
) -> _Run:
    values: dict[fx.Node, Any] = {}
    for position, node in enumerate(graph):
        arguments: Any = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
        args, kwargs = arguments
        target: Any = node.target
        if node.op == "placeholder":
            values[node] = x
        elif node.op == "get_attr":
            values[node] = operator.attrgetter(target)(unit)
        elif node.op == "call_function":
            values[node] = target(*args, **kwargs)
        elif node.op == "call_method":
            values[node] = getattr(args[0], target)(*args[1:], **kwargs)
        elif node.op == "call_module":
            module: Any = unit.get_submodule(target)
            if isinstance(module, nn.BatchNorm2d) and meet:
                y = yield args[0]
                # timm's combined module: the norm and what follows it.
                values[node] = module.act(module.drop(y)) if isinstance(module, BatchNormAct2d) else y
            else:
                values[node] = _call(module, args[0], lane, position, reseed if target in noisy else None)
        else:
            return cast(Tensor, args[0])
    raise AssertionError("a traced graph ends with its output")


def _call(module: nn.Module, x: Tensor, lane: int, position: int, reseed: Callable[[int, int], None] | None) -> Tensor:
    if reseed is not None and module.training:
        reseed(lane, position)
    return cast(Tensor, module(x))
