"""Layouts made of layouts: fewer tasks, fewer experts, fewer experts for each token, new experts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from gppf_ds.backbone.moe.layout import Layout, TaskLayout, is_mlp, router_of
from gppf_ds.backbone.moe.selections import Selections
from gppf_ds.errors import UserError


def restricted(layout: Layout, tasks: Sequence[str]) -> Layout:
    """With only these tasks, and the experts that one of them can choose."""
    own = {name: layout.tasks[name] for name in layout.tasks if name in tasks}
    seen = {layer: {e for task in own.values() for e in task.experts[layer]} for layer in layout.experts}
    return _with_experts(Layout(layout.experts, own), seen)


def pruned(layout: Layout, selections: Selections, theta: float) -> Layout:
    """Without the experts that no task uses much (Mod-Squad's rule, arXiv 2212.08066, and its code).

    A task keeps an expert if the expert's share of the task's selections in the layer, in percent, is above theta / k,
    and at least the k most used ones. An expert that one task keeps stays, for all tasks that could choose it.

    Args:
        layout: of the network.
        selections: of each of its tasks.
        theta: in percent; 0 drops only experts that nobody chose.

    Raises:
        UserError: a task has no selections in a layer, so that nothing is known of its experts.
    """
    kept: dict[str, set[int]] = {layer: set() for layer in layout.experts}
    for task, own in layout.tasks.items():
        for layer, visible in own.experts.items():
            counts, k = selections[task][layer], own.top_k[layer]
            total = sum(counts.get(expert, 0.0) for expert in visible)
            if total <= 0:
                raise UserError(f"task {task!r} has chosen no expert of layer {layer} yet: train it before pruning.")
            best = sorted(visible, key=lambda expert: -counts.get(expert, 0.0))
            used = [expert for expert in best if 100 * counts.get(expert, 0.0) / total > theta / k]
            kept[layer] |= {*used, *best[:k]}
    return _with_experts(layout, kept)


def with_top_k(layout: Layout, mlp: int, attention: int) -> Layout:
    """With at most so many experts for each token; 0 leaves k as it is."""
    tasks = {}
    for name, own in layout.tasks.items():
        limits = {layer: mlp if is_mlp(layer) else attention for layer in own.top_k}
        top_k = {layer: min(k, limits[layer] or k) for layer, k in own.top_k.items()}
        tasks[name] = TaskLayout({layer: list(experts) for layer, experts in own.experts.items()}, top_k)
    return Layout({layer: list(experts) for layer, experts in layout.experts.items()}, tasks)


def new_experts(layout: Layout, count: int) -> dict[str, list[int]]:
    """The numbers that ``count`` new experts of every layer get."""
    return {layer: [max(experts) + 1 + more for more in range(count)] for layer, experts in layout.experts.items()}


def grown(layout: Layout, new: Mapping[str, Sequence[int]], like: Mapping[str, TaskLayout]) -> Layout:
    """With new experts, and new tasks that can choose them as well as all that were there before.

    Args:
        layout: as it is; its tasks see nothing of what is new.
        new: by layer, the numbers of the new experts.
        like: by new task, the one whose k it takes over.
    """
    experts = {layer: [*old, *new[layer]] for layer, old in layout.experts.items()}
    tasks = dict(layout.tasks)
    for name, other in like.items():
        tasks[name] = TaskLayout({layer: list(all_) for layer, all_ in experts.items()}, dict(other.top_k))
    return Layout(experts, tasks)


def rows_kept(name: str, old: Layout, new: Layout) -> list[int] | None:
    """The rows of a tensor that a smaller network keeps; None where it keeps the tensor as it is.

    Args:
        name: of a parameter or buffer that both networks have.
        old: layout of the tensor.
        new: of the smaller network.
    """
    router = router_of(name)
    if router is None or router.tensor == "updates":
        return None
    before, after = (layout.tasks[router.task].experts[router.layer] for layout in (old, new))
    return None if before == after else [before.index(expert) for expert in after]


def _with_experts(layout: Layout, kept: Mapping[str, set[int]]) -> Layout:
    def only(experts: Mapping[str, Sequence[int]]) -> dict[str, list[int]]:
        return {layer: [expert for expert in own if expert in kept[layer]] for layer, own in experts.items()}

    tasks = {name: TaskLayout(only(own.experts), dict(own.top_k)) for name, own in layout.tasks.items()}
    return Layout(only(layout.experts), tasks)
