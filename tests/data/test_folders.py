import numpy as np
import pytest
from PIL import Image

from gppf_ds.data.folders import pair_by_stem, read_depth, read_label_map, read_rgb
from gppf_ds.errors import SampleError, UserError


@pytest.fixture
def folders(tmp_path):
    images, targets = tmp_path / "images", tmp_path / "targets"
    images.mkdir()
    targets.mkdir()
    for name in ("b.jpg", "a.PNG", "c.v2.jpeg", "notes.txt", ".hidden.jpg"):
        (images / name).touch()
    for name in ("a_label.png", "b_label.png", "c.v2_label.png", "z_label.png"):
        (targets / name).touch()
    return images, targets


def test_pairs_are_sorted(folders):
    images, targets = folders
    assert pair_by_stem(images, targets, "_label.png") == [
        (images / "a.PNG", targets / "a_label.png"),
        (images / "b.jpg", targets / "b_label.png"),
        (images / "c.v2.jpeg", targets / "c.v2_label.png"),
    ]


def test_missing_partner_is_named(folders):
    images, targets = folders
    (targets / "b_label.png").unlink()
    with pytest.raises(UserError, match=r"1 of the 3 images .* first is b\.jpg \(no b_label\.png\)"):
        pair_by_stem(images, targets, "_label.png")
    with pytest.raises(UserError, match="3 of the 3"):
        pair_by_stem(images, targets, ".png")


def test_missing_and_empty_folders(folders, tmp_path):
    images, targets = folders
    empty = tmp_path / "empty"
    empty.mkdir()
    for arguments, message in (
        ((tmp_path / "gone", targets), "gone cannot be listed"),
        ((images, tmp_path / "gone"), "gone cannot be listed"),
        ((images / "b.jpg", targets), "b.jpg cannot be listed"),
        ((empty, targets), "empty has no image files"),
        ((images, empty), "empty is empty"),
    ):
        with pytest.raises(UserError, match=message):
            pair_by_stem(*arguments, "_label.png")


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA", "LA", "CMYK", "1"])
def test_read_rgb_takes_every_8_bit_mode(tmp_path, mode):
    path = tmp_path / f"x.{'tif' if mode == 'CMYK' else 'png'}"
    Image.new("RGB", (9, 5), "white").convert(mode).save(path)
    image = read_rgb(path)
    path.unlink()  # nothing is read later
    assert image.mode == "RGB"
    assert image.size == (9, 5)
    assert image.getpixel((8, 4)) == (255, 255, 255)
    assert image.resize((3, 2)).getpixel((2, 1)) == (255, 255, 255)


def test_read_label_map(tmp_path):
    labels = np.arange(35, dtype=np.uint8).reshape(5, 7)
    labels[0, 0] = 255
    image = Image.fromarray(labels)
    image.save(tmp_path / "l.png")
    palette = image.copy()
    palette.putpalette([255 - v for v in range(256) for _ in range(3)])
    palette.save(tmp_path / "p.png")
    assert Image.open(tmp_path / "p.png").mode == "P"
    for name in ("l.png", "p.png"):
        read = read_label_map(tmp_path / name)
        assert read.dtype == np.uint8
        np.testing.assert_array_equal(read, labels)
        read[0, 0] = 0  # writable, for augmentation in place


def test_read_depth(tmp_path):
    stored = np.array([[0, 1, 1500], [65535, 256, 3]], dtype=np.uint16)
    Image.fromarray(stored).save(tmp_path / "d.png")
    depth = read_depth(tmp_path / "d.png", 0.001)
    assert depth.dtype == np.float32
    np.testing.assert_allclose(depth, [[0, 0.001, 1.5], [65.535, 0.256, 0.003]], rtol=1e-6)
    Image.fromarray(stored.astype(np.int32)).save(tmp_path / "d.tif")
    np.testing.assert_array_equal(read_depth(tmp_path / "d.tif", 0.001), depth)
    Image.fromarray(np.full((2, 2), -1, dtype=np.int32)).save(tmp_path / "minus.tif")
    with pytest.raises(SampleError, match="negative"):
        read_depth(tmp_path / "minus.tif", 0.001)


def test_wrong_modes(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "rgb.png")
    Image.new("L", (4, 4)).save(tmp_path / "l.png")
    Image.fromarray(np.zeros((4, 4), np.uint16)).save(tmp_path / "d.png")
    for read, name in (
        (read_label_map, "rgb.png"),
        (read_label_map, "d.png"),
        (lambda path: read_depth(path, 1.0), "l.png"),
        (lambda path: read_depth(path, 1.0), "rgb.png"),
        (read_rgb, "d.png"),
    ):
        with pytest.raises(SampleError, match=name):
            read(tmp_path / name)


READERS = [(read_rgb, "RGB", "jpg"), (read_rgb, "RGB", "png"), (read_label_map, "L", "png")]


@pytest.mark.parametrize(("read", "mode", "suffix"), READERS)
def test_broken_files(tmp_path, read, mode, suffix):
    path = tmp_path / f"x.{suffix}"
    pixels = np.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(path)
    whole = path.read_bytes()
    read(path)
    for size in (0, 10, 40, len(whole) // 2, len(whole) - len(whole) // 10):
        path.write_bytes(whole[:size])
        with pytest.raises(SampleError, match=path.name):
            read(path)
    path.write_text("404: not found")
    with pytest.raises(SampleError, match=path.name):
        read(path)
    with pytest.raises(SampleError, match="gone"):
        read(tmp_path / "gone.jpg")


def test_huge_image_is_a_sample_error(tmp_path, monkeypatch):
    Image.new("L", (64, 64)).save(tmp_path / "x.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(SampleError, match=r"x\.png"):
        read_rgb(tmp_path / "x.png")
