"""The lego backbone: layers of N candidate units, through which every task finds its own path (GPPF section 3.2)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import timm
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gppf_ds.backbone import resnet
from gppf_ds.backbone.blocks import Block
from gppf_ds.backbone.controller import Route
from gppf_ds.backbone.lockstep import Lane, Lockstep
from gppf_ds.backbone.norm import BatchNormRule
from gppf_ds.config import BackboneConfig
from gppf_ds.errors import UserError
from gppf_ds.seeding import FORWARD, INIT, seed_global_generators

SPLIT: dict[str, Callable[[nn.Module], list[Block]]] = {"ResNet": resnet.split}
"""How a family of timm models comes apart into blocks, by the class of the model."""


@dataclass
class Pass:
    """One device's way through the backbone in one step."""

    images: Tensor
    """(B, 3, H, W)."""
    route: Route
    key: tuple[int, int, int] = field(default=(0, 0, 0))
    """(seed, step, device): the randomness of this pass."""


class LegoLayer(nn.Module):
    """One layer of the backbone and its candidate units."""

    def __init__(self, blocks: Sequence[Block], index: int) -> None:
        super().__init__()
        first = blocks[0]
        self.index = index
        self.name = first.name
        self.prefix = first.prefix
        self.tap = first.tap
        self.before = first.before
        self.units = nn.ModuleList(block.module for block in blocks)
        self.lockstep = Lockstep(first.module)

    def forward(self, passes: Sequence[Pass], batch_norm: BatchNormRule, *xs: Tensor) -> tuple[Tensor, ...]:
        """y = sum_k u[k] * M_k(x) for every device (equation 1); one unit for a hard route.

        Tensors come and go as plain arguments, where module hooks (ZeRO-3's among them) find them.

        Args:
            passes: the devices' routes.
            batch_norm: what batch norms in training do.
            xs: the devices' maps.
        """
        lanes: list[Lane] = []
        owners: list[int] = []
        for device, (x, one) in enumerate(zip(xs, passes, strict=True)):
            x = self.before(x)
            for unit in range(len(self.units)) if one.route.path is None else [one.route.path[self.index]]:
                lanes.append((unit, x))
                owners.append(device)

        def reseed(lane: int, position: int) -> None:
            seed, step, device = passes[owners[lane]].key
            seed_global_generators(seed, FORWARD, step, device, self.index, lanes[lane][0], position)

        outputs = self.lockstep(list(self.units), lanes, batch_norm, reseed)
        mixed: list[Tensor | None] = [None] * len(passes)
        for device, (unit, _), y in zip(owners, lanes, outputs, strict=True):
            route = passes[device].route
            if route.path is None or torch.is_grad_enabled():
                y = y * route.weights[self.index, unit].to(y.dtype)
            previous = mixed[device]
            mixed[device] = y if previous is None else previous + y
        return tuple(y for y in mixed if y is not None)


class LegoBackbone(nn.Module):
    """A timm model whose every block has N candidates.

    Args:
        config: the timm model, its options and the number of units.
        seed: of the run; unit k of every layer comes from the k-th independently initialised model.

    Attributes:
        layers: the lego layers, first to last.
        channels, strides: of the feature maps that :meth:`forward` returns, finest first.
        extra: timm's own keyword arguments, with which a path loads into ``timm.create_model``.
    """

    def __init__(self, config: BackboneConfig, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        candidates = [self._blocks(config, seed, k) for k in range(config.units)]
        self.layers = nn.ModuleList(LegoLayer(blocks, i) for i, blocks in enumerate(zip(*candidates, strict=True)))
        taps = [block.tap for block in candidates[0] if block.tap is not None]
        self.channels = tuple(tap.channels for tap in taps)
        self.strides = tuple(tap.stride for tap in taps)
        self.units = [len(layer.units) for layer in self.layers]  # type: ignore[arg-type]
        self.after_backward: Callable[[int], None] | None = None
        """Called with a layer's index as soon as backward is done with that layer (not for the first one)."""

    @staticmethod
    def _blocks(config: BackboneConfig, seed: int, unit: int) -> list[Block]:
        seed_global_generators(seed, INIT, "unit", unit)
        try:
            model = timm.create_model(config.name, pretrained=False, num_classes=0, **config.options)
        except (RuntimeError, TypeError) as error:
            raise UserError(f"backbone.name {config.name!r} with backbone.options {config.options}: {error}") from error
        split = SPLIT.get(type(model).__name__)
        if split is None:
            raise UserError(f"backbone.name {config.name!r} is a {type(model).__name__}; supported: {sorted(SPLIT)}.")
        return split(model)

    def forward(self, passes: Sequence[Pass], batch_norm: BatchNormRule) -> list[list[Tensor]]:
        """The feature maps of every device, all devices advancing layer by layer together.

        Args:
            passes: this rank's devices.
            batch_norm: what batch norms in training do.

        Returns:
            For every device its maps (B, channels[i], H / strides[i], W / strides[i]).
        """
        xs = tuple(one.images for one in passes)
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
            if layer.tap is not None:
                for maps, x in zip(features, xs, strict=True):
                    maps.append(layer.tap.as_map(x))
        return features


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
