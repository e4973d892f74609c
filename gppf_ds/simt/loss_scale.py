"""The loss scale of fp16, which has no digits below 6e-8: backward starts from it, and the task average takes it away.

It is a power of two, so that it costs no digit, and the same on every rank. DeepSpeed's own scaler (release 0.19, with
``torch_autocast``) is not used: from stage 1 on it clips by the norm of scaled gradients, and each rank decides by its
own partition whether to skip a step.
"""

from __future__ import annotations

from dataclasses import dataclass

PATIENCE = 2000
"""Steps without an overflow after which the scale doubles; this, start and factor are those of torch's GradScaler."""


@dataclass
class LossScale:
    """What an fp16 run multiplies its loss by."""

    value: float = 2.0**16
    steps: int = 0
    """Without an overflow since the value last changed."""

    def update(self, overflow: bool) -> None:
        """After a step; below 1 the value never goes."""
        self.steps = 0 if overflow else self.steps + 1
        if overflow:
            self.value = max(self.value / 2, 1.0)
        elif self.steps == PATIENCE:
            self.value, self.steps = self.value * 2, 0
