"""Classification: files to metrics through the real transforms, head and loss."""

from __future__ import annotations

import pickle
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from timm.data import auto_augment

from gppf_ds.errors import SampleError, UserError
from gppf_ds.tasks.classification import Accuracy, Classification, ClassificationHead
from gppf_ds.tasks.posterize import posterize
from gppf_ds.tasks.task import FeatureInfo

CPU = torch.device("cpu")
CLOTHING = Path(__file__).parents[3] / "shared" / "data" / "classification" / "clothing"
CLASSES = ("blue", "green", "red")


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)
    seed(0)


def seed(number: int) -> None:
    random.seed(number)
    np.random.seed(number)
    torch.manual_seed(number)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Data that cannot be written are indexed there."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Four noisy 50x40 images of each class in each split; classes differ in colour."""
    noise = np.random.default_rng(0)
    for split in ("train", "val"):
        for channel, name in enumerate(reversed(CLASSES)):
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(4):
                pixels = noise.integers(0, 100, (40, 50, 3), dtype=np.uint8)
                pixels[..., channel] += 120
                Image.fromarray(pixels).save(tmp_path / split / name / f"{i}.jpg")
    return tmp_path


def make(folder: Path, **options: Any) -> Classification:
    return Classification(str(folder), **{"batch_size": 4, "image_size": 64, **options})


def load(task: Classification, indices: list[int], split: Any = "train") -> Any:
    dataset = task.dataset(split)
    return pickle.loads(pickle.dumps(task.collate([dataset[i] for i in indices])))


def test_batch_has_normalised_images_and_sorted_class_labels(folder: Path) -> None:
    task = make(folder)
    task.check()
    raw = load(task, [0, 4, 8, 11])
    assert raw["images"].dtype == torch.uint8
    batch = task.preprocess(raw, CPU, training=True)
    assert batch.images.shape == (4, 3, 64, 64)
    assert batch.targets.tolist() == [0, 1, 2, 2]
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    expected = (raw["images"][0, :, 5, 7] / 255 - mean) / std
    torch.testing.assert_close(batch.images[0, :, 5, 7], expected)


def test_validation_takes_the_centre_of_the_resized_image(folder: Path) -> None:
    ramp = np.zeros((80, 160, 3), np.uint8)
    ramp[:, :, 0] = np.linspace(0, 255, 160)
    Image.fromarray(ramp).save(folder / "val" / "blue" / "0.png")
    task = make(folder, val_crop=0.5)
    dataset: Any = task.dataset("val")
    image, _ = dataset[[path for path, _ in dataset.entries].index(folder / "val" / "blue" / "0.png")]
    # Short side 80 -> 128; the centre 64 of 256 columns is 3/8 to 5/8 of the ramp.
    assert image.shape == (3, 64, 64)
    assert float(image[0, 32, 0]) == pytest.approx(255 * 3 / 8, abs=4)
    assert float(image[0, 32, -1]) == pytest.approx(255 * 5 / 8, abs=4)


@pytest.mark.parametrize("option", [{"mixup": 0.8}, {"cutmix": 1.0}, {"mixup": 0.8, "cutmix": 1.0}])
def test_mixing_gives_probabilities_and_only_in_training(folder: Path, option: dict[str, float]) -> None:
    task = make(folder, classes=7, **option)
    raw = load(task, [0, 3, 5, 11])
    mixed = task.preprocess(raw, CPU, training=True)
    assert mixed.targets.shape == (4, 7)
    torch.testing.assert_close(mixed.targets.sum(dim=1), torch.ones(4))
    # The first image (class 0) is mixed with the last (class 2) in the share that its target names.
    share = float(mixed.targets[0, 0])
    assert 0 < share < 1
    assert float(mixed.targets[0, 2]) == pytest.approx(1 - share)
    plain = task.preprocess(raw, CPU, training=False)
    assert plain.targets.tolist() == [0, 0, 1, 2]
    if option == {"mixup": 0.8}:
        torch.testing.assert_close(mixed.images[0], share * plain.images[0] + (1 - share) * plain.images[3])


