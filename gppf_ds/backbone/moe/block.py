"""timm's transformer blocks with token-level experts in the place of the MLP, of attention, or of both.

Blocks as in Mod-Squad (arXiv 2212.08066), of which arXiv 2306.17165 is the successor: pre-norm residual blocks, and a
learnt embedding of the task added to all tokens before each of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.models.swin_transformer import window_partition, window_reverse
from timm.models.swin_transformer_v2 import SwinTransformerV2Block
from torch import Tensor, nn

from gppf_ds.backbone.moe.call import Call
from gppf_ds.backbone.swin import Unit as SwinUnit


class VitMoeBlock(nn.Module):
    """A ViT block whose tokens choose experts, by the router of the task whose images they are.

    Args:
        block: timm's.
        norm: the model's final norm, or the identity.
        parts: MoE layers in the place of the block's ``mlp`` and ``attn``.
        tasks: that get an embedding; none for no embeddings.
        stride: pixels between neighbouring patches.
        prefix: class and register tokens, which are never padding.
    """

    def __init__(
        self,
        block: Any,
        norm: nn.Module,
        parts: Mapping[str, nn.Module],
        tasks: Sequence[str],
        stride: int,
        prefix: int,
    ) -> None:
        super().__init__()
        self.block, self.norm = block, norm
        self.parts = _put(parts, block)
        self.task_embeddings = _embeddings(tasks, block.norm1.normalized_shape[0])
        self.stride, self.prefix = stride, prefix

    def forward(self, x: Tensor, task: str, image_size: tuple[int, int], sizes: Tensor | None) -> tuple[Tensor, ...]:
        """Tokens (B, N, C), and for each MoE layer its statistics, see :class:`gppf_ds.backbone.moe.call.Call`.

        Args:
            x: (B, N, C).
            task: whose routers choose.
            image_size: (height, width) of the batch.
            sizes: (B, 2), heights and widths of the images before they were padded; None where none was.
        """
        call = Call(task, self._padding(x, image_size, sizes))
        block: Any = self.block
        if task in self.task_embeddings:
            x = x + self.task_embeddings[task]
        y = block.norm1(x)
        y = block.attn(y, call) if "attn" in self.parts else block.attn(y)
        x = x + block.drop_path1(block.ls1(y))
        y = block.norm2(x)
        y = block.mlp(y, call) if "mlp" in self.parts else block.mlp(y)
        return self.norm(x + block.drop_path2(block.ls2(y))), *call.statistics

    def _padding(self, x: Tensor, image_size: tuple[int, int], sizes: Tensor | None) -> Tensor | None:
        if sizes is None:
            return None
        height, width = (-(-side // self.stride) for side in image_size)
        return F.pad(is_padding(sizes, height, width, self.stride).flatten(1), (self.prefix, 0))


class SwinMoeBlock(SwinUnit):
    """The same for a Swin: experts for the tokens of all windows, heads for the tokens of each.

    Args:
        unit: the lego layer's.
        parts, tasks: see :class:`VitMoeBlock`.
        stride: pixels between neighbouring tokens behind patch merging.
    """

    def __init__(self, unit: SwinUnit, parts: Mapping[str, nn.Module], tasks: Sequence[str], stride: int) -> None:
        super().__init__(unit.downsample, unit.block, unit.norm)
        self.pads_first = unit.pads_first
        self.post_norm = isinstance(unit.block, SwinTransformerV2Block)
        self.parts = _put(parts, unit.block)
        self.task_embeddings = _embeddings(tasks, unit.block.norm1.normalized_shape[0])
        self.stride = stride

    def forward(  # type: ignore[override]
        self, x: Tensor, task: str, image_size: tuple[int, int], sizes: Tensor | None
    ) -> tuple[Tensor, ...]:
        """(B, H, W, C), behind patch merging (B, ceil(H / 2), ceil(W / 2), C'); and statistics as in a ViT."""
        x = self.downsample(x)
        height, width = x.shape[1:3]
        call = Call(task, None if sizes is None else is_padding(sizes, height, width, self.stride))
        block: Any = self.block
        self.choose_shift(height, width)
        if task in self.task_embeddings:
            x = x + self.task_embeddings[task]
        x = x + block.drop_path1(self._around(block.norm1, x, self._attend, call))
        x = x + block.drop_path2(self._around(block.norm2, x, self._feed, call))
        return self.norm(x), *call.statistics

    def _around(self, norm: nn.Module, x: Tensor, part: Any, call: Call) -> Any:
        return norm(part(x, call)) if self.post_norm else part(norm(x), call)

    def _feed(self, x: Tensor, call: Call) -> Any:
        block: Any = self.block
        return block.mlp(x, call) if "mlp" in self.parts else block.mlp(x)

    def _attend(self, x: Tensor, call: Call) -> Any:
        block: Any = self.block
        if "attn" not in self.parts:
            return block._attn(x)
        height, width = x.shape[1:3]
        (rows, columns), shift = block.window_size, block.shift_size
        missing = (0, -width % columns, 0, -height % rows)
        outside = call.padding if call.padding is not None else x.new_zeros(x.shape[:3], dtype=torch.bool)
        if self.pads_first:
            x, outside = F.pad(x, (0, 0, *missing)), F.pad(outside, missing, value=True)
        x, outside = (torch.roll(one, [-side for side in shift], (1, 2)) for one in (x, outside))
        if not self.pads_first:
            x, outside = F.pad(x, (0, 0, *missing)), F.pad(outside, missing, value=True)
        full = x.shape[1:3]
        windows = window_partition(x, block.window_size).flatten(1, 2)
        inside = Call(call.task, window_partition(outside[..., None], block.window_size).flatten(1), call.statistics)
        windows = block.attn(windows, inside, mask=block.get_attn_mask(x))
        x = window_reverse(windows.unflatten(1, (rows, columns)), block.window_size, *full)
        if not self.pads_first:
            x = x[:, :height, :width]
        return torch.roll(x, list(shift), (1, 2))[:, :height, :width].contiguous()


def is_padding(sizes: Tensor, height: int, width: int, stride: int) -> Tensor:
    """(B, height, width): the tokens whose patches lie outside their images of these sizes (B, 2)."""
    rows = torch.arange(height, device=sizes.device) * stride
    columns = torch.arange(width, device=sizes.device) * stride
    return (rows >= sizes[:, :1])[:, :, None] | (columns >= sizes[:, 1:])[:, None, :]


def _put(parts: Mapping[str, nn.Module], block: nn.Module) -> list[str]:
    for name, module in parts.items():
        setattr(block, name, module)
    # In the order in which a forward comes to them.
    return [name for name in ("attn", "mlp") if name in parts]


def _embeddings(tasks: Sequence[str], width: int) -> nn.ParameterDict:
    return nn.ParameterDict({task: nn.init.trunc_normal_(torch.empty(width), std=0.02) for task in tasks})
