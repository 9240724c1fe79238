"""Image folders and Tiny ImageNet: small folders of image files, and the real validation set where it is at hand."""

import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from darht.cache.sources.load import load_source
from darht.core.errors import DataError

WNIDS = ["n03", "n01", "n02"]
TINY = "tiny-imagenet-200"


def pixels(seed: int, height: int = 6, width: int = 8, channels: int = 3) -> np.ndarray:
    shape = (height, width, channels) if channels > 1 else (height, width)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def write(path: Path, array: np.ndarray, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **options)
    return path


def failure(name, root, split="train", **options) -> str:
    with pytest.raises(DataError) as caught:
        load_source(name, root, split, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def folder(tmp_path) -> Path:
    """Two classes, three training and two test images, written so that no listing is sorted by chance."""
    for seed, file in enumerate(
        ["train/dog/b.png", "train/cat/2.bmp", "train/cat/10.png", "val/dog/x.png", "val/cat/y.PNG"]
    ):
        write(tmp_path / file, pixels(seed))
    return tmp_path


def test_rows_are_sorted_by_class_and_file_name(folder):
    source = load_source("imagefolder", folder, "train")
    expected = np.stack([pixels(seed) for seed in (2, 1, 0)]).transpose(0, 3, 1, 2)
    np.testing.assert_array_equal(source.images, expected)
    assert source.labels.tolist() == [0, 0, 1] and source.classes == ("cat", "dog")
    assert source.labels.dtype == np.int64 and source.images.flags.c_contiguous


def test_the_test_split_is_test_or_else_val(folder):
    source = load_source("imagefolder", folder, "test")
    np.testing.assert_array_equal(source.images[0], pixels(4).transpose(2, 0, 1))
    for seed, file in enumerate(["test/dog/a.png", "test/cat/a.png"], 7):
        write(folder / file, pixels(seed))
    np.testing.assert_array_equal(load_source("imagefolder", folder, "test").images[1], pixels(7).transpose(2, 0, 1))


def test_other_files_are_not_read(folder):
    before = load_source("imagefolder", folder, "train").sha256
    for file in ("train/cat/notes.txt", "train/.hidden/a.png", "train/cat/._10.png", "train/list.csv", "readme.md"):
        (folder / file).parent.mkdir(exist_ok=True)
        (folder / file).write_text("text")
    (folder / "train/cat/deeper.png").mkdir()
    assert load_source("imagefolder", folder, "train").sha256 == before


def test_the_hash_follows_the_pixels_and_not_the_encoding(tmp_path):
    for suffix, options in ((".png", {}), (".bmp", {}), (".webp", {"lossless": True})):
        write(tmp_path / suffix[1:] / "train" / "cat" / f"any{suffix}", pixels(0), **options)
    hashes = {load_source("imagefolder", tmp_path / kind, "train").sha256 for kind in ("png", "bmp", "webp")}
    assert len(hashes) == 1


def test_jpeg_is_what_pillow_decodes(tmp_path):
    path = write(tmp_path / "train" / "cat" / "a.jpeg", pixels(0))
    expected = np.asarray(Image.open(path)).transpose(2, 0, 1)
    np.testing.assert_array_equal(load_source("imagefolder", tmp_path, "train").images[0], expected)


def test_grey_palette_and_transparent_images_become_rgb(tmp_path):
    grey, colour = pixels(0, channels=1), pixels(1)
    write(tmp_path / "train/cat/1.png", grey)
    alpha = pixels(2, channels=1)
    write(tmp_path / "train/cat/2.png", np.dstack([colour, alpha]))
    palette = Image.fromarray(np.zeros((6, 8), np.uint8), mode=None).convert("P")
    palette.putpalette([10, 20, 30] * 256)
    with warnings.catch_warnings():
        palette.save(tmp_path / "train/cat/3.png", transparency=bytes([0, 255]))
    source = load_source("imagefolder", tmp_path, "train")
    np.testing.assert_array_equal(source.images[0], np.stack([grey] * 3))
    on_black = np.round(colour * (alpha[..., None] / 255.0)).transpose(2, 0, 1)
    assert np.abs(source.images[1] - on_black).max() <= 1 and (source.images[2] == 0).all()
    assert source.notes == (f"{tmp_path}/train: 2 images have transparent pixels and were laid on black",)
    images = load_source("imagefolder", tmp_path, "train", rules=1).images
    np.testing.assert_array_equal(images[1], colour.transpose(2, 0, 1))
    assert (images[2] == np.array([10, 20, 30]).reshape(3, 1, 1)).all()


def test_sixteen_bits_are_refused(tmp_path):
    path = write(tmp_path / "train/cat/deep.png", np.full((6, 8), 60000, np.uint16))
    message = failure("imagefolder", tmp_path)
    assert str(path) in message and "8 bits" in message and "I;16" in message


def test_many_images_keep_their_order(tmp_path):
    for i in range(600):
        write(tmp_path / f"train/cat/{i:03d}.bmp", np.full((2, 2, 3), i % 256, np.uint8))
    images = load_source("imagefolder", tmp_path, "train").images
    np.testing.assert_array_equal(images[:, 0, 0, 0], np.arange(600) % 256)


def test_missing_folders_are_named(tmp_path):
    message = failure("imagefolder", tmp_path / "absent")
    assert str(tmp_path / "absent" / "train") in message and "CLASS folders" in message
    write(tmp_path / "train/cat/a.png", pixels(0))
    message = failure("imagefolder", tmp_path, "test")
    assert f"{tmp_path / 'test'} or {tmp_path / 'val'}" in message


def test_a_split_without_classes(tmp_path):
    (tmp_path / "train").mkdir()
    assert "one folder for each class; it holds none" in failure("imagefolder", tmp_path)


def test_splits_with_other_classes_list_the_difference(folder):
    (folder / "val/owl").mkdir()
    (folder / "val/dog").rename(folder / "val/fox")
    message = failure("imagefolder", folder, "test")
    assert "dog, fox, owl" in message and "cat" not in message.replace(str(folder), "")


def test_every_empty_class_folder_is_named(folder):
    (folder / "train/owl").mkdir()
    (folder / "train/fox").mkdir()
    message = failure("imagefolder", folder)
    assert str(folder / "train/owl") in message and str(folder / "train/fox") in message and ".webp" in message


def test_images_of_two_sizes_name_the_first_that_differs(folder):
    path = write(folder / "train/dog/c.png", pixels(0, height=9, width=5))
    write(folder / "train/dog/d.png", pixels(0, height=1, width=1))
    message = failure("imagefolder", folder)
    assert f"{path} is 5x9 pixels" in message and f"{folder / 'train/cat/10.png'} is 8x6" in message
    assert "`image_size: 6`" in message


def test_the_first_differing_file_is_named_whatever_thread_meets_it(tmp_path):
    for i in range(900):
        side = 3 if i in (300, 899) else 2
        write(tmp_path / f"train/cat/{i:03d}.bmp", np.zeros((side, side, 3), np.uint8))
    assert "300.bmp is 3x3 pixels" in failure("imagefolder", tmp_path)


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".bmp"])
@pytest.mark.parametrize("keep", [0.0, 0.02, 0.6])
def test_a_cut_image_is_named(folder, suffix, keep):
    path = write(folder / f"train/dog/cut{suffix}", pixels(0, 60, 80))
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content))])
    message = failure("imagefolder", folder, image_size=6)
    assert f"cannot decode {path}" in message and "replace or remove" in message


