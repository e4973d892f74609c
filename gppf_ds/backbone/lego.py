"""The lego backbone: layers of N candidate units, through which every task finds its own path (GPPF section 3.2)."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import timm
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gppf_ds.backbone import convnext, resnet, swin, vit
from gppf_ds.backbone.blocks import Block, Family
from gppf_ds.backbone.controller import Route
from gppf_ds.backbone.lockstep import Lane, Lockstep, is_stochastic
from gppf_ds.backbone.memory_format import memory_format
from gppf_ds.backbone.moe.convert import add_experts
from gppf_ds.backbone.moe.layer import MoeLayer
from gppf_ds.backbone.moe.layout import Layout
from gppf_ds.backbone.norm import BatchNormRule
from gppf_ds.config import BackboneConfig
from gppf_ds.errors import UserError
from gppf_ds.seeding import FORWARD, INIT, seed_global_generators

FAMILIES: dict[str, Family] = {
    "resnet": resnet.FAMILY,
    "swin_transformer": swin.FAMILY,
    "swin_transformer_v2": swin.FAMILY,
    "convnext": convnext.FAMILY,
    "vision_transformer": vit.FAMILY,
    "deit": vit.FAMILY,
}
"""How timm models come apart into blocks, by timm's module that defines them."""


@dataclass
class Pass:
    """One device's way through the backbone in one step."""

    images: Tensor
    """(B, 3, H, W)."""
    route: Route
    key: tuple[int, int, int] = field(default=(0, 0, 0))
    """(seed, step, device): the randomness of this pass."""
    sizes: Tensor | None = None
    """(B, 2), heights and widths of the images before they were padded at the right and at the bottom; None where none
    was. Tokens of padding choose no experts."""
    statistics: dict[str, Tensor] = field(default_factory=dict)
    """Left by the backbone, by MoE layer: what the tokens chose, see :class:`gppf_ds.backbone.moe.call.Call`."""


