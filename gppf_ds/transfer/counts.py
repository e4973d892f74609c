"""How many parameters a network holds, how many a task can reach, and how many an image of it goes through."""

from __future__ import annotations

from collections import defaultdict

from gppf_ds.simt.usage import owner_of
from gppf_ds.train.restore import Trained


def resident(trained: Trained) -> int:
    """All parameters of the network."""
    return sum(parameter.numel() for parameter in trained.model.parameters())


def trainable(trained: Trained) -> int:
    """Those that learn."""
    return sum(parameter.numel() for parameter in trained.model.parameters() if parameter.requires_grad)


def of_task(trained: Trained, task: str) -> dict[str, int]:
    """``parameters``: of all that the task can reach, its path or its router's experts, and its head;
    ``active_parameters``: of what one token goes through, k experts of every layer that has them."""
    path, layout = trained.controller.path(task), trained.model.backbone.layout
    own, experts = 0, defaultdict[str, int](int)
    for name, parameter in trained.model.named_parameters():
        match owner_of(name):
            case ("task", other):
                own += parameter.numel() if other == task else 0
            case ("expert", layer, expert):
                assert layout is not None
                experts[layer] += parameter.numel() if int(expert) in layout.tasks[task].experts[layer] else 0
            case ("unit", index, unit):
                own += parameter.numel() if path[int(index)] == int(unit) else 0
            case _:
                own += parameter.numel()
    if layout is None:
        return {"parameters": own, "active_parameters": own}
    seen = layout.tasks[task]
    # The experts of a layer are of one size.
    active = sum(size // len(seen.experts[layer]) * seen.top_k[layer] for layer, size in experts.items())
    return {"parameters": own + sum(experts.values()), "active_parameters": own + active}
