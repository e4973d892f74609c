"""A task that a configuration of mmdet or mmseg describes: its data as they are, its model without the backbone."""

from __future__ import annotations

import copy
import pickle
from abc import abstractmethod
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from gppf_ds.errors import UserError
from gppf_ds.tasks.openmm import Library, leaf_dataset, leaf_datasets, load_config, scope, walk
from gppf_ds.tasks.openmm_index import build_dataset
from gppf_ds.tasks.openmm_pipeline import adapted
from gppf_ds.tasks.task import Batch, Dataset, FeatureInfo, Head, InputNormalisation, Split, Task, evenly


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
    with scope(library):
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
            for dataset in (cfg.train_dataloader.dataset, cfg.val_dataloader.dataset):
                for leaf in leaf_datasets(dataset):
                    leaf.data_root = self.data_root
        self._adapt(cfg)
        for leaf in leaf_datasets(cfg.val_dataloader.dataset):
            leaf.test_mode = True
        return cfg

    def data_folder(self) -> Path | None:
        """See :meth:`Task.data_folder`; else ``data_root`` of the configuration's val set, the first one of several."""
        if (named := super().data_folder()) is not None:
            return named
        cfg = load_config(self.library, self.config, self.overrides)
        root = leaf_dataset(cfg.val_dataloader.dataset).get("data_root")
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
            return Samples(self.library, build_dataset(adapted(self._data_config(split), self.readers)))

    def _data_config(self, split: Split) -> dict[str, Any]:
        """What the data set of a split is built from; runs in :func:`scope`."""
        return dict(self.cfg[f"{split}_dataloader"].dataset.to_dict())

    def image_files(self, split: Split, count: int) -> list[Path]:
        """See :meth:`Task.image_files`."""
        with scope(self.library):
            inner = build_dataset(self._data_config(split))
            return [Path(inner.get_data_info(index)["img_path"]) for index in evenly(len(inner), count)]

    def sample(self, image: Path) -> Any:
        """The image through the val pipeline, less the transforms that read or check the ground truth."""
        steps = leaf_dataset(self.cfg.val_dataloader.dataset).pipeline
        steps = [step for step in steps if not _kind(step).endswith(("Annotations", "LabelCheck"))]
        with scope(self.library):
            from mmengine.dataset import Compose

            pipeline = Compose(adapted(steps, self.readers))
        return pipeline({"img_path": str(image), "img_id": 0})

    def collate(self, samples: list[Any]) -> Any:
        """``{"inputs": [image], "data_samples": [sample]}``"""
        from mmengine.dataset import pseudo_collate

        return pseudo_collate(samples)

    def preprocess(self, batch: Any, device: torch.device, training: bool) -> Batch:
        """The configuration's data preprocessor on the device: normalise, pad; the targets are its data samples."""
        done = self.preprocessor(device)(batch, training)
        sizes = torch.tensor([sample.img_shape[:2] for sample in done["data_samples"]], device=device)
        return Batch(done["inputs"], done["data_samples"], sizes)

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