class LegoLayer(nn.Module):
    """One layer of the backbone and its candidate units.

    Args:
        blocks: the block of every unit that the layer holds; a layer that dropped units has gaps in the numbers.
        index: of the layer.
    """

    def __init__(self, blocks: Mapping[int, Block], index: int) -> None:
        super().__init__()
        first = next(iter(blocks.values()))
        self.index = index
        self.name = first.name
        self.timm_name = first.timm_name
        self.tap = first.tap
        self.before = first.before
        self.units = nn.ModuleDict({str(unit): block.module for unit, block in blocks.items()})
        self.slots = {unit: slot for slot, unit in enumerate(blocks)}
        self.moe_parts: list[str] = getattr(first.module, "parts", [])
        """Which parts of the (then only) unit have token-level experts: ``attn``, ``mlp``."""
        if self.moe_parts:
            self.noisy = is_stochastic(first.module)
            return
        try:
            self.lockstep = Lockstep(list(self.units.values()))
        except ValueError as error:
            raise UserError(f"layer {self.name}: {error}. Choose other backbone.unit_blocks.") from error

    def forward(self, passes: Sequence[Pass], batch_norm: BatchNormRule, *xs: Tensor) -> tuple[Tensor, ...]:
        """y = sum_k u[k] * M_k(x) for every device (equation 1); one unit for a hard route.

        Tensors come and go as plain arguments, where module hooks (ZeRO-3's among them) find them.

        Args:
            passes: the devices' routes.
            batch_norm: what batch norms in training do.
            xs: the devices' maps.
        """
        if self.moe_parts:
            return self._with_experts(passes, xs)
        lanes: list[Lane] = []
        owners: list[tuple[int, int]] = []
        for device, (x, one) in enumerate(zip(xs, passes, strict=True)):
            x = self.before(x)
            for unit in self.slots if one.route.path is None else [one.route.path[self.index]]:
                lanes.append((self.slots[unit], x))
                owners.append((device, unit))

        def reseed(lane: int, position: int) -> None:
            device, unit = owners[lane]
            seed, step, device = passes[device].key
            seed_global_generators(seed, FORWARD, step, device, self.index, unit, position)

        outputs = self.lockstep(list(self.units.values()), lanes, batch_norm, reseed)
        mixed = []
        for device, one in enumerate(passes):
            units = [unit for owner, unit in owners if owner == device]
            ys = [y for (owner, _), y in zip(owners, outputs, strict=True) if owner == device]
            if one.route.path is None or one.route.weights.requires_grad:
                mixed.append(_WeightedSum.apply(_of_units(one.route.weights[self.index], units), *ys))
            else:
                mixed.append(ys[0])
        return tuple(mixed)

    def _with_experts(self, passes: Sequence[Pass], xs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The devices' maps, followed by the statistics of every MoE layer of the first device, of the second, ..."""
        unit = next(iter(self.units.values()))
        outputs, statistics = [], []
        for one, x in zip(passes, xs, strict=True):
            if unit.training and self.noisy:
                seed, step, device = one.key
                seed_global_generators(seed, FORWARD, step, device, self.index)
            height, width = one.images.shape[-2:]
            y, *own = unit(self.before(x), one.route.task, (height, width), one.sizes)
            outputs.append(y)
            statistics += own
        return (*outputs, *statistics)


def _of_units(weights: Tensor, units: Sequence[int]) -> Tensor:
    """Those (n,) of ``weights`` (max units,). Indices as a list would be sent to a GPU, and waited for."""
    first, last = units[0], units[-1]
    if list(units) == list(range(first, last + 1)):
        return weights[first : last + 1]
    return torch.stack([weights[unit] for unit in units])


class _WeightedSum(torch.autograd.Function):
    """sum_k weights[k] * ys[k], without a map in between: written out, autograd makes one for every product."""

    @staticmethod
    def forward(ctx: Any, weights: Tensor, *ys: Tensor) -> Tensor:
        ctx.save_for_backward(weights, *ys)
        weights = weights.to(ys[0].dtype)
        total = ys[0] * weights[0]
        for weight, y in zip(weights[1:], ys[1:], strict=True):
            total.addcmul_(y, weight)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        weights, *ys = ctx.saved_tensors
        (grad,) = grads
        # A gradient in another memory layout than the maps would slow down all that comes before.
        order = memory_format(ys[0])
        grad = grad.contiguous(memory_format=order)
        last = order is torch.channels_last
        flat, *flat_ys = ((x.movedim(1, -1) if last else x).reshape(-1) for x in (grad, *ys))
        dots = torch.stack([torch.dot(flat, y) for y in flat_ys]).to(weights.dtype)
        return dots, *(grad * weight for weight in weights.to(grad.dtype))


class _ForHead(torch.autograd.Function):
    """A channels-last map in the usual order, which heads may count on; its gradient comes back channels-last."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.contiguous()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0].contiguous(memory_format=torch.channels_last)


class LegoBackbone(nn.Module):
    """A timm model whose every block has N candidates.

    Args:
        config: the timm model, its options and the number of units.
        seed: of the run; unit k of every layer comes from the k-th independently initialised model.
        kept: the units that every layer still holds (the sparse phase drops the others); all of them by default.
        tasks: names, for the routers of token-level experts (``config.moe``).
        layout: the experts that there are, and who may choose them; by default as configured.

    Attributes:
        layers: the lego layers, first to last.
        units: how many units every layer had at the start, dropped ones included.
        channels, strides: of the feature maps that :meth:`forward` returns, finest first.
        timm_options: keyword arguments of ``timm.create_model`` for the model that a path loads into.

    Raises:
        UserError: timm has no such model, it comes apart in no known way, or the units do not fit it.
    """

    def __init__(
        self,
        config: BackboneConfig,
        seed: int = 0,
        kept: Sequence[Sequence[int]] | None = None,
        tasks: Sequence[str] = (),
        layout: Layout | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.family = _family(config)
        self.timm_options: dict[str, Any] = {**self.family.options, **config.options, "num_classes": 0}
        self._undecayed: set[str] = set()
        first = self._blocks(seed, 0)
        self.layout = None if config.moe is None else add_experts(first, config.moe, tasks, layout)
        self.units = _units_per_layer(config, len(first))
        candidates = [first, *(self._blocks(seed, k) for k in range(1, max(self.units)))]
        layers = []
        for index, count in enumerate(self.units):
            wanted = range(count) if kept is None else kept[index]
            layers.append(LegoLayer({unit: candidates[unit][index] for unit in wanted}, index))
        self.layers = nn.ModuleList(layers)
        taps = [block.tap for block in first if block.tap is not None]
        self.channels = tuple(tap.channels for tap in taps)
        self.strides = tuple(tap.stride for tap in taps)
        self.after_backward: Callable[[int], None] | None = None
        """Called with a layer's index as soon as backward is done with that layer (not for the first one)."""

    def _blocks(self, seed: int, unit: int) -> list[Block]:
        seed_global_generators(seed, INIT, "unit", unit)
        name = self.config.name
        try:
            model = timm.create_model(name, pretrained=False, **self.timm_options)
        except (RuntimeError, TypeError, ValueError, AssertionError) as error:
            raise UserError(f"backbone.name {name!r} with backbone.options {self.config.options}: {error}") from error
        if hasattr(model, "no_weight_decay"):
            self._undecayed = set(model.no_weight_decay())
        blocks = self.family.split(model)
        kind = self.block_class(unit)
        if kind not in ("plain", *self.family.variants):
            known = ", ".join(["plain", *self.family.variants])
            raise UserError(f"backbone.unit_blocks: {name} has no {kind} blocks (it has {known}).")
        return [self.family.of_class(kind, block) for block in blocks]

    def moe_layers(self) -> dict[str, MoeLayer]:
        """The layers with token-level experts by name: ``LAYER.attn``, ``LAYER.mlp``."""
        found: dict[str, MoeLayer] = {}
        for layer in self.layers:
            assert isinstance(layer, LegoLayer)
            unit: Any = next(iter(layer.units.values()))
            found |= {f"{layer.index}.{part}": getattr(unit.block, part) for part in layer.moe_parts}
        return found

    def detach_statistics(self, schedule: str) -> None:
        """Prepares the losses on what tokens choose for the task average.

        A router's gradient is divided by how many devices run its task, which these losses allow for; what lies before
        the router is divided by other counts, so their gradient ends there. Not so where all counts are equal.

        Args:
            schedule: its kind.
        """
        for layer in self.moe_layers().values():
            layer.detach_statistics = schedule not in ("accumulate", "per_batch")

    def block_class(self, unit: int) -> str:
        """Of a unit of any layer, as ``backbone.unit_blocks`` names it."""
        kinds = self.config.unit_blocks
        return kinds[unit % len(kinds)] if kinds else "plain"

    def undecayed(self) -> set[str]:
        """The parameters that timm exempts from weight decay (position embeddings, tokens), by their names here."""
        return {
            f"layers.{layer.index}.units.{unit}.{own}"
            for layer in self.layers
            for unit, module in layer.units.items()  # type: ignore[union-attr,operator]
            for own, _ in module.named_parameters()
            if layer.timm_name(own) in self._undecayed  # type: ignore[operator]
        }

    def forward(self, passes: Sequence[Pass], batch_norm: BatchNormRule) -> list[list[Tensor]]:
        """The feature maps of every device, all devices advancing layer by layer together.

        Args:
            passes: this rank's devices.
            batch_norm: what batch norms in training do.

        Returns:
            For every device its maps (B, channels[i], H / strides[i], W / strides[i]).
        """
        xs = tuple(one.images for one in passes)
        channels_last = self.channels_last(xs[0].device.type)
        if channels_last:
            xs = tuple(x.contiguous(memory_format=torch.channels_last) for x in xs)
        features: list[list[Tensor]] = [[] for _ in passes]
        for layer in self.layers:
            assert isinstance(layer, LegoLayer)
            if self.after_backward is not None and all(x.requires_grad for x in xs):
                # The gradients of a layer's inputs are the last that its backward computes.
                _when_all_have_gradients(xs, partial(self.after_backward, layer.index))
            if self.config.checkpoint and torch.is_grad_enabled():
                # Each pass re-seeds what is random in it, so the generators need no saving.
                xs = checkpoint(layer, passes, batch_norm, *xs, use_reentrant=False, preserve_rng_state=False)
            else:
                xs = layer(passes, batch_norm, *xs)
            if layer.moe_parts:
                xs = _keep_statistics(layer, passes, xs)
            if layer.tap is not None:
                for maps, x, one in zip(features, xs, passes, strict=True):
                    height, width = one.images.shape[-2:]
                    found = layer.tap.as_map(x, (height, width))
                    maps.append(cast(Tensor, _ForHead.apply(found)) if channels_last else found)
        return features

    def channels_last(self, kind: str) -> bool:
        """Whether maps lie channels-last in memory: for families that gain from it, under autocast.

        Args:
            kind: of device, as torch calls it.
        """
        return self.family.channels_last and torch.is_autocast_enabled(kind)


def _keep_statistics(layer: LegoLayer, passes: Sequence[Pass], xs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Leaves the statistics among a layer's outputs with their passes, and returns the maps."""
    statistics = iter(xs[len(passes) :])
    for one in passes:
        one.statistics |= {f"{layer.index}.{part}": next(statistics) for part in layer.moe_parts}
    return tuple(xs[: len(passes)])


def timm_module(name: str) -> str:
    """timm's module that defines a model, a key of :data:`FAMILIES` if we know the family."""
    return str(timm.model_entrypoint(name.split(".")[0]).__module__.rpartition(".")[2])


def _family(config: BackboneConfig) -> Family:
    architecture = config.name.split(".")[0]
    if not timm.is_model(architecture):
        near = difflib.get_close_matches(architecture, timm.list_models(), 1)
        hint = f": did you mean {near[0]!r}?" if near else "."
        raise UserError(f"backbone.name {config.name!r}: timm has no such model{hint}")
    module = timm_module(architecture)
    if module not in FAMILIES:
        known = ", ".join(sorted(FAMILIES))
        raise UserError(f"backbone.name {config.name!r} is of timm's family {module!r}; supported: {known}.")
    return FAMILIES[module]


def _units_per_layer(config: BackboneConfig, layers: int) -> list[int]:
    if isinstance(config.units, int):
        return [config.units] * layers
    if len(config.units) != layers:
        raise UserError(f"backbone.units lists {len(config.units)} layers, but {config.name} has {layers}.")
    return list(config.units)


def _when_all_have_gradients(tensors: Sequence[Tensor], done: Callable[[], None]) -> None:
    """Calls ``done`` once backward has computed the gradients of all tensors.

    torch's own ``register_multi_grad_hook`` keeps the graph in a cycle of references, and so in memory for good.
    """
    waiting = len(tensors)

    def hook(_: Tensor) -> None:
        nonlocal waiting
        waiting -= 1
        if waiting == 0:
            done()

    for tensor in tensors:
        tensor.register_hook(hook)
