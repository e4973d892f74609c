"""How many experts a task's tokens go through, found while training: k grows as long as it helps.

The rule of AdaMV-MoE (Chen et al., ICCV 2023, "Adaptive Multi-Task Vision Mixture-of-Experts"): every so many steps the
loss on held-out data is measured; a task that has not improved for too long gets one expert more, and gives it back for
good if it does not improve with that either.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from gppf_ds.backbone.lego import LegoBackbone
from gppf_ds.backbone.moe.layout import is_mlp
from gppf_ds.config.moe import AdaptiveConfig


@dataclass(frozen=True)
class Trial:
    """What the rule remembers of one task."""

    best: float | None = None
    """The lowest loss so far."""
    since: int = 0
    """The step of that loss, or of the last growth, whichever came later."""
    grown: bool = False
    """Whether k has grown and nothing has improved since."""
    settled: bool = False
    """Whether k stays as it is."""


def judge(trial: Trial, k: int, step: int, loss: float, config: AdaptiveConfig) -> tuple[Trial, int]:
    """The rule: what to remember, and k from now on.

    Args:
        trial: of the task.
        k: so far.
        step: optimizer steps done.
        loss: on held-out data; one that is not finite is no improvement.
        config: patience and the largest k.
    """
    if trial.settled:
        return trial, k
    if math.isfinite(loss) and (trial.best is None or loss < trial.best):
        return Trial(loss, step), k
    if step - trial.since <= config.patience:
        return trial, k
    if trial.grown:
        return replace(trial, grown=False, settled=True), k - 1
    if k >= config.maximum:
        return replace(trial, settled=True), k
    return replace(trial, since=step, grown=True), k + 1


def adapt(
    trials: Mapping[str, Trial], losses: Mapping[str, float], backbone: LegoBackbone, step: int, config: AdaptiveConfig
) -> dict[str, Trial]:
    """Judges every task and sets its k in all MoE-MLPs.

    Args:
        trials: by task, those of tasks that were judged before.
        losses: by task, the same on every rank.
        backbone: changed in place, its layout too.
        step: optimizer steps done.
        config: of the rule.
    """
    judged = {}
    for task, loss in losses.items():
        before = experts_of(backbone, task)
        judged[task], k = judge(trials.get(task, Trial()), before, step, loss, config)
        if k != before:
            _choose(backbone, task, k)
    return judged


def experts_of(backbone: LegoBackbone, task: str) -> int:
    """k of a task: that of the MoE-MLP where it is largest."""
    return max(layer.top_k[task] for name, layer in backbone.moe_layers().items() if is_mlp(name))


def _choose(backbone: LegoBackbone, task: str, k: int) -> None:
    assert backbone.layout is not None
    own = backbone.layout.tasks[task]
    for name, layer in backbone.moe_layers().items():
        if is_mlp(name):
            own.top_k[name] = layer.top_k[task] = min(k, len(own.experts[name]))
