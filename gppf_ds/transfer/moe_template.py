"""One task's backbone: a transformer of timm whose tokens choose among experts, in plain PyTorch.

In this folder ``load()`` makes it and gives it the weights of ``model.safetensors``. For images (B, 3, H, W) it returns
feature maps, finest first. Only torch, timm and safetensors are needed.

Layers as in Mod-Squad (arXiv 2212.08066): a router, linear before a softmax, chooses k experts for every token. In an
MLP they are small MLPs, in attention query and output projections of heads that share one key and value.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.models.swin_transformer import get_relative_position_index, window_partition, window_reverse
from torch import Tensor, nn

SETTINGS: dict[str, Any] = {}


class Experts(nn.Module):
    """The router's part of a layer with experts.

    Args:
        width: C of the tokens.
        experts: how many there are.
        k: how many of them a token goes through.
    """

    def __init__(self, width: int, experts: int, k: int) -> None:
        super().__init__()
        self.k = k
        self.router = nn.Linear(width, experts, bias=False)

    def choose(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Of tokens (n, C) the experts that they choose, (n, k), and the gates, (n, k)."""
        exact = torch.promote_types(tokens.dtype, torch.float32)
        logits = F.linear(tokens.to(exact), self.router.weight.to(exact))
        best, chosen = logits.log_softmax(-1).topk(self.k)
        gates = best.exp() if SETTINGS["gate_norm"] == "full" else best.softmax(-1)
        return chosen, gates.to(tokens.dtype)


class Mlp(nn.Module):
    """Linear, GELU, linear."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., C)."""
        return self.fc2(F.gelu(self.fc1(x)))


class MoeMlp(Experts):
    """The sum of k MLPs times their gates, plus MLPs that every token goes through."""

    def __init__(self, width: int, experts: int, k: int, hidden: int, shared: int) -> None:
        super().__init__(width, experts, k)
        self.experts = nn.ModuleList(Mlp(width, hidden) for _ in range(experts))
        self.shared = nn.ModuleList(Mlp(width, hidden) for _ in range(shared))

    def forward(self, x: Tensor, padding: Tensor | None) -> Tensor:
        """(..., C) -> (..., C), zeros where padding."""
        tokens = _without(x, padding).flatten(0, -2)
        chosen, gates = self.choose(tokens)
        y = torch.zeros_like(tokens)
        for number, expert in enumerate(self.experts):
            token, place = (chosen == number).nonzero(as_tuple=True)
            y = y.index_add(0, token, gates[token, place, None] * expert(tokens[token]))
        for expert in self.shared:
            y = y + expert(tokens)
        return _without(y.view_as(x), padding)


class Head(nn.Module):
    """Query and output projections of an attention head, and its biases of relative positions."""

    def __init__(self, width: int, head_width: int, positions: int) -> None:
        super().__init__()
        self.query = nn.Linear(width, head_width, bias=False)
        self.output = nn.Linear(head_width, width, bias=False)
        if positions:
            self.position_bias = nn.Parameter(torch.zeros(positions))