@pytest.mark.parametrize(("height", "width"), [(6, 8), (8, 6), (11, 7), (5, 5), (3, 2), (4, 40)])
def test_image_size_resizes_and_cuts_as_torchvision_does(tmp_path, height, width):
    from darht.core.vision import torchvision

    transforms = torchvision().transforms
    path = write(tmp_path / "train/cat/a.png", pixels(0, height, width))
    bicubic = transforms.InterpolationMode.BICUBIC
    expected = transforms.CenterCrop(5)(transforms.Resize(5, bicubic)(Image.open(path)))
    source = load_source("imagefolder", tmp_path, "train", image_size=5)
    np.testing.assert_array_equal(source.images[0], np.asarray(expected).transpose(2, 0, 1))


def test_image_size_brings_all_to_one_size(folder):
    write(folder / "train/dog/c.png", pixels(0, height=9, width=5))
    assert load_source("imagefolder", folder, "train", image_size=4).images.shape == (4, 3, 4, 4)


def test_limit_decodes_only_its_rows(folder):
    (folder / "train/dog/zzz.png").write_text("not an image")
    assert load_source("imagefolder", folder, "train", limit=3).labels.tolist() == [0, 0, 1]
    message = failure("imagefolder", folder, limit=2)
    assert "class 1 (dog) has no images" in message and "raise limit (first 2 rows)" in message
    assert "5 > 4 rows" in failure("imagefolder", folder, limit=5)


@pytest.fixture
def tiny(tmp_path) -> Path:
    """Three classes, two training images each, and four validation images; the second training image of n01 is grey."""
    base = tmp_path / TINY
    for label, wnid in enumerate(WNIDS):
        for number in (0, 1):
            array = pixels(10 * label + number, 64, 64, channels=1 if (wnid, number) == ("n01", 1) else 3)
            write(base / "train" / wnid / "images" / f"{wnid}_{number}.JPEG", array)
    for number in range(4):
        write(base / "val" / "images" / f"val_{number}.JPEG", pixels(100 + number, 64, 64))
    rows = [(2, "n02"), (0, "n01"), (3, "n03"), (1, "n01")]
    table = "".join(f"val_{number}.JPEG\t{wnid}\t0\t0\t63\t63\n" for number, wnid in rows)
    (base / "val" / "val_annotations.txt").write_text(table)
    (base / "wnids.txt").write_text("\n".join(WNIDS))
    (base / "words.txt").write_text("n00\tentity\nn01\tgoldfish, Carassius auratus\nn03\tlemon\n")
    return tmp_path


