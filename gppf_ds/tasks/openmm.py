"""What the tasks built on mmdet and mmseg share: quiet import, configuration, data, and a model without a backbone.

Under SIMT a collective may only depend on the schedule, and which ranks run a given head changes with every step. So
nothing that is built here communicates: synchronised batch norm becomes local, and the all-reduces inside some losses
become the identity.
"""

from __future__ import annotations

import builtins
import copy
import importlib
import importlib.util
import logging
import pickle
import sys
import warnings
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache, cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

import gppf_ds
from gppf_ds.errors import SampleError, UserError
from gppf_ds.tasks import mmcv_ops
from gppf_ds.tasks.task import Batch, Dataset, FeatureInfo, Head, InputNormalisation, Split, Task

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
    if "data_preprocessor" not in config.model:
        raise UserError(f"{path} has no 'model.data_preprocessor': add one with the images' mean and std.")
    return config


def _find_config(library: Library, name: str) -> Path:
    if Path(name).is_file():
        return Path(name)
    package = Path(gppf_ds.__file__).parent
    folders = [package / "ds_configs" / "mm", package.parent / "ds_configs" / "mm"]
    spec = importlib.util.find_spec(library)
    if spec is None or spec.origin is None:
        raise UserError(f"{library} is not installed: install gppf-ds with its dependencies.")
    folders.append(Path(spec.origin).parent / ".mim" / "configs")
    if not Path(name).is_absolute():
        for folder in folders:
            found = sorted(folder.rglob(name))
            if len(found) > 1:
                raise UserError(f"Several configurations of {library} are called {name}: write more of the path.")
            if found:
                return found[0]
    raise UserError(f"There is no configuration {name}: give a path, or a name from {library}'s own configs.")


def leaf_dataset(dataset: Any) -> Any:
    """The data set that reads files, inside wrappers such as ``RepeatDataset`` and ``MultiImageMixDataset``."""
    while "dataset" in dataset:
        dataset = dataset["dataset"]
    return dataset


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


class ReadGuard:
    """A transform that reads a file: whatever fails in it is a :class:`SampleError` that names ``sample[key]``."""

    def __init__(self, transform: dict[str, Any], key: str) -> None:
        from mmengine.registry import TRANSFORMS

        self.transform = TRANSFORMS.build(transform)
        self.key = key

    def __call__(self, sample: dict[str, Any]) -> Any:
        try:
            return self.transform(sample)
        except Exception as error:
            raise SampleError(f"{sample.get(self.key)} cannot be read ({error}).") from error


def guard_reading(node: Any, keys: dict[str, str]) -> Any:
    """A copy of a data set's configuration in which the transforms named by ``keys`` are guarded (type to path key)."""
    if isinstance(node, list | tuple):
        return type(node)(guard_reading(child, keys) for child in node)
    if not isinstance(node, dict):
        return node
    kind = str(node.get("type", "")).rpartition(".")[2]
    if kind in keys:
        return {"type": ReadGuard, "transform": dict(node), "key": keys[kind]}
    return {key: guard_reading(value, keys) for key, value in node.items()}


class Samples:
    """A data set of the library that can be sent to worker processes, which know nothing of mm yet."""

    def __init__(self, library: Library, inner: Any) -> None:
        self.library = library
        self.inner = inner

    def __len__(self) -> int:
        return len(self.inner)

    def __getitem__(self, index: int) -> Any:
        return self.inner[index]

    def __reduce__(self) -> tuple[Any, ...]:
        # The library has to be loaded our way before its classes are unpickled.
        return _restore_samples, (self.library, pickle.dumps(self.inner))


def _restore_samples(library: Library, inner: bytes) -> Samples:
    _load(library)
    return Samples(library, pickle.loads(inner))


