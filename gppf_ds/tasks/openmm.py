"""mmdet and mmseg in one process, imported quietly, and their configurations: found, read, walked.

Under SIMT a collective may only depend on the schedule, and which ranks run a given head changes with every step. So
nothing that is built here communicates: synchronised batch norm becomes local, and the all-reduces inside some losses
become the identity.
"""

from __future__ import annotations

import builtins
import importlib
import importlib.util
import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import gppf_ds
from gppf_ds.errors import UserError
from gppf_ds.tasks import mmcv_ops

Library = Literal["mmdet", "mmseg"]


@contextmanager
def scope(library: Library) -> Iterator[None]:
    """Makes ``library`` the one whose registries resolve type names, so that both can be used in one process.

    Warnings and prints inside are dropped: they repeat what the libraries' manuals say.
    """
    _load(library)
    from mmengine.registry import DefaultScope

    with _quiet(), DefaultScope.overwrite_default_scope(library):
        yield


@cache
def _load(library: Library) -> None:
    """Imports the library once (seconds), without its notes on optional packages, and cuts its collectives."""
    mmcv_ops.install()
    from mmengine.logging import MMLogger

    if not MMLogger.check_instance_created("gppf_ds"):
        MMLogger.get_instance("gppf_ds", logger_name="mmengine", log_level=logging.ERROR)
    with _quiet():
        for part in ("datasets", "models"):
            importlib.import_module(f"{library}.{part}")
    _silence_collectives()


@contextmanager
def _quiet() -> Iterator[None]:
    # Not redirect_stdout(): a log handler made meanwhile would keep the replaced stream for good.
    print_ = builtins.print
    builtins.print = _identity
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        builtins.print = print_


def _silence_collectives() -> None:
    """Replaces every collective inside mmdet and mmseg by what it does in a world of one process."""
    for name, module in list(sys.modules.items()):
        if name.startswith(("mmdet.", "mmseg.")) and callable(getattr(module, "reduce_mean", None)):
            module.reduce_mean = _identity  # type: ignore[attr-defined]
    alone: dict[str, dict[str, Any]] = {
        "mmdet.models.data_preprocessors.data_preprocessor": {
            "get_dist_info": lambda: (0, 1),
            "barrier": _identity,
            "broadcast": _identity,
        },
        "mmdet.models.losses.eqlv2_loss": {"dist": SimpleNamespace(all_reduce=_identity)},
        "mmseg.models.decode_heads.san_head": {"all_reduce": _identity},
    }
    for name, replacements in alone.items():
        if name in sys.modules:
            vars(sys.modules[name]).update(replacements)


def _identity(value: Any = None, *_args: Any, **_kwargs: Any) -> Any:
    return value


def load_config(library: Library, name: str, overrides: dict[str, Any]) -> Any:
    """Reads an ordinary mmengine configuration, without importing mmdet or mmseg.

    Args:
        name: path of a ``.py`` file, or the name of one that ships with this package (``ds_configs/mm``) or with the
            library, for example ``mask-rcnn_r50_fpn_1x_coco.py``.
        overrides: values to merge, nested or with dotted keys (``model.neck.out_channels``).

    Returns:
        ``mmengine.Config``

    Raises:
        UserError: there is no such file, it cannot be read, an override does not fit or it describes no model.
    """
    from mmengine.config import Config

    path = _find_config(library, name)
    try:
        config = Config.fromfile(str(path))
        config.merge_from_dict(overrides)
    except Exception as error:  # a configuration is a program: it can fail in any way
        raise UserError(f"{path} cannot be read with these overrides ({type(error).__name__}: {error}).") from error
    for key in ("model", "train_dataloader", "val_dataloader"):
        if key not in config:
            raise UserError(f"{path} has no '{key}': name a complete {library} configuration.")
    for node in walk(config._cfg_dict):
        if isinstance(node.get("scale"), list):
            node["scale"] = tuple(node["scale"])  # YAML has no tuples, and mmcv takes no list for (width, height)
    if "data_preprocessor" not in config.model:
        raise UserError(f"{path} has no 'model.data_preprocessor': add one with the images' mean and std.")
    return config


def _find_config(library: Library, name: str) -> Path:
    if Path(name).is_file():
        return Path(name)
    spec = importlib.util.find_spec(library)
    if spec is None or spec.origin is None:
        raise UserError(f"{library} is not installed: install gppf-ds with its dependencies.")
    if not Path(name).is_absolute():
        for folder in (gppf_ds.shipped_configs() / "mm", Path(spec.origin).parent / ".mim" / "configs"):
            found = sorted(folder.rglob(name))
            if len(found) > 1:
                raise UserError(f"Several configurations of {library} are called {name}: write more of the path.")
            if found:
                return found[0]
    raise UserError(f"There is no configuration {name}: give a path, or a name from {library}'s own configs.")


def leaf_datasets(dataset: Any) -> Iterator[Any]:
    """The data sets that read files, inside wrappers such as ``RepeatDataset`` and ``ConcatDataset``."""
    for inner in dataset.get("datasets") or [dataset.get("dataset")]:
        if inner is None:
            yield dataset
        else:
            yield from leaf_datasets(inner)


def leaf_dataset(dataset: Any) -> Any:
    """The first of :func:`leaf_datasets`."""
    return next(leaf_datasets(dataset))


def only_leaf_dataset(dataset: Any) -> Any:
    """The first of :func:`leaf_datasets`, after the others have been taken out of what wraps them."""
    for node in walk(dataset):
        if "datasets" in node:
            node["datasets"] = node["datasets"][:1]
    return leaf_dataset(dataset)


def walk(node: Any) -> Iterator[Any]:
    """Every mapping in a configuration, outermost first."""
    if isinstance(node, dict):
        yield node
    if isinstance(node, dict | list | tuple):
        for child in list(node.values()) if isinstance(node, dict) else node:
            yield from walk(child)


def class_counts(model: Any) -> set[int]:
    """The class counts of the model's heads; that of a region proposal network counts objects, not classes."""
    return {node[key] for node, key in _class_entries(model)}


def set_class_count(model: Any, count: int) -> None:
    """Sets the numbers that :func:`class_counts` reads, and class weights that are the same for all classes."""
    for node, key in _class_entries(model):
        node[key] = count
    for node in walk(model):
        weights = node.get("class_weight")
        # Mask2Former and its kin: one weight per class and a last one for "no object".
        if isinstance(weights, list) and len(set(weights[:-1])) == 1:
            node["class_weight"] = weights[:1] * count + weights[-1:]
        elif isinstance(weights, list) and len(weights) not in (count, count + 1):
            raise UserError(f"class_weight has {len(weights)} entries and the data {count} classes: make them agree.")


def _class_entries(model: Any) -> list[tuple[Any, str]]:
    heads = [value for key, value in model.items() if key != "rpn_head"]
    return [(node, key) for node in walk(heads) for key in ("num_classes", "num_things_classes") if key in node]


def existing(path: Path, key: str) -> Path:
    """The path; raises :class:`UserError` if it is not there."""
    if not path.exists():
        raise UserError(f"{path} does not exist: correct {key}.")
    return path