def decoded(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB")).transpose(2, 0, 1)


def test_tiny_train_is_numbered_by_wnids(tiny):
    source = load_source("tiny-imagenet", tiny, "train")
    assert source.images.shape == (6, 3, 64, 64) and source.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert source.classes == ("lemon", "goldfish", "n02")
    np.testing.assert_array_equal(source.images[2], decoded(tiny / TINY / "train/n01/images/n01_0.JPEG"))
    assert (source.images[3, 0] == source.images[3, 1]).all() and (source.images[3, 0] == source.images[3, 2]).all()


def test_tiny_test_is_the_validation_set_in_the_order_of_its_table(tiny):
    source = load_source("tiny-imagenet", tiny, "test")
    assert source.labels.tolist() == [2, 1, 0, 1]
    np.testing.assert_array_equal(source.images[0], decoded(tiny / TINY / "val/images/val_2.JPEG"))
    assert load_source("tiny-imagenet", tiny / TINY, "test").sha256 == source.sha256


def test_tiny_without_words_uses_the_identifiers(tiny):
    (tiny / TINY / "words.txt").unlink()
    assert load_source("tiny-imagenet", tiny, "test").classes == tuple(WNIDS)


def test_tiny_limit(tiny):
    assert load_source("tiny-imagenet", tiny, "test", limit=3).labels.tolist() == [2, 1, 0]
    assert "7 > 6 rows" in failure("tiny-imagenet", tiny, limit=7)
    assert "class 2 (n02) has no images" in failure("tiny-imagenet", tiny, limit=4)


def test_tiny_missing(tmp_path):
    message = failure("tiny-imagenet", tmp_path)
    assert "wnids.txt" in message and "tiny-imagenet-200.zip" in message


def edit(path: Path, change) -> None:
    path.write_text(change(path.read_text()))


@pytest.mark.parametrize(
    ("change", "split", "expected"),
    [
        (lambda base: edit(base / "wnids.txt", lambda text: text + "\nn01\n"), "train", "1 are repeated"),
        (lambda base: edit(base / "wnids.txt", lambda text: text[:-4]), "train", "differ in n02"),
        (lambda base: edit(base / "wnids.txt", lambda text: text + "\nn09"), "train", "differ in n09"),
        (lambda base: edit(base / "wnids.txt", lambda text: text[:-4]), "test", "lines 1 must give"),
        (lambda base: (base / "wnids.txt").write_bytes(b"\xff\xfe\x00"), "test", "as text"),
        (lambda base: (base / "train").rename(base / "gone"), "train", "0 folders and 3 lines"),
        (lambda base: (base / "train/n01/images").rename(base / "gone"), "train", "none for n01"),
        (lambda base: (base / "val/val_annotations.txt").unlink(), "test", "val_annotations.txt"),
        (lambda base: edit(base / "val/val_annotations.txt", lambda text: text[:50]), "test", "must list every file"),
        (lambda base: edit(base / "val/val_annotations.txt", lambda text: text + text), "test", "repeated lines"),
        (lambda base: edit(base / "val/val_annotations.txt", lambda text: text + "val_9.JPEG"), "test", "lines 5 must"),
        (lambda base: (base / "val/images/val_3.JPEG").unlink(), "test", "differ in val_3.JPEG"),
        (lambda base: (base / "val/images").rename(base / "gone"), "test", "4 lines and 0 files"),
        (lambda base: write(base / "val/images/val_1.JPEG", pixels(0, 64, 63)), "test", "val_1.JPEG is 63x64"),
        (lambda base: (base / "val/images/val_1.JPEG").write_bytes(b"\xff\xd8\xff"), "test", "cannot decode"),
    ],
)
def test_tiny_faults(tiny, change, split, expected):
    change(tiny / TINY)
    message = failure("tiny-imagenet", tiny, split)
    assert expected in message and str(tiny / TINY) in message


def test_tiny_images_of_another_size(tiny):
    for number in range(4):
        write(tiny / TINY / f"val/images/val_{number}.JPEG", pixels(number, 32, 32))
    assert "val_2.JPEG must be 64x64 pixels; it is 32x32" in failure("tiny-imagenet", tiny, "test")


@pytest.mark.real_data
def test_the_real_validation_set(tiny_imagenet_root):
    source = load_source("tiny-imagenet", tiny_imagenet_root, "test")
    assert source.images.shape == (10000, 3, 64, 64)
    assert np.bincount(source.labels).tolist() == [50] * 200
    base = tiny_imagenet_root / TINY
    wnids = (base / "wnids.txt").read_text().split()
    name, wnid = (base / "val" / "val_annotations.txt").read_text().splitlines()[0].split("\t")[:2]
    assert source.labels[0] == wnids.index(wnid)
    np.testing.assert_array_equal(source.images[0], decoded(base / "val" / "images" / name))
    assert "Egyptian cat" in source.classes and "rocking chair" in source.classes