def test_random_erasing_replaces_a_rectangle_only_in_training(folder: Path) -> None:
    task = make(folder, random_erasing=1.0)
    raw = load(task, [0, 1])
    plain = task.preprocess(raw, CPU, training=False).images
    changed = (task.preprocess(raw, CPU, training=True).images != plain).any(dim=1)
    for mask in changed:
        rows, columns = mask.any(dim=1).sum(), mask.any(dim=0).sum()
        assert 0.02 * 64 * 64 * 0.8 < int(mask.sum()) == int(rows * columns)


def test_everything_on_is_a_function_of_the_seeds(folder: Path) -> None:
    task = make(folder, mixup=0.8, cutmix=1.0, random_erasing=0.5, rand_augment="rand-m9-mstd0.5-inc1")

    def run(number: int) -> torch.Tensor:
        seed(number)
        return task.preprocess(load(task, [0, 1, 2, 3]), CPU, training=True).images

    assert torch.equal(run(1), run(1))
    assert not torch.equal(run(1), run(2))


@pytest.mark.parametrize("policy", ["rand-m10-inc1", "rand-m10", "original", "augmix-m10"])
def test_the_highest_levels_of_every_policy_are_no_error(folder: Path, policy: str) -> None:
    """Pillow 13 refuses to posterize to 0 bits, which timm draws one image in some hundreds at rand-m9-mstd0.5-inc1."""
    transform = make(folder, rand_augment=policy)._transform("train")
    image = Image.effect_noise((64, 64), 90).convert("RGB")
    seed(0)
    for _ in range(100):
        assert transform(image).shape == (3, 64, 64)


def test_posterize_keeps_bits_as_timm_does_and_none_is_black() -> None:
    image = Image.effect_noise((32, 32), 90).convert("RGB")
    assert posterize(image, 3).tobytes() == auto_augment.posterize(image, 3).tobytes()
    assert not np.asarray(posterize(image, 0)).any()


def test_smoothed_soft_targets_match_the_textbook_loss() -> None:
    head = ClassificationHead(6, 4, label_smoothing=0.1)
    features = [torch.randn(2, 3, 8, 8), torch.randn(2, 6, 2, 3)]
    targets = torch.tensor([[0.7, 0.3, 0, 0], [0, 0, 0, 1.0]])
    logits = (
        features[-1].numpy().mean((2, 3)) @ head.linear.weight.detach().numpy().T + head.linear.bias.detach().numpy()
    )
    log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    expected = -((0.9 * targets.numpy() + 0.1 / 4) * log_p).sum(1).mean()
    assert float(head.loss(features, targets)["cross_entropy"].detach()) == pytest.approx(float(expected), abs=1e-5)


def test_accuracy_matches_torchmetrics_and_merging_equals_one_pass() -> None:
    from torchmetrics.classification import MulticlassAccuracy

    logits, labels = torch.randn(200, 8), torch.randint(0, 7, (200,))  # class 7 has no image
    ranked = list(logits.topk(5).indices)
    whole, parts = Accuracy(8), [Accuracy(8), Accuracy(8), Accuracy(8)]
    whole.update(ranked, labels)
    for part, chosen in zip(parts, (slice(0, 1), slice(1, 120), slice(120, 200)), strict=True):
        part.update(ranked[chosen], labels[chosen])
    merged = Accuracy(8)
    merged.merge([pickle.loads(pickle.dumps(part.state())) for part in parts])
    assert merged.compute() == whole.compute()

    top1 = MulticlassAccuracy(num_classes=8, average="micro")(logits, labels)
    top5 = MulticlassAccuracy(num_classes=8, average="micro", top_k=5)(logits, labels)
    hit = (logits.argmax(1) == labels).numpy()
    mean_class = np.mean([hit[labels.numpy() == c].mean() for c in range(7)])
    expected = {"top1": float(top1), "top5": float(top5), "mean_class": float(mean_class)}
    assert whole.compute() == pytest.approx(expected, abs=1e-6)


