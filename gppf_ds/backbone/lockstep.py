"""Lockstep execution: several inputs pass through copies of one module together, op by op.

Batch norm couples the devices of a step, so a rank that holds several devices, or runs several units of a lego layer,
must bring all of them to a norm before any can leave it. A block is traced once by torch.fx; its graph is then run
over all lanes, and only at batch norms do the lanes meet. timm's blocks stay as they are, names included.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

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


class _Tracer(fx.Tracer):
    """Opens only modules that hold a batch norm."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, nn.BatchNorm2d) or not has_batch_norm(m)


class Lockstep:
    """Runs structurally equal modules (the units of a lego layer) lane by lane.

    Args:
        template: any of the units; its graph stands for all.

    Raises:
        torch.fx.proxy.TraceError: the forward branches on values, so that lanes could part ways.
    """

    def __init__(self, template: nn.Module) -> None:
        self.nodes = list(_Tracer().trace(template).nodes) if has_batch_norm(template) else None

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
        if self.nodes is None:
            return [self._call(units[k], x, lane, 0, reseed) for lane, (k, x) in enumerate(lanes)]
        values: dict[fx.Node, list[Any]] = {}
        for position, node in enumerate(self.nodes):
            if node.op == "output":
                return [_lookup(node.args[0], values, lane) for lane in range(len(lanes))]
            values[node] = self._run(node, position, values, units, lanes, batch_norm, reseed)
        raise AssertionError("a traced graph ends with its output")

    def _run(
        self,
        node: fx.Node,
        position: int,
        values: dict[fx.Node, list[Any]],
        units: Sequence[nn.Module],
        lanes: Sequence[Lane],
        batch_norm: BatchNormRule,
        reseed: Callable[[int, int], None] | None,
    ) -> list[Any]:
        if node.op == "placeholder":
            return [x for _, x in lanes]
        if node.op == "get_attr":
            return [_attribute(units[k], str(node.target)) for k, _ in lanes]
        arguments = [_lookup((node.args, node.kwargs), values, lane) for lane in range(len(lanes))]
        if node.op == "call_function":
            return [node.target(*args, **kwargs) for args, kwargs in arguments]  # type: ignore[operator]
        if node.op == "call_method":
            return [getattr(args[0], str(node.target))(*args[1:], **kwargs) for args, kwargs in arguments]
        modules: list[Any] = [unit.get_submodule(str(node.target)) for unit in units]
        inputs: list[Any] = [args[0] for args, _ in arguments]
        if isinstance(modules[0], nn.BatchNorm2d) and modules[0].training:
            meeting = [(k, x) for (k, _), x in zip(lanes, inputs, strict=True)]
            normalised = batch_norm(modules, meeting)
            # timm's combined module: the norm and what follows it.
            return [
                modules[k].act(modules[k].drop(y)) if isinstance(modules[k], BatchNormAct2d) else y
                for (k, _), y in zip(lanes, normalised, strict=True)
            ]
        return [
            self._call(modules[k], x, lane, position, reseed)
            for lane, ((k, _), x) in enumerate(zip(lanes, inputs, strict=True))
        ]

    @staticmethod
    def _call(
        module: nn.Module, x: Tensor, lane: int, position: int, reseed: Callable[[int, int], None] | None
    ) -> Tensor:
        if reseed is not None and module.training and is_stochastic(module):
            reseed(lane, position)
        return module(x)


def _lookup(argument: Any, values: dict[fx.Node, list[Any]], lane: int) -> Any:
    """An argument of a graph node with one lane's values in place of the nodes."""
    return fx.node.map_arg(argument, lambda node: values[node][lane])


def _attribute(module: nn.Module, target: str) -> Any:
    for part in target.split("."):
        module = getattr(module, part)
    return module
