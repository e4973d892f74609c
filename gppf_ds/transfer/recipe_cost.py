"""What a recipe's network costs before its first step: what learns, what is held, what an image goes through."""

from __future__ import annotations

from pathlib import Path

import torch

from gppf_ds.train.finetune import last_checkpoint
from gppf_ds.train.recipe import Recipe
from gppf_ds.train.restore import Trained
from gppf_ds.train.start import start
from gppf_ds.train.table import aligned
from gppf_ds.transfer import costs, counts


def table(run: Recipe, device: torch.device) -> str:
    """For people: a line for each task, and the parameters of the whole.

    Raises:
        UserError: the network cannot be built, or what it starts from is not there.
    """
    begun = start(run.config, run.tasks)
    trained = Trained(Path(run.config.output), 0, begun.model.eval(), begun.controller, run)
    found = costs.each(trained, list(run.tasks), device)
    rows = [("", "input", "GFLOPs", "parameters", "active")]
    for name, one in found.items():
        sizes = (f"{one['parameters']:,}", f"{one['active_parameters']:,}")
        if "not_measured" in one:
            rows.append((name, "not measured", "", *sizes))
            continue
        height, width = one["input"]
        rows.append((name, f"{height} x {width}", f"{one['flops']['total'] / 1e9:.3f}", *sizes))
    lines = aligned(rows)
    learn, held = counts.trainable(trained), counts.resident(trained)
    lines.append(f"parameters: {learn:,} learn of {held:,} held ({learn / held:.1%})")
    if run.config.finetune.source is not None:
        source = sum(last_checkpoint(Path(run.config.finetune.source)).sizes().values())
        lines.append(f"the source holds {source:,}")
    return "\n".join([begun.report, *lines]) if begun.report else "\n".join(lines)
