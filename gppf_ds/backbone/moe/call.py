"""What a mixture-of-experts layer is told of one pass, and what it leaves behind."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor


@dataclass
class Call:
    """One device's pass through a block."""

    task: str
    """Whose routers choose."""
    padding: Tensor | None = None
    """bool, of the shape of x without its last dimension, True where a token is padding: neither routed nor counted,
    its output of the layer is 0."""
    statistics: list[Tensor] = field(default_factory=list)
    """Every layer appends one tensor (3, E) over its experts, in their order. Row 0: the sum over the tokens of the
    router's probabilities (0 for experts that it does not see). Row 1: how many tokens chose the expert, without
    gradient. Row 2: the sum over the tokens of p log p. fp32 (fp64 in a model of fp64)."""