class PassThrough(nn.Module):
    """Stands where a configuration has its backbone: takes the feature maps themselves as the input."""

    def forward(self, features: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Gives the maps on."""
        return tuple(features)


def fit_channels(library: Library, model: Any, channels: Sequence[int]) -> int:
    """Sets the ``in_channels`` of whatever follows the backbone to those of the maps it will get.

    A neck (the first of a list) takes as many maps as its ``in_channels`` has entries, the coarsest ones. Without a
    neck the heads take them: at ``in_index`` where they have one, else likewise the coarsest ones.

    Args:
        model: the model's configuration, changed in place.
        channels: channels of the maps that the task may use, finest first.

    Returns:
        How many of the maps, counted from the coarsest, the model has to be given.

    Raises:
        UserError: the configuration needs more maps than there are or is of a kind that cannot be fitted.
    """
    neck = model.get("neck")
    heads = [part for key, value in model.items() if key.endswith("_head") for part in _as_list(value)]
    parts = [part for part in (_as_list(neck)[:1] if neck else heads) if "in_channels" in part]
    if not parts or "shared_head" in model.get("roi_head", {}):
        raise UserError(
            f"The {model.type} has nothing behind its backbone that takes feature maps by 'in_channels': "
            f"choose a configuration with a feature pyramid."
        )
    for part in parts:
        wanted = part["in_channels"]
        index = part.get("in_index", range(-len(wanted), 0) if isinstance(wanted, Sequence) else -1)
        try:
            part["in_channels"] = [channels[i] for i in index] if isinstance(index, Sequence) else channels[index]
        except IndexError:
            raise UserError(
                f"{part['type']} wants feature maps {index} and the backbone has {len(channels)} of the task's "
                f"strides: choose another configuration or backbone."
            ) from None
        if "c1_in_channels" in part:  # DeepLabV3+: beside its own map it reads the finest one
            part["c1_in_channels"] = channels[0]
    if not neck and library == "mmseg":
        return len(channels)
    return max(len(_as_list(part["in_channels"])) for part in parts)


def _as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]


class OpenMMHead(Head):
    """A model of the library with :class:`PassThrough` for its backbone, weights initialised as the library does.

    Args:
        library: the library.
        model: the model's configuration; not changed.
        features: all maps of the backbone.
        min_stride: the finest map that may be used.

    Attributes:
        config: the configuration that the model was built from.
        maps: indices of the maps that the model takes.
    """

    def __init__(self, library: Library, model: Any, features: FeatureInfo, min_stride: int) -> None:
        super().__init__()
        with scope(library):
            from mmengine.config import ConfigDict
            from mmengine.model import revert_sync_batchnorm
            from mmengine.registry import MODELS

            model = ConfigDict(model.to_dict())
            for key in ("pretrained", "init_cfg", "data_preprocessor"):
                model.pop(key, None)
            model.backbone = {"type": PassThrough}
            usable = features.select(min_stride)
            count = fit_channels(library, model, [features.channels[i] for i in usable])
            self.maps = usable[-count:]
            for node in walk(model):
                if node.get("type") in ("SyncBN", "MMSyncBN"):
                    node["type"] = "BN"
            self.config = copy.deepcopy(model)  # building changes parts of it
            self.model = MODELS.build(model)
            self.model.init_weights()
            # Some modules ask for SyncBN in their code.
            self.model = revert_sync_batchnorm(self.model)

    def select(self, features: Sequence[Tensor]) -> list[Tensor]:
        """The maps that the model was built for."""
        return [features[i] for i in self.maps]

    def loss(self, features: list[Tensor], targets: Any) -> dict[str, Tensor]:
        """The library's loss terms: entries with "loss" in their name, lists summed over the means of their items."""
        terms = self.model.loss(self.select(features), targets)
        return {
            name: torch.stack([item.mean() for item in _as_list(value)]).sum()
            for name, value in terms.items()
            if "loss" in name
        }


class OpenMMTask(Task):
    """A task described by a configuration of mmdet or mmseg: data set, pipelines, data preprocessor, model.

    Args:
        config: see :func:`load_config`.
        batch_size, weight, loss_weight, source: see :class:`Task`; the configuration's batch size is not used.
        overrides: values to merge into the configuration.

    Attributes:
        data_root: takes the place of that of the configuration's data sets, where not None.
    """

    library: ClassVar[Library]
    readers: ClassVar[dict[str, str]]
    """The transforms that read files, and the key of the path that each reads."""

    def __init__(
        self,
        config: str,
        batch_size: int,
        weight: float,
        loss_weight: float,
        overrides: dict[str, Any] | None,
        source: str | None = None,
    ) -> None:
        super().__init__(batch_size, weight, loss_weight, source)
        self.config = config
        self.overrides = overrides or {}
        self.data_root: str | None = None
        self._preprocessor: nn.Module | None = None

    @cached_property
    def cfg(self) -> Any:
        """The configuration (``mmengine.Config``) with the task's data in it."""
        cfg = load_config(self.library, self.config, self.overrides)
        if self.data_root is not None:
            for split in ("train", "val"):
                leaf_dataset(cfg[f"{split}_dataloader"].dataset).data_root = self.data_root
        self._adapt(cfg)
        leaf_dataset(cfg.val_dataloader.dataset).test_mode = True
        return cfg

    def data_folder(self) -> Path | None:
        """See :meth:`Task.data_folder`; else ``data_root`` of the configuration's val set, the first one of several."""
        if (named := super().data_folder()) is not None:
            return named
        dataset = leaf_dataset(load_config(self.library, self.config, self.overrides).val_dataloader.dataset)
        root = dataset.get("data_root") or dataset.get("datasets", [{}])[0].get("data_root")
        return Path(root) if root else None

    def use_data(self, root: Path) -> None:
        """See :meth:`Task.use_data`: the data sets get this ``data_root``. Comes before :meth:`shrink`."""
        self.data_root = str(root)
        self.__dict__.pop("cfg", None)

    def shrink(self) -> None:
        """See :meth:`Task.shrink` and :func:`gppf_ds.tasks.openmm_shrink.shrink_sizes`."""
        from gppf_ds.tasks.openmm_shrink import shrink_sizes

        self.batch_size = min(self.batch_size, 2)
        shrink_sizes(self.cfg)
        self._preprocessor = None

    @abstractmethod
    def _adapt(self, cfg: Any) -> None:
        """Puts the user's data into the configuration."""

    def dataset(self, split: Split) -> Dataset:
        """The library's own data set and pipeline: ``train`` as configured, ``val`` with every image once."""
        with scope(self.library):
            from mmengine.registry import DATASETS

            return Samples(self.library, DATASETS.build(guard_reading(self._data_config(split), self.readers)))

    def _data_config(self, split: Split) -> dict[str, Any]:
        """What the data set of a split is built from; runs in :func:`scope`."""
        return dict(self.cfg[f"{split}_dataloader"].dataset.to_dict())

    def sample(self, image: Path) -> Any:
        """The image through the val pipeline, less the transforms that read or check the ground truth."""
        steps = leaf_dataset(self.cfg.val_dataloader.dataset).pipeline
        steps = [step for step in steps if not _kind(step).endswith(("Annotations", "LabelCheck"))]
        with scope(self.library):
            from mmengine.dataset import Compose

            pipeline = Compose(guard_reading(steps, self.readers))
        return pipeline({"img_path": str(image), "img_id": 0})

    def collate(self, samples: list[Any]) -> Any:
        """``{"inputs": [image], "data_samples": [sample]}``"""
        from mmengine.dataset import pseudo_collate

        return pseudo_collate(samples)

    def preprocess(self, batch: Any, device: torch.device, training: bool) -> Batch:
        """The configuration's data preprocessor on the device: normalise, pad; the targets are its data samples."""
        done = self.preprocessor(device)(batch, training)
        return Batch(done["inputs"], done["data_samples"])

    def input_normalisation(self) -> InputNormalisation:
        """That of the configuration's data preprocessor; images are read as BGR."""
        settings = self.cfg.model.data_preprocessor
        mean, std = (tuple(settings.get(key) or default) for key, default in (("mean", (0, 0, 0)), ("std", (1, 1, 1))))
        return InputNormalisation("RGB" if settings.get("bgr_to_rgb") else "BGR", (0, 255), mean, std)

    def preprocessor(self, device: torch.device) -> nn.Module:
        """The data preprocessor on this device."""
        if self._preprocessor is None:
            with scope(self.library):
                from mmengine.registry import MODELS

                self._preprocessor = MODELS.build(self.cfg.model.data_preprocessor)
        return self._preprocessor.to(device)

    def __getstate__(self) -> dict[str, Any]:
        # A task goes to worker processes for collate(); what lives on the device stays here.
        return self.__dict__ | {"_preprocessor": None}


def _kind(step: Any) -> str:
    """The name of a transform's class, which a configuration may give as a class or as its name."""
    return str(getattr(step["type"], "__name__", step["type"]))


def existing(path: Path, key: str) -> Path:
    """The path; raises :class:`UserError` if it is not there."""
    if not path.exists():
        raise UserError(f"{path} does not exist: correct {key}.")
    return path