class MoeAttention(Experts):
    """Every token chooses k heads, which share one key and value.

    Args:
        width, experts, k: see :class:`Experts`.
        head_width: of queries, keys and values.
        bias: whether the projection to keys and values has one.
        window: (height, width) in a Swin, whose tokens are all of N.
    """

    position_index: Tensor | None

    def __init__(
        self, width: int, experts: int, k: int, head_width: int, bias: bool, window: tuple[int, int] | None
    ) -> None:
        super().__init__(width, experts, k)
        positions = (2 * window[0] - 1) * (2 * window[1] - 1) if window else 0
        self.experts = nn.ModuleList(Head(width, head_width, positions) for _ in range(experts))
        self.key_value = nn.Linear(width, 2 * head_width, bias=bias)
        index = get_relative_position_index(*window) if window else None
        self.register_buffer("position_index", index, persistent=False)

    def forward(self, x: Tensor, padding: Tensor | None, mask: Tensor | None = None) -> Tensor:
        """(B, N, C) -> (B, N, C), zeros where padding; the mask (windows, N, N) is added to the logits."""
        batch, count, _ = x.shape
        tokens = _without(x, padding).flatten(0, 1)
        chosen, gates = self.choose(tokens)
        keys, values = self.key_value(x).unsqueeze(1).chunk(2, -1)
        queries = tokens.new_zeros(len(tokens), self.k, keys.shape[-1])
        heads: list[Any] = list(self.experts)
        found = [(chosen == number).nonzero(as_tuple=True) for number in range(len(heads))]
        for (token, place), head in zip(found, heads, strict=True):
            queries[token, place] = head.query(tokens[token])
        queries = queries.view(batch, count, self.k, -1).transpose(1, 2)
        bias = self._bias(chosen.view(batch, count, self.k), mask)
        seen = F.scaled_dot_product_attention(queries, keys, values, attn_mask=bias)
        seen = seen.transpose(1, 2).reshape(len(tokens), self.k, -1) * gates.unsqueeze(-1)
        y = torch.zeros_like(tokens)
        for (token, place), head in zip(found, heads, strict=True):
            y = y.index_add(0, token, head.output(seen[token, place]))
        return _without(y.view_as(x), padding)

    def _bias(self, chosen: Tensor, mask: Tensor | None) -> Tensor | None:
        """(B, k, N, N): the chosen heads' biases of relative positions, and the mask."""
        bias = None
        if self.position_index is not None:
            heads: list[Any] = list(self.experts)
            tables = torch.stack([head.position_bias for head in heads])[:, self.position_index]
            bias = tables[chosen, torch.arange(chosen.shape[1], device=chosen.device)[:, None]].transpose(1, 2)
        if mask is not None:
            mask = mask.repeat(len(chosen) // len(mask), 1, 1).unsqueeze(1)
            bias = mask if bias is None else bias + mask
        return bias


class Backbone(nn.Module):
    """timm's model with experts in some blocks, and the task's embedding added to all tokens before these."""

    def __init__(self) -> None:
        super().__init__()
        self.model = timm.create_model(SETTINGS["timm_model"], pretrained=False, **SETTINGS["timm_options"])
        self.is_swin = hasattr(self.model, "layers")
        self.blocks = list(_blocks(self.model)) if self.is_swin else list(self.model.blocks)
        self.task_embeddings = nn.ParameterDict()
        self.parts: dict[int, list[str]] = {int(number): list(parts) for number, parts in SETTINGS["blocks"].items()}
        for number, parts in SETTINGS["blocks"].items():
            block = self.blocks[int(number)]
            width = block.norm1.normalized_shape[0]
            if "mlp" in parts:
                block.mlp = MoeMlp(width, **parts["mlp"])
            if "attn" in parts:
                window = block.window_size if self.is_swin else None
                block.attn = MoeAttention(width, **parts["attn"], window=window)
            if SETTINGS["task_embedding"]:
                self.task_embeddings[number] = nn.Parameter(torch.zeros(width))
        if self.is_swin:
            self.model.patch_embed.dynamic_img_pad = True
            self.shifts = [tuple(block.shift_size) for block in self.blocks]

    def forward(self, images: Tensor, sizes: Tensor | None = None) -> list[Tensor]:
        """(B, 3, H, W) -> maps (B, C, H / stride, W / stride), finest first.

        Args:
            images: normalised.
            sizes: (B, 2), heights and widths of images that were padded at the right and at the bottom, to leave their
                padding out; None where none was.
        """
        return self._swin(images, sizes) if self.is_swin else self._vit(images, sizes)

    def _vit(self, images: Tensor, sizes: Tensor | None) -> list[Tensor]:
        model: Any = self.model
        stride, prefix = model.patch_embed.patch_size[0], model.num_prefix_tokens
        height, width = (-(-side // stride) for side in images.shape[-2:])
        padding = _padding(sizes, height, width, stride)
        if padding is not None:
            padding = F.pad(padding.flatten(1), (prefix, 0))
        x = model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(images))))
        for number, block in enumerate(self.blocks):
            parts = self.parts.get(number, [])
            if not parts:
                x = block(x)
                continue
            x = self._embedded(x, number)
            y = block.norm1(x)
            x = x + block.ls1(block.attn(y, padding) if "attn" in parts else block.attn(y))
            y = block.norm2(x)
            x = x + block.ls2(block.mlp(y, padding) if "mlp" in parts else block.mlp(y))
        x = model.norm(x)
        return [x[:, prefix:].unflatten(1, (height, width)).permute(0, 3, 1, 2).contiguous()]

    def _swin(self, images: Tensor, sizes: Tensor | None) -> list[Tensor]:
        model: Any = self.model
        stride, number, maps = model.patch_embed.patch_size[0], 0, []
        x = model.patch_embed(images)
        for stage in model.layers:
            x = stage.downsample(x)
            if not isinstance(stage.downsample, nn.Identity):
                stride *= 2
            padding = _padding(sizes, x.shape[1], x.shape[2], stride)
            for block in stage.blocks:
                x = self._swin_block(number, block, x, padding)
                number += 1
            last = stage is model.layers[-1]
            y = model.norm(x) if last else F.layer_norm(x, x.shape[-1:])
            maps.append(y.permute(0, 3, 1, 2).contiguous())
        return maps

    def _swin_block(self, number: int, block: Any, x: Tensor, padding: Tensor | None) -> Tensor:
        rows, columns = block.input_resolution
        # timm shifts no windows where the map of an image of its own size is one window; larger images need it.
        full = tuple(side // 2 if any(block.target_shift_size) else 0 for side in block.window_size)
        block.shift_size = self.shifts[number] if x.shape[1] <= rows and x.shape[2] <= columns else full
        parts = self.parts.get(number, [])
        if not parts:
            return block(x)
        x = self._embedded(x, number)

        def attend(x: Tensor) -> Tensor:
            return _attend_in_windows(block, x, padding) if "attn" in parts else block._attn(x)

        def feed(x: Tensor) -> Tensor:
            return block.mlp(x, padding) if "mlp" in parts else block.mlp(x)

        if SETTINGS["post_norm"]:
            x = x + block.norm1(attend(x))
            return x + block.norm2(feed(x))
        x = x + attend(block.norm1(x))
        return x + feed(block.norm2(x))

    def _embedded(self, x: Tensor, number: int) -> Tensor:
        return x + self.task_embeddings[str(number)] if str(number) in self.task_embeddings else x


def _attend_in_windows(block: Any, x: Tensor, padding: Tensor | None) -> Tensor:
    """(B, H, W, C) -> (B, H, W, C), each window by itself, shifted as the block says."""
    height, width = x.shape[1:3]
    rows, columns = block.window_size
    outside = padding if padding is not None else x.new_zeros(x.shape[:3], dtype=torch.bool)
    shift = list(block.shift_size)
    x, outside = (torch.roll(one, [-side for side in shift], (1, 2)) for one in (x, outside))
    missing = (0, -width % columns, 0, -height % rows)
    x, outside = F.pad(x, (0, 0, *missing)), F.pad(outside, missing, value=True)
    full = x.shape[1:3]
    windows = window_partition(x, block.window_size).flatten(1, 2)
    outside = window_partition(outside[..., None], block.window_size).flatten(1)
    windows = block.attn(windows, outside, mask=block.get_attn_mask(x))
    x = window_reverse(windows.unflatten(1, (rows, columns)), block.window_size, *full)[:, :height, :width]
    return torch.roll(x, shift, (1, 2)).contiguous()


def _blocks(model: Any) -> Any:
    return (block for stage in model.layers for block in stage.blocks)


def _padding(sizes: Tensor | None, height: int, width: int, stride: int) -> Tensor | None:
    """(B, height, width): tokens whose patches lie outside their images."""
    if sizes is None:
        return None
    rows = torch.arange(height, device=sizes.device) * stride
    columns = torch.arange(width, device=sizes.device) * stride
    return (rows >= sizes[:, :1])[:, :, None] | (columns >= sizes[:, 1:])[:, None, :]


def _without(x: Tensor, padding: Tensor | None) -> Tensor:
    return x if padding is None else x.masked_fill(padding.unsqueeze(-1), 0)


def load(file: str | Path | None = None) -> Backbone:
    """The backbone with the weights of a file, by default ``model.safetensors`` beside this one; for evaluation."""
    from safetensors.torch import load_file

    model = Backbone()
    model.load_state_dict(load_file(Path(__file__).with_name("model.safetensors") if file is None else Path(file)))
    return model.eval()
