"""How many parameters a mixture-of-experts layer or a ViT of them has, counted without building it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Blocks = Literal["every", "even", "odd"]
"""Which blocks have a layer of experts, counted from 0."""


def mlp_parameters(width: int, hidden: int, experts: int, routers: Sequence[int], shared: int = 0) -> int:
    """Of a :class:`gppf_ds.backbone.moe.mlp.MoeMlp`.

    Args:
        width: C.
        hidden: width inside an expert.
        experts, shared: how many.
        routers: for every task how many experts its router sees.
    """
    return (experts + shared) * _mlp(width, hidden) + width * sum(routers)


def attention_parameters(
    width: int,
    head_width: int,
    experts: int,
    routers: Sequence[int],
    window: tuple[int, int] | None = None,
    key_value_bias: bool = True,
) -> int:
    """Of a :class:`gppf_ds.backbone.moe.attention.MoeAttention`; arguments as in :func:`mlp_parameters`."""
    positions = (2 * window[0] - 1) * (2 * window[1] - 1) if window else 0
    key_value = 2 * head_width * (width + key_value_bias)
    return experts * (2 * width * head_width + positions) + key_value + width * sum(routers)


@dataclass(frozen=True)
class VitSize:
    """A ViT with layers of experts as Mod-Squad (arXiv 2212.08066) builds it, without heads.

    Experts of an MLP have the hidden width ``expert_ratio * width / top_k``. A token chooses as many attention experts
    as dense attention has heads, each twice as wide as a dense head.
    """

    width: int
    heads: int
    depth: int = 12
    tasks: int = 1
    """Each has a router for every layer, and an embedding that all blocks share."""
    attention_experts: int = 0
    mlp_experts: int = 0
    top_k: int = 4
    """Experts of an MLP that a token chooses."""
    mlp_ratio: float = 4.0
    """Of dense MLPs."""
    expert_ratio: float = 4.0
    attention_blocks: Blocks = "every"
    mlp_blocks: Blocks = "every"
    shared: int = 0
    dense_head_factor: int = 1
    """How wide a head of dense attention is, in width / heads; 2 in Mod-Squad."""
    patch: int = 16
    image_size: int = 224

    def parameters(self) -> int:
        """Of patches, class token, positions, task embeddings, blocks and the final norm."""
        tokens = (self.image_size // self.patch) ** 2 + 1
        embedding = (3 * self.patch**2 + 1) * self.width + (tokens + 1) * self.width
        blocks = sum(self._attention(block) + self._mlp(block) + 4 * self.width for block in range(self.depth))
        return embedding + self.tasks * self.width + blocks + 2 * self.width

    def _attention(self, block: int) -> int:
        head_width = self.width // self.heads
        if _among(block, self.attention_blocks) and self.attention_experts:
            routers = [self.attention_experts] * self.tasks
            return attention_parameters(self.width, 2 * head_width, self.attention_experts, routers)
        inner = self.dense_head_factor * head_width * self.heads
        return 3 * inner * (self.width + 1) + self.width * (inner + 1)

    def _mlp(self, block: int) -> int:
        if _among(block, self.mlp_blocks) and self.mlp_experts:
            hidden = int(self.expert_ratio * self.width / self.top_k)
            return mlp_parameters(self.width, hidden, self.mlp_experts, [self.mlp_experts] * self.tasks, self.shared)
        return _mlp(self.width, int(self.mlp_ratio * self.width))


def _mlp(width: int, hidden: int) -> int:
    return 2 * width * hidden + hidden + width


def _among(block: int, blocks: Blocks) -> bool:
    return blocks == "every" or blocks == ("odd" if block % 2 else "even")
