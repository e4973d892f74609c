"""Experts into the blocks of a timm model: which blocks get them, and of which size."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from timm.layers import Mlp, PatchEmbed
from timm.models.swin_transformer_v2 import SwinTransformerV2Block
from timm.models.vision_transformer import Block as TimmVitBlock
from torch import nn

from gppf_ds.backbone.blocks import Block
from gppf_ds.backbone.moe.attention import MoeAttention
from gppf_ds.backbone.moe.block import SwinMoeBlock, VitMoeBlock
from gppf_ds.backbone.moe.layout import Layout
from gppf_ds.backbone.moe.mlp import MoeMlp
from gppf_ds.backbone.swin import Unit as SwinUnit
from gppf_ds.backbone.vit import Embedding
from gppf_ds.config import MoeConfig
from gppf_ds.errors import UserError


@dataclass
class _Place:
    """A block that can get experts."""

    index: int
    """Of the lego layer."""
    position: int
    """Within its stage."""
    stage: int
    stride: int
    prefix: int
    block: Any
    """timm's."""


def add_experts(
    blocks: Sequence[Block], config: MoeConfig, tasks: Sequence[str], layout: Layout | None = None
) -> Layout:
    """Puts MoE layers into the blocks of a model, in place.

    Args:
        blocks: of the whole model, first to last.
        config: numbers and places.
        tasks: names; with a ``layout`` its own count.
        layout: which experts there are and who may choose them; by default the configuration's, for all tasks.

    Returns:
        The layout.

    Raises:
        UserError: the model has no blocks of a known kind, or a task is configured that is not there.
    """
    places = [place for place in _places(blocks) if place.stage >= config.first_stage]
    heads = {f"{p.index}.{part}": p.block.attn.num_heads for p in places for part in _parts(p, config)}
    if not heads:
        raise UserError(
            "backbone.moe: no block of this model can hold experts. Choose a ViT or a Swin, and look at first_stage, "
            "mlp_blocks and attention_blocks."
        )
    for task in (*config.task_mlp_top_k, *config.task_attention_top_k):
        if task not in tasks:
            raise UserError(f"backbone.moe.task_mlp_top_k and task_attention_top_k: there is no task {task!r}.")
    layout = layout or Layout.full(config, heads, tasks)
    for place in places:
        parts = {part: _layer(part, place, config, layout) for part in _parts(place, config)}
        if parts:
            _replace(blocks[place.index], place, parts, list(layout.tasks) if config.task_embedding else [])
    return layout


def _places(blocks: Sequence[Block]) -> Iterator[_Place]:
    stage, position, stride, prefix = 0, 0, 1, 0
    for index, block in enumerate(blocks):
        module: Any = block.module
        if isinstance(module, Embedding):
            stride, prefix = module.model.patch_embed.patch_size[0], module.model.num_prefix_tokens
        elif isinstance(module, PatchEmbed):
            stride = module.patch_size[0]
        elif isinstance(module, SwinUnit):
            if not isinstance(module.downsample, nn.Identity):
                stage, position, stride = stage + 1, 0, 2 * stride
            yield _Place(index, position, stage, stride, 0, module.block)
            position += 1
        else:
            inner = module.block if isinstance(module, nn.Sequential) and hasattr(module, "block") else module
            if isinstance(inner, TimmVitBlock):
                yield _Place(index, position, 0, stride, prefix, inner)
                position += 1


def _parts(place: _Place, config: MoeConfig) -> list[str]:
    """Which of a block's parts become MoE layers."""
    experts = {"mlp": config.mlp_experts, "attn": config.attention_experts}
    wanted = {"mlp": config.mlp_blocks, "attn": config.attention_blocks}
    parity = "odd" if place.position % 2 else "even"
    return [part for part in ("attn", "mlp") if experts[part] and wanted[part] in ("every", parity)]


def _layer(part: str, place: _Place, config: MoeConfig, layout: Layout) -> nn.Module:
    name = f"{place.index}.{part}"
    routers = {task: own.experts[name] for task, own in layout.tasks.items()}
    top_k = {task: own.top_k[name] for task, own in layout.tasks.items()}
    norm: Any = {"gate_norm": config.gate_norm}
    source: Any = {"mi_source": "probs" if config.mutual_information_source == "probabilities" else "gates"}
    width, attention = place.block.norm1.normalized_shape[0], place.block.attn
    if part == "mlp":
        if type(place.block.mlp) is not Mlp:
            raise UserError(
                f"backbone.moe: the model's MLPs are {type(place.block.mlp).__name__}: choose one with Mlp."
            )
        hidden = place.block.mlp.fc1.out_features // config.mlp_top_k
        return MoeMlp(width, hidden, layout.experts[name], routers, top_k, config.shared_experts, **norm, **source)
    if isinstance(place.block, SwinTransformerV2Block):
        raise UserError("backbone.moe: the attention of Swin v2 has no experts: set attention_experts to 0.")
    window = attention.window_size if hasattr(attention, "window_size") else None
    bias = attention.qkv.bias is not None
    # Twice the dense block's heads: with one key and value for all heads, projections cost what they cost there.
    head_width = 2 * width // attention.num_heads
    return MoeAttention(
        width, head_width, layout.experts[name], routers, top_k, window, **norm, **source, key_value_bias=bias
    )


def _replace(block: Block, place: _Place, parts: dict[str, nn.Module], tasks: list[str]) -> None:
    module: Any = block.module
    if isinstance(module, SwinUnit):
        block.module = SwinMoeBlock(module, parts, tasks, place.stride)
        block.names = {**block.names, "": "moe."}
        return
    norm: Any = module.norm if isinstance(module, nn.Sequential) else nn.Identity()
    block.module = VitMoeBlock(place.block, norm, parts, tasks, place.stride, place.prefix)
    block.names = {"block.": block.names.get("block.", block.names.get("", "")), "norm.": "norm.", "": "moe."}
