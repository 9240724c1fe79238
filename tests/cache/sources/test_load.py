"""What holds for every source: arguments, digits, the checks of labels, the content hash."""

import dataclasses
import hashlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from darht.cache.sources.load import SOURCES, Source, content_sha256, load_source
from darht.core.errors import DataError


def save(path: Path, labels, classes=("cat", "dog"), side=4) -> Path:
    images = np.arange(len(labels) * 3 * side * side, dtype=np.uint8).reshape(-1, 3, side, side)
    np.savez(path, images=images, labels=np.array(labels), classes=np.array(classes))
    return path


def failure(*arguments, **options) -> str:
    with pytest.raises(DataError) as caught:
        load_source(*arguments, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_the_list_of_sources():
    assert SOURCES == ("digits", "cifar10", "cifar100", "tiny-imagenet", "imagefolder", "npz", "webdataset", "parquet")


def test_digits_are_scaled_grey_replicated_and_split_by_index():
    from sklearn.datasets import load_digits

    digits = load_digits()
    train, test = load_source("digits", None, "train"), load_source("digits", None, "test")
    assert train.images.shape == (1438, 3, 8, 8) and test.images.shape == (359, 3, 8, 8)
    assert train.images.dtype == np.uint8 and train.labels.dtype == np.int64
    assert train.images.flags.c_contiguous
    assert train.classes == tuple("0123456789")
    np.testing.assert_array_equal(test.labels, digits.target[4::5])
    np.testing.assert_array_equal(train.labels[:8], digits.target[[0, 1, 2, 3, 5, 6, 7, 8]])
    expected = np.round(digits.images[4] * 255 / 16)
    for channel in range(3):
        np.testing.assert_array_equal(test.images[0, channel], expected)
    assert (train.images.min(), train.images.max()) == (0, 255)


def test_the_hash_of_digits_is_pinned():
    assert (
        load_source("digits", None, "train").sha256
        == "47f2f8155f16190f2dcd6420ae48d7c4969b2073b3a4dcac955745d4b9d3d147"
    )
    assert (
        load_source("digits", None, "test", limit=100).sha256
        == "7f90ac700cf07082e406c1b5c8c5bd36ef75332d616976970a49303cd5fe51f0"
    )


def test_limit_takes_the_first_rows_and_hashes_only_them():
    whole, part = load_source("digits", None, "train"), load_source("digits", None, "train", limit=50)
    np.testing.assert_array_equal(part.images, whole.images[:50])
    np.testing.assert_array_equal(part.labels, whole.labels[:50])
    assert part.sha256 == content_sha256(whole.images[:50], whole.labels[:50], whole.classes) != whole.sha256
    assert load_source("digits", None, "train", limit=1438).sha256 == whole.sha256


@pytest.mark.parametrize("limit", [0, -3])
def test_a_limit_below_one(limit):
    assert f"got {limit}" in failure("digits", None, "train", limit=limit)


def test_a_limit_above_the_rows_gives_both_numbers():
    assert "1439 > 1438" in failure("digits", None, "train", limit=1439)


def test_a_limit_that_leaves_a_class_empty_says_so():
    message = failure("digits", None, "train", limit=9)
    assert (
        "class 4 (4), class 9 (9) have no images" in message and "first 9 rows" in message and "raise limit" in message
    )


def test_unknown_name_and_split():
    message = failure("mnist", None, "train")
    assert "'mnist'" in message and "tiny-imagenet" in message
    assert "got 'val'" in failure("digits", None, "val")


@pytest.mark.parametrize("name", SOURCES[1:])
def test_sources_of_files_need_a_root(name):
    assert f"source '{name}' reads files" in failure(name, None, "train")


def test_arguments_that_would_do_nothing_are_errors(tmp_path):
    assert "reads no folder" in failure("digits", tmp_path, "train")
    assert "only cifar10 and cifar100" in failure("imagefolder", tmp_path, "train", download=True)


@pytest.mark.parametrize(("name", "side"), [("cifar10", 32), ("cifar100", 32), ("tiny-imagenet", 64)])
def test_image_size_of_a_fixed_source_is_refused_before_reading(tmp_path, name, side):
    assert f"{name} is {side} pixels; got 48" in failure(name, tmp_path / "absent", "train", image_size=48)
    assert "not there" in failure(name, tmp_path / "absent", "train", image_size=side)


def test_image_size_must_equal_what_digits_and_npz_have(tmp_path):
    assert load_source("digits", None, "test", image_size=8).images.shape[2:] == (8, 8)
    assert "digits is 8 pixels; got 16" in failure("digits", None, "test", image_size=16)
    assert "at least 1 pixel; got 0" in failure("digits", None, "test", image_size=0)
    path = save(tmp_path / "train.npz", [0, 1])
    assert load_source("npz", path, "train", image_size=4).images.shape[2:] == (4, 4)
    assert "4x4 pixels; got 5" in failure("npz", path, "train", image_size=5)


def test_labels_out_of_range_name_the_row(tmp_path):
    message = failure("npz", save(tmp_path / "train.npz", [0, 1, 2, 1]), "train")
    assert "0..1" in message and "row 2 has 2" in message and str(tmp_path) in message


def test_classes_without_rows_are_all_named(tmp_path):
    path = save(tmp_path / "train.npz", [0, 2, 2], classes=("cat", "dog", "owl", "fox"))
    message = failure("npz", path, "train")
    assert "class 1 (dog), class 3 (fox) have no images" in message and "add images" in message
    path = save(tmp_path / "train.npz", [0, 2, 2], classes=("cat", "dog", "owl"))
    assert "class 1 (dog) has no images" in failure("npz", path, "train")


@pytest.mark.parametrize("classes", [("cat", "cat"), ("cat", "")])
def test_class_names_are_distinct_and_not_empty(tmp_path, classes):
    path = save(tmp_path / "train.npz", [0, 1], classes=classes)
    assert "distinct and not empty" in failure("npz", path, "train")


def test_a_source_is_frozen_and_compared_by_identity():
    source = load_source("digits", None, "test")
    with pytest.raises(dataclasses.FrozenInstanceError):
        source.name = "other"
    assert source == source and source != dataclasses.replace(source)
    assert isinstance(source, Source) and isinstance(hash(source), int)


def test_a_root_in_the_home_folder_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    save(tmp_path / "train.npz", [0, 1])
    assert load_source("npz", Path("~"), "train").labels.tolist() == [0, 1]


def test_the_hash_is_what_its_description_says():
    images, labels = np.arange(12, dtype=np.uint8).reshape(1, 3, 2, 2), np.array([0])
    header = b'{"classes":["\\u00fcber"],"shape":[1,3,2,2]}\n'
    expected = hashlib.sha256(header + bytes(range(12)) + bytes(8)).hexdigest()
    assert content_sha256(images, labels, ("\u00fcber",)) == expected


IMAGES = hnp.arrays(np.uint8, st.tuples(st.integers(1, 4), st.just(3), st.integers(1, 4), st.integers(1, 4)))


@settings(max_examples=60, deadline=None)
@given(images=IMAGES, data=st.data())
def test_the_hash_changes_with_any_pixel_label_or_name(images, data):
    labels, classes = np.zeros(len(images), dtype=np.int64), ("cat", "dog")
    before = content_sha256(images, labels, classes)
    pixel, row = data.draw(st.integers(0, images.size - 1)), data.draw(st.integers(0, len(images) - 1))
    other_images, other_labels = images.copy(), labels.copy()
    other_images.flat[pixel] ^= 1 << data.draw(st.integers(0, 7))
    other_labels[row] = 1
    hashes = {
        before,
        content_sha256(other_images, labels, classes),
        content_sha256(images, other_labels, classes),
        content_sha256(images, labels, ("cat", "dogs")),
        content_sha256(images, labels, ("dog", "cat")),
        content_sha256(images, labels, ("catdog",)),
    }
    assert len(hashes) == 6


@settings(max_examples=40, deadline=None)
@given(images=IMAGES)
def test_the_hash_ignores_memory_layout_but_not_shape(images):
    labels = np.zeros(len(images), dtype=np.int64)
    strided = np.asfortranarray(images)
    assert content_sha256(strided, labels, ("a",)) == content_sha256(images, labels, ("a",))
    assert content_sha256(images, labels.astype(">i8"), ("a",)) == content_sha256(images, labels, ("a",))
    flat = images.reshape(len(images), 3, 1, -1)
    if flat.shape != images.shape:
        assert content_sha256(flat, labels, ("a",)) != content_sha256(images, labels, ("a",))


def test_the_hash_does_not_depend_on_the_path_or_the_split(tmp_path):
    (tmp_path / "a").mkdir()
    paths = [save(tmp_path / "a" / "train.npz", [0, 1]), save(tmp_path / "test.npz", [0, 1])]
    sources = [load_source("npz", path, path.stem) for path in paths]
    assert sources[0].sha256 == sources[1].sha256


def test_loading_sources_imports_no_torch():
    load = "import sys; from darht.cache.sources.load import load_source; load_source('digits', None, 'test')"
    code = f"{load}; print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"
