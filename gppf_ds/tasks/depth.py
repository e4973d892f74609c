"""Monocular depth: pairs of an image and a 16-bit depth map, the BTS decoder, the scale-invariant log loss."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gppf_ds.errors import SampleError, UserError
from gppf_ds.tasks.bts import BTSDecoder
from gppf_ds.tasks.depth_metric import DepthMetric, DepthTargets
from gppf_ds.tasks.probe import of_depth
from gppf_ds.tasks.task import (
    Batch,
    Dataset,
    FeatureInfo,
    Head,
    InputNormalisation,
    ProbeSamples,
    Split,
    Task,
    evenly,
)

SIZE_MULTIPLE = 32
"""Sides of the network's input are multiples of the backbone's coarsest stride."""

Augment = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]

LOG_OFFSET = 1e-3
"""Metres added to both depths before the logarithm of the loss."""

_SAMPLED = 8
"""Pairs that are looked at before training."""

ROTATE_PROBABILITY = COLOR_PROBABILITY = 0.5


class Depth(Task):
    """Depth in metres for every pixel, from one image (GPPF appendix D.2, KITTI row; loss and decoder of BTS).

    The defaults are the KITTI protocol of the public BTS recipes, which has besides ``depth_scale`` 1/256, ``kb_crop``
    (352, 1216), ``garg_crop``, ``flip_test`` and lists of pairs. As there (and in AdaBins) the crop of Garg et al. is
    taken of the cropped image; the first implementation of BTS takes it of the whole one.

    Args:
        data: root folder.
        batch_size: images per device and step.
        weight: sampling weight of the task.
        loss_weight: factor on the loss; GPPF has 0.1 for KITTI.
        images: folder of the images under the root, ``{split}`` stands for train and val.
        depth: folder of the 16-bit ``.png`` depth maps, one for each image and of its size and stem, 0 = not measured.
        train_list: file of pairs of an image and a depth map, relative to the root, in place of pairing by stem: see
            :func:`gppf_ds.data.sets.kitti_depth.read_pairs`; the paths in it are relative to the two folders.
        val_list: the same for val; give both or neither.
        depth_scale: metres per stored unit.
        min_depth: pixels at this depth or nearer, in metres, neither train nor count.
        max_depth: pixels at this depth or farther, in metres, neither train nor count; the head's output ends here.
        kb_crop: (height, width) at the bottom and in the middle that all images are cut to first; None for all of it.
        input_size: (height, width) of the training crop, multiples of 32; smaller images are padded.
        flip: probability of a horizontal flip.
        rotate: largest rotation either way in degrees, for half of the images; 0 for none.
        color: largest relative change of gamma, brightness and each colour, for half of the images; 0 for none.
        variance_focus: lambda of the loss, the share of the common scale error that is forgiven.
        head_channels: width of the decoder, a multiple of 16.
        garg_crop: count only the part of an image that holds lidar points on KITTI.
        flip_test: predict every image a second time flipped, and average.
        source: see :class:`Task`.

    Raises:
        UserError: an argument is out of its range.
    """

    headline = "abs_rel"
    higher_is_better = False
    min_stride = 2

    def __init__(
        self,
        data: str,
        batch_size: int,
        weight: float = 1.0,
        loss_weight: float = 1.0,
        images: str = "images/{split}",
        depth: str = "depth/{split}",
        train_list: str | None = None,
        val_list: str | None = None,
        depth_scale: float = 0.001,
        min_depth: float = 1e-3,
        max_depth: float = 80.0,
        kb_crop: tuple[int, int] | None = None,
        input_size: tuple[int, int] = (352, 704),
        flip: float = 0.5,
        rotate: float = 2.5,
        color: float = 0.1,
        variance_focus: float = 0.85,
        head_channels: int = 512,
        garg_crop: bool = False,
        flip_test: bool = False,
        source: str | None = None,
    ) -> None:
        super().__init__(batch_size, weight, loss_weight, source)
        if any(side < SIZE_MULTIPLE or side % SIZE_MULTIPLE for side in input_size):
            raise UserError(f"input_size must be (height, width) in multiples of {SIZE_MULTIPLE}, not {input_size}.")
        if not 0 < min_depth < max_depth:
            raise UserError(f"min_depth must be above 0 and below max_depth, not {min_depth} and {max_depth}.")
        if depth_scale <= 0:
            raise UserError(f"depth_scale must be above 0 metres per unit, not {depth_scale}.")
        for name, share in (("flip", flip), ("color", color), ("variance_focus", variance_focus)):
            if not 0 <= share <= 1:
                raise UserError(f"{name} must lie in [0, 1], not {share}.")
        if (train_list is None) != (val_list is None):
            raise UserError("train_list and val_list belong together: give both or neither.")
        self.data = Path(data)
        self.folders = (images, depth)
        self.lists = {"train": train_list, "val": val_list}
        self.depth_scale = depth_scale
        self.min_depth = min_depth
        self.max_depth = max_depth
        self.kb_crop = kb_crop
        self.input_size = input_size
        self.flip = flip
        self.rotate = rotate
        self.color = color
        self.variance_focus = variance_focus
        self.head_channels = head_channels
        self.garg_crop = garg_crop
        self.flip_test = flip_test

    def use_data(self, root: Path) -> None:
        """From now on ``root`` is the root folder."""
        self.data = root

    def shrink(self) -> None:
        """Two images of at most 64x128 pixels; the crops come first, so the data may be a quarter of KITTI's size."""
        self.batch_size = 2
        self.kb_crop = self.kb_crop and (64, 128)
        self.input_size = (64, 64)

    def check(self) -> None:
        """Raises :class:`UserError` where folders, pairs or ``depth_scale`` cannot work."""
        for split in ("train", "val"):
            pairs = self._pairs(split)
            if not any(image.is_file() and depth.is_file() for image, depth in pairs[:_SAMPLED]):
                raise UserError(
                    f"{pairs[0][0]} and {pairs[0][1]} are not both there, nor any of the next pairs of "
                    f"{self.lists[split]}: correct data, images, depth or {split}_list."
                )
            _check_range(pairs, self.depth_scale, self.min_depth, self.max_depth)

    def dataset(self, split: Split) -> Dataset:
        """Samples are (uint8 image (3, H, W), float32 metres (H, W)): crops to train on, whole images for ``val``."""
        augment = self._augment if split == "train" else None
        return DepthDataset(self._pairs(split), self.depth_scale, self.kb_crop, augment)

    def image_files(self, split: Split, count: int) -> list[Path]:
        """See :meth:`Task.image_files`."""
        pairs = self._pairs(split)
        return [pairs[index][0] for index in evenly(len(pairs), count)]

    def sample(self, image: Path) -> tuple[Tensor, Tensor]:
        """The image as in ``val``, without a measured pixel."""
        pixels = bottom_crop(_read_image(image), self.kb_crop, image)
        return pixels, torch.zeros(pixels.shape[1:])

    def _pairs(self, split: str) -> list[tuple[Path, Path]]:
        from gppf_ds.data.folders import pair_by_stem
        from gppf_ds.data.sets.kitti_depth import read_pairs

        images, depth = (self.data / folder.format(split=split) for folder in self.folders)
        listed = self.lists[split]
        if listed is not None:
            return read_pairs(self.data / listed, images, depth)
        return pair_by_stem(images, depth, ".png")

    def _augment(self, image: Tensor, depth: Tensor) -> tuple[Tensor, Tensor]:
        """(3, H, W) bytes and (H, W) metres -> the same at ``input_size``, changed alike; new pixels have no depth."""
        from torchvision import tv_tensors
        from torchvision.transforms import v2

        steps: list[torch.nn.Module] = []
        if self.rotate > 0:
            rotation = v2.RandomRotation(self.rotate, interpolation=v2.InterpolationMode.BILINEAR)
            steps.append(v2.RandomApply([rotation], p=ROTATE_PROBABILITY))
        steps += [v2.RandomCrop(self.input_size, pad_if_needed=True), v2.RandomHorizontalFlip(self.flip)]
        # A mask is transformed by nearest neighbour: depths are never mixed across an edge.
        both = v2.Compose(steps)(tv_tensors.Image(image), tv_tensors.Mask(depth[None]))
        image, depth = (part.as_subclass(Tensor) for part in both)
        return jitter_color(image, self.color), depth[0]

    def collate(self, samples: list[tuple[Tensor, Tensor]]) -> dict[str, Any]:
        """Pads to the largest image, and on to multiples of 32: images by their last pixels, depth by 0."""
        from torchvision.transforms.v2.functional import pad

        sizes = [(depth.shape[0], depth.shape[1]) for _, depth in samples]
        height, width = (-(-max(sides) // SIZE_MULTIPLE) * SIZE_MULTIPLE for sides in zip(*sizes, strict=True))
        images, depths = [], []
        for (image, depth), size in zip(samples, sizes, strict=True):
            missing = [0, 0, width - size[1], height - size[0]]
            images.append(pad(image, missing, padding_mode="edge"))
            depths.append(pad(depth[None], missing)[0])
        return {"images": torch.stack(images), "depth": torch.stack(depths), "sizes": sizes}

    def preprocess(self, batch: dict[str, Any], device: torch.device, training: bool) -> Batch:
        """Targets are :class:`DepthTargets` on the device."""
        from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
        from torchvision.transforms.v2.functional import normalize

        images = batch["images"].to(device, non_blocking=True).float().div(255)
        images = normalize(images, list(IMAGENET_DEFAULT_MEAN), list(IMAGENET_DEFAULT_STD))
        mirrored = self.flip_test and not training
        if mirrored:
            images = torch.cat([images, images.flip(-1)])
        sizes = None if mirrored else torch.tensor(batch["sizes"], device=device)
        targets = DepthTargets(batch["depth"].to(device, non_blocking=True), batch["sizes"], mirrored)
        # A mirrored image is padded at the left: it counts as whole.
        return Batch(images, targets, sizes)

    def input_normalisation(self) -> InputNormalisation:
        """ImageNet's mean and standard deviation."""
        from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

        return InputNormalisation("RGB", (0, 1), IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)

    def build_head(self, features: FeatureInfo) -> Head:
        """A BTS decoder that takes every map of the backbone."""
        decoder = BTSDecoder(features, self.head_channels, self.max_depth)
        return DepthHead(decoder, self.min_depth, self.max_depth, self.variance_focus)

    def metric(self) -> DepthMetric:
        """The metrics of the Eigen protocol."""
        return DepthMetric(self.min_depth, self.max_depth, self.garg_crop)

    def describe(self, head: Head, features: list[Tensor], targets: DepthTargets) -> list[dict[str, Any]]:
        """``depth``: a map in ``metres_per_unit``, with ``min`` and ``max`` in metres.

        The unit is the millimetre; it is coarser by a power of ten where 16 bits cannot hold ``max_depth`` otherwise.
        """
        unit = 10.0 ** max(-3, math.ceil(math.log10(self.max_depth / 65535)))
        described = []
        for depth in head.predict(features, targets):
            least, most = float(depth.min()), float(depth.max())
            stored = (depth / unit).round().numpy().astype("uint16")
            values = {"depth": stored, "metres_per_unit": unit, "min": least, "max": most}
            described.append({"summary": f"{least:.2f} to {most:.2f} m", **values})
        return described

    def probe_dataset(self, split: Split) -> Dataset:
        """Whole images of a split."""
        return DepthDataset(self._pairs(split), self.depth_scale, self.kb_crop, augment=None)

    def probe(self, features: list[Tensor], targets: DepthTargets) -> ProbeSamples:
        """The logarithm of the depth at some measured pixels; see :func:`gppf_ds.tasks.probe.of_depth`."""
        return of_depth(features, targets, self.min_depth, self.max_depth)


class DepthDataset:
    """Reads pairs of an image and a depth map; ``crop`` (see :func:`bottom_crop`) and ``augment`` change both alike."""

    def __init__(
        self, pairs: list[tuple[Path, Path]], depth_scale: float, crop: tuple[int, int] | None, augment: Augment | None
    ) -> None:
        self.pairs = pairs
        self.depth_scale = depth_scale
        self.crop = crop
        self.augment = augment

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        from gppf_ds.data.folders import read_depth

        image_path, depth_path = self.pairs[index]
        image = _read_image(image_path)
        depth = torch.from_numpy(read_depth(depth_path, self.depth_scale))
        if image.shape[1:] != depth.shape:
            raise SampleError(f"{depth_path} is {_size(depth)}, but its image {image_path.name} is {_size(image)}.")
        image, depth = (bottom_crop(part, self.crop, image_path) for part in (image, depth))
        return self.augment(image, depth) if self.augment else (image, depth)


class DepthHead(Head):
    """The decoder with its loss; predictions are (H, W) metres, clipped to [min_depth, max_depth]."""

    prediction_layers = ("decoder.fuse.1.*",)

    def __init__(self, decoder: BTSDecoder, min_depth: float, max_depth: float, variance_focus: float) -> None:
        super().__init__()
        self.decoder = decoder
        self.min_depth = min_depth
        self.max_depth = max_depth
        self.variance_focus = variance_focus

    def loss(self, features: list[Tensor], targets: DepthTargets) -> dict[str, Tensor]:
        """The scale-invariant log loss over the measured pixels of the batch."""
        depth = targets.depth
        valid = (depth > self.min_depth) & (depth < self.max_depth)
        prediction = self.decoder(features).squeeze(1)
        return {"silog": scale_invariant_log_loss(prediction, depth, valid, self.variance_focus)}

    def predict(self, features: list[Tensor], targets: DepthTargets) -> list[Tensor]:
        """One map per image, without the padding."""
        depths = self.decoder(features).squeeze(1).clamp(self.min_depth, self.max_depth)
        if targets.mirrored:
            plain, flipped = depths.chunk(2)
            depths = (plain + flipped.flip(-1)) / 2
        depths = depths.cpu()
        return [depth[:height, :width] for depth, (height, width) in zip(depths, targets.sizes, strict=True)]


def scale_invariant_log_loss(prediction: Tensor, depth: Tensor, valid: Tensor, variance_focus: float) -> Tensor:
    """sqrt(var(g) + (1 - lambda) mean(g)^2) with g the difference of the logarithms (Eigen et al. 2014; BTS section 3).

    Without a valid pixel the loss is (as good as) 0 and so are its gradients.

    Args:
        prediction: metres, any shape.
        depth: metres, the same shape.
        valid: the pixels that count.
        variance_focus: lambda; at 1 an error common to all pixels costs nothing.
    """
    # Weights in place of selected pixels: shapes, and with them the work on a GPU, do not depend on the data.
    share = valid.float() / valid.sum().clamp(min=1)
    g = torch.log(prediction + LOG_OFFSET) - torch.log(depth + LOG_OFFSET)
    mean = (share * g).sum()
    variance = (share * (g - mean) ** 2).sum()
    # The tiny number keeps the root's gradient finite at 0.
    return torch.sqrt(variance + (1 - variance_focus) * mean**2 + 1e-12)


def bottom_crop(pixels: Tensor, size: tuple[int, int] | None, path: Path) -> Tensor:
    """The part of (..., H, W) of that (height, width) at the bottom and in the middle; all of it for None.

    The "KB crop" of the KITTI benchmark cuts to (352, 1216). ``path`` is for :class:`SampleError`, raised where the
    pixels are fewer.
    """
    if size is None:
        return pixels
    top, left = pixels.shape[-2] - size[0], (pixels.shape[-1] - size[1]) // 2
    if top < 0 or left < 0:
        raise SampleError(f"{path} is {_size(pixels)}, smaller than kb_crop ({size[1]}x{size[0]}).")
    return pixels[..., top:, left : left + size[1]]


def jitter_color(image: Tensor, strength: float) -> Tensor:
    """Changes gamma, brightness and each colour by a factor in 1 +- strength, for half of the images.

    Args:
        image: (3, H, W) bytes.
        strength: largest relative change.
    """
    if strength == 0 or torch.rand(()) >= COLOR_PROBABILITY:
        return image
    gamma, brightness, *color = torch.empty(5).uniform_(1 - strength, 1 + strength)
    changed = (image / 255) ** gamma * brightness * torch.stack(color)[:, None, None]
    return changed.clamp(0, 1).mul(255).round().to(torch.uint8)


def _check_range(pairs: list[tuple[Path, Path]], scale: float, min_depth: float, max_depth: float) -> None:
    """A wrong ``depth_scale`` leaves no pixel to learn from; a few maps are enough to notice."""
    from gppf_ds.data.folders import read_depth

    seen: list[float] = []
    for _, path in pairs[:_SAMPLED]:
        try:
            depth = read_depth(path, scale)
        except SampleError:  # the loader counts these
            continue
        if ((depth > min_depth) & (depth < max_depth)).any():
            return
        seen.append(float(depth.max()))
    folder = pairs[0][1].parent
    if not seen:
        raise UserError(
            f"The first {min(len(pairs), _SAMPLED)} depth maps in {folder} are no 16-bit PNG files: replace them."
        )
    raise UserError(
        f"The first depth maps in {folder} have no pixel between min_depth and max_depth, their largest depth is "
        f"{max(seen):g} m: correct depth_scale ({scale}), min_depth ({min_depth}) or max_depth ({max_depth})."
    )


def _read_image(path: Path) -> Tensor:
    """(3, H, W) bytes."""
    from torchvision.transforms.v2.functional import pil_to_tensor

    from gppf_ds.data.folders import read_rgb

    return pil_to_tensor(read_rgb(path))


def _size(pixels: Tensor) -> str:
    return f"{pixels.shape[-1]}x{pixels.shape[-2]}"
