"""Pixels of image files: orientation, transparency, and broken files, all of them at once."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from darht.cache.sources.load import Source, load_source
from darht.core.errors import DataError


def pixels(seed: int, height: int = 6, width: int = 6) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def write(path: Path, array: np.ndarray, orientation: int | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image, exif = Image.fromarray(array), Image.Exif()
    if orientation is not None:
        exif[0x0112] = orientation
    image.save(path, exif=exif)
    return path


def load(root: Path, **options) -> Source:
    return load_source("imagefolder", root, "train", **options)


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    """Two classes of five files; of each, three are broken in a way of their own."""
    for name in ("cat", "dog"):
        for number in range(3):
            write(tmp_path / "train" / name / f"{number}.png", pixels(number))
        (tmp_path / "train" / name / "1.png").write_bytes(b"")
        (tmp_path / "train" / name / "3.png").write_text("not an image")
        (tmp_path / "train" / name / "4.jpg").symlink_to("nowhere.jpg")
    return tmp_path


@pytest.mark.parametrize("orientation", range(1, 10))
@pytest.mark.parametrize("suffix", ["png", "jpg", "tif", "webp"])
def test_exif_orientation_is_applied(tmp_path: Path, suffix: str, orientation: int):
    path = write(tmp_path / f"train/cat/a.{suffix}", pixels(0, 6, 10), orientation)
    with Image.open(path) as image:
        image.load()
        expected = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    source = load(tmp_path)
    np.testing.assert_array_equal(source.images[0], expected.transpose(2, 0, 1))
    assert bool(source.notes) == (orientation in range(2, 9) and suffix != "tif")


def test_orientation_is_not_looked_at_under_rules_1(tmp_path: Path):
    write(tmp_path / "train/cat/a.png", pixels(0, 6, 10), 6)
    np.testing.assert_array_equal(load(tmp_path, rules=1).images[0], pixels(0, 6, 10).transpose(2, 0, 1))


def test_damaged_exif_costs_no_pixels(tmp_path: Path):
    path = tmp_path / "train/cat/a.jpg"
    path.parent.mkdir(parents=True)
    Image.fromarray(pixels(0)).save(path, exif=b"Exif\0\0MM\0*\xff\xff\xff\xff")
    assert load(tmp_path).images.shape == (1, 3, 6, 6)


def test_all_broken_files_are_named_at_once(broken: Path):
    with pytest.raises(DataError) as caught:
        load(broken)
    text = str(caught.value)
    assert "cannot decode 6 files" in text and "--skip-broken" in text and "\n" not in text
    for name in ("cat/1.png", "cat/3.png", "cat/4.jpg", "dog/1.png", "dog/3.png", "dog/4.jpg"):
        assert str(broken / "train" / name) in text
    assert "No such file" in text and "cannot identify image file" in text


def test_broken_files_are_left_out_on_demand_and_listed(broken: Path):
    source = load(broken, skip_broken=True)
    np.testing.assert_array_equal(source.images, np.stack([pixels(n) for n in (0, 2, 0, 2)]).transpose(0, 3, 1, 2))
    assert source.labels.tolist() == [0, 0, 1, 1]
    names = [f"train/{label}/{file}" for label in ("cat", "dog") for file in ("1.png", "3.png", "4.jpg")]
    assert list(source.skipped) == names
    assert any("6 files cannot be decoded and are left out" in note for note in source.notes)
    for name in names:
        (broken / name).unlink()
    assert load(broken).sha256 == source.sha256 and load(broken).skipped == ()


@pytest.mark.parametrize("limit", [3, 4])
def test_a_limit_counts_the_rows_that_are_read(broken: Path, limit: int):
    whole, part = load(broken, skip_broken=True), load(broken, skip_broken=True, limit=limit)
    np.testing.assert_array_equal(part.images, whole.images[:limit])
    assert part.labels.tolist() == whole.labels[:limit].tolist()


def test_a_limit_beyond_the_readable_files(broken: Path):
    with pytest.raises(DataError, match="5 > 4 rows"):
        load(broken, skip_broken=True, limit=5)


def test_a_class_or_a_split_without_a_readable_file(broken: Path):
    for number in (0, 2):
        (broken / f"train/dog/{number}.png").write_text("broken")
    with pytest.raises(DataError, match=r"class 1 \(dog\) has no images"):
        load(broken, skip_broken=True)
    shutil.rmtree(broken / "train/cat")
    with pytest.raises(DataError, match="holds no rows"):
        load(broken, skip_broken=True)


def test_files_of_another_size_are_counted_beside_broken_ones(broken: Path):
    write(broken / "train/dog/7.png", pixels(0, 4, 5))
    write(broken / "train/dog/8.png", pixels(0, 3, 3))
    with pytest.raises(DataError, match=r"cannot decode 6 files: .*7.png is 5x4 pixels.* another size: 2;"):
        load(broken)
    with pytest.raises(DataError, match="must have one size"):
        load(broken, skip_broken=True)


def test_only_image_files_are_skipped():
    with pytest.raises(DataError, match=r"only imagefolder, .*parquet have image files to skip; got 'digits'"):
        load_source("digits", None, "train", skip_broken=True)


def test_awkward_files_are_read_right_or_named_in_one_list(tmp_path: Path):
    """CMYK, a palette, a PNG that is called .jpg and a first frame are read; 16 bits and a cut file are named."""
    folder, image = tmp_path / "train/cat", Image.fromarray(pixels(0))
    folder.mkdir(parents=True)
    image.convert("CMYK").save(folder / "a-cmyk.jpg", quality=100, subsampling=0)
    image.quantize(16).save(folder / "b-palette.png")
    image.save(folder / "c-misnamed.jpg", "PNG")
    image.save(folder / "d-animated.webp", lossless=True, save_all=True, append_images=[Image.fromarray(pixels(1))])
    Image.fromarray(np.zeros((6, 6), dtype=np.uint16)).save(folder / "e-16bit.png")
    (folder / "f-cut.jpg").write_bytes((folder / "a-cmyk.jpg").read_bytes()[:-60])
    with pytest.raises(DataError) as caught:
        load(tmp_path)
    assert "cannot decode 2 files" in str(caught.value)
    assert "e-16bit.png (must have 8 bits a channel" in str(caught.value) and "f-cut.jpg (" in str(caught.value)
    source = load(tmp_path, skip_broken=True)
    assert [Path(name).name for name in source.skipped] == ["e-16bit.png", "f-cut.jpg"]
    expected = pixels(0).transpose(2, 0, 1).astype(int)
    assert np.abs(source.images[0] - expected).max() <= 16  # as the JPEG has it
    np.testing.assert_array_equal(source.images[1], np.asarray(image.quantize(16).convert("RGB")).transpose(2, 0, 1))
    for row in (2, 3):
        np.testing.assert_array_equal(source.images[row], expected)
    assert any("1 images are animated" in note for note in source.notes)