def test_fewer_than_five_classes(folder: Path) -> None:
    task = make(folder)
    head, metric = task.build_head(FeatureInfo((4,), (32,))), task.metric()
    targets = torch.tensor([0, 1, 2, 1])
    metric.update(head.predict([torch.randn(4, 4, 2, 2)], targets), targets)
    assert metric.compute()["top5"] == 1.0


def test_overfits_a_few_images(folder: Path) -> None:
    task = make(folder, batch_size=12, crop_scale=(0.8, 1.0))
    batch = task.preprocess(load(task, list(range(12))), CPU, training=True)
    backbone = torch.nn.Conv2d(3, 16, 8, stride=8)
    head = task.build_head(FeatureInfo((3, 16), (1, 8)))
    optimizer = torch.optim.Adam([*backbone.parameters(), *head.parameters()], lr=0.01)
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        loss = head.loss([batch.images, backbone(batch.images)], batch.targets)["cross_entropy"]
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in [*head.parameters(), *backbone.parameters()])

    metric = task.metric()
    unseen = task.preprocess(load(task, list(range(12)), "val"), CPU, training=False)
    with torch.no_grad():
        metric.update(head.predict([unseen.images, backbone(unseen.images)], unseen.targets), unseen.targets)
    assert metric.compute()["top1"] == 1.0


@pytest.mark.parametrize("damage", ["truncated", "not an image"])
def test_unreadable_image_is_a_sample_error_that_names_the_file(folder: Path, damage: str) -> None:
    path = folder / "train" / "blue" / "0.jpg"
    path.write_bytes(path.read_bytes()[:300] if damage == "truncated" else b"no image")
    with pytest.raises(SampleError, match=str(path)):
        make(folder).dataset("train")[0]


def test_check_names_what_is_wrong(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    with pytest.raises(UserError, match="train cannot be listed"):
        make(folder / "nowhere").check()
    with pytest.raises(UserError, match=r"classes is 2, but .* has 3: raise classes"):
        make(folder, classes=2).check()
    with pytest.raises(UserError, match="rand_augment 'bogus'"):
        make(folder, rand_augment="bogus").check()

    extra = folder / "val" / "yellow"
    extra.mkdir()
    with pytest.raises(UserError, match=r"the first is 'yellow' \(in val\)"):
        make(folder).check()
    extra.rmdir()
    for path in (folder / "val").rglob("*.jpg"):
        path.unlink()
    with pytest.raises(UserError, match="val has no image"):
        make(folder).check()
    empty = tmp_path_factory.mktemp("empty")
    (empty / "train").mkdir()
    with pytest.raises(UserError, match="train has no class folders"):
        make(empty).check()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"batch_size": 3, "mixup": 0.2}, "batch_size even, not 3"),
        ({"flip": 2.0}, "flip must lie in"),
        ({"crop_scale": (0.5, 0.1)}, "crop_scale"),
        ({"val_crop": 0.0}, "val_crop"),
        ({"image_size": 8}, "image_size"),
    ],
)
def test_bad_arguments(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        make(Path("unused"), **options)


def test_constructor_reads_nothing_and_an_empty_class_folder_is_no_error(folder: Path) -> None:
    make(Path("/nonexistent"))
    for path in (folder / "val" / "red").iterdir():
        path.unlink()
    task = make(folder)
    task.check()
    assert len(task.dataset("val")) == 8


def test_clothing_loads_through_the_same_code() -> None:
    if not CLOTHING.is_dir():
        pytest.skip(f"{CLOTHING} is absent")
    task = make(CLOTHING, mixup=0.8, label_smoothing=0.1)
    task.check()
    assert len(task.dataset("train")) == 500
    assert len(task.dataset("val")) == 186
    batch = task.preprocess(load(task, [0, 100, 200, 499]), CPU, training=True)
    head = task.build_head(FeatureInfo((3,), (2,)))
    loss = head.loss([F.avg_pool2d(batch.images, 2)], batch.targets)["cross_entropy"]
    assert loss.item() == pytest.approx(np.log(10), abs=0.7)
