"""Numpy archives: every layout gives the same pixels, and everything else is refused with the fix."""

import io
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from darht.cache.sources.load import load_source
from darht.cache.sources.npz_member import ImageMember, open_images
from darht.core.errors import DataError

LABELS = np.array([0, 1, 2, 1])
IMAGES = np.random.default_rng(0).integers(0, 256, (4, 5, 6), dtype=np.uint8)


def save(path: Path, **arrays) -> Path:
    np.savez(path, **{"images": IMAGES, "labels": LABELS, **arrays})
    return path


def failure(root, split="train", **options) -> str:
    with pytest.raises(DataError) as caught:
        load_source("npz", root, split, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_folder_holds_both_splits(tmp_path):
    save(tmp_path / "train.npz", classes=np.array(["cat", "dog", "owl"]))
    save(tmp_path / "test.npz", images=255 - IMAGES)
    train, test = load_source("npz", tmp_path, "train"), load_source("npz", tmp_path, "test")
    np.testing.assert_array_equal(train.images, np.stack([IMAGES] * 3, axis=1))
    np.testing.assert_array_equal(test.images, 255 - train.images)
    assert train.classes == ("cat", "dog", "owl") and test.classes == ("0", "1", "2")
    assert train.labels.tolist() == LABELS.tolist() and train.labels.dtype == np.int64


@pytest.mark.parametrize(("file", "held", "other"), [("mine.npz", "train", "test"), ("test.npz", "test", "train")])
def test_a_single_file_holds_the_split_its_name_says(tmp_path, file, held, other):
    path = save(tmp_path / file)
    assert len(load_source("npz", path, held).labels) == 4
    message = failure(path, other)
    assert f"is the {held} split" in message and f"'{other}' was asked for" in message and "folder" in message


def test_a_folder_may_be_called_like_a_file(tmp_path):
    (tmp_path / "set.npz").mkdir()
    save(tmp_path / "set.npz" / "test.npz")
    assert len(load_source("npz", tmp_path / "set.npz", "test").labels) == 4


@pytest.mark.parametrize("root", [".", "absent", "absent.npz"])
def test_a_missing_file_is_named(tmp_path, root):
    expected = tmp_path / root if root.endswith(".npz") else tmp_path / root / "train.npz"
    message = failure(tmp_path / root)
    assert f"npz needs the file {expected}" in message and "numpy.savez" in message


def load_bytes(folder: Path, name: str, images, labels) -> object:
    np.savez(folder / name, images=images, labels=labels)
    return load_source("npz", folder / name, "train")


SIDES = st.integers(1, 6).filter(lambda side: side != 3)
COLOUR = st.tuples(st.integers(1, 4), st.just(3), SIDES, SIDES)


@settings(max_examples=30, deadline=None)
@given(images=COLOUR.flatmap(lambda shape: hnp.arrays(np.uint8, shape)))
def test_channels_first_and_last_are_the_same_source(tmp_path_factory, images):
    folder, labels = tmp_path_factory.mktemp("layouts"), np.zeros(len(images), dtype=np.int8)
    first = load_bytes(folder, "first.npz", images, labels)
    last = load_bytes(folder, "last.npz", images.transpose(0, 2, 3, 1), labels.astype(np.uint64))
    np.testing.assert_array_equal(first.images, images)
    np.testing.assert_array_equal(last.images, images)
    assert first.sha256 == last.sha256
    assert last.images.flags.c_contiguous


@settings(max_examples=30, deadline=None)
@given(images=hnp.arrays(np.uint8, st.tuples(st.integers(1, 4), SIDES, SIDES)))
def test_grey_is_the_same_source_in_every_layout(tmp_path_factory, images):
    folder, labels = tmp_path_factory.mktemp("layouts"), np.zeros(len(images), dtype=np.int64)
    stacks = (images, np.stack([images] * 3, axis=1), np.stack([images] * 3, axis=3))
    hashes = {load_bytes(folder, f"{i}.npz", stack, labels).sha256 for i, stack in enumerate(stacks)}
    assert len(hashes) == 1


def test_compression_does_not_change_the_hash(tmp_path):
    plain = load_source("npz", save(tmp_path / "plain.npz"), "train")
    np.savez_compressed(tmp_path / "small.npz", images=IMAGES, labels=LABELS)
    assert load_source("npz", tmp_path / "small.npz", "train").sha256 == plain.sha256


@settings(max_examples=30, deadline=None)
@given(rows=st.lists(st.integers(0, 59), max_size=12))
def test_rows_far_apart_are_read_without_those_between(tmp_path_factory, rows):
    path = tmp_path_factory.mktemp("member") / "some.npz"
    images = np.arange(60 * 6, dtype=np.uint8).reshape(60, 2, 3)
    np.savez_compressed(path, images=images)
    member, held, take = open_images(path, "images"), [], ImageMember._take
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ImageMember, "_take", lambda self, file, n: held.append(n) or take(self, file, n))
        np.testing.assert_array_equal(member.read(np.array(rows, dtype=np.int64)), images[rows])
    assert sum(held) == len(set(rows))


def test_limit(tmp_path):
    path = save(tmp_path / "train.npz")
    assert load_source("npz", path, "train", limit=3).labels.tolist() == [0, 1, 2]
    assert "5 > 4 rows" in failure(path, limit=5)
    message = failure(path, limit=2)
    assert "class 2 (2) has no images" in message and "raise limit" in message


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_float_images_say_how_to_save_them(tmp_path, dtype):
    message = failure(save(tmp_path / "train.npz", images=(IMAGES / 255).astype(dtype)))
    assert f"got {np.dtype(dtype).name}" in message and "multiply by 255, round, and save as uint8" in message


def test_other_image_types(tmp_path):
    assert "must be uint8; got int64" in failure(save(tmp_path / "train.npz", images=IMAGES.astype(np.int64)))


@pytest.mark.parametrize(
    "shape", [(20,), (4, 5), (4, 5, 6, 1), (4, 1, 5, 6), (4, 5, 6, 4), (4, 3, 5, 3), (4, 3, 5, 6, 1)]
)
def test_image_shapes_that_are_no_layout(tmp_path, shape):
    message = failure(save(tmp_path / "train.npz", images=np.zeros(shape, np.uint8)))
    assert f"got {list(shape)}" in message and "[N, 3, H, W]" in message


@pytest.mark.parametrize("shape", [(0, 5, 6), (4, 0, 6), (4, 3, 5, 0)])
def test_empty_images(tmp_path, shape):
    assert "must not be empty" in failure(save(tmp_path / "train.npz", images=np.zeros(shape, np.uint8)))


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        (LABELS.astype(np.float32), "got float32 [4]"),
        (LABELS > 0, "got bool [4]"),
        (LABELS[:, None], "got int64 [4, 1]"),
        (LABELS[:3], "got 4 and 3"),
        (np.array([0, -1, 1, 2]), "row 1 has -1"),
        (np.array([0, 1, 2**63, 2], dtype=np.uint64), f"row 2 has {2**63}"),
        (np.array([0, 1, 2, 10**12]), "4 rows cannot fill"),
        (np.array([0, 1, 3, 3]), "class 2 (2) has no images"),
    ],
)
def test_labels_that_are_none(tmp_path, labels, expected):
    message = failure(save(tmp_path / "train.npz", labels=labels))
    assert expected in message and str(tmp_path / "train.npz") in message


@pytest.mark.parametrize(
    "classes", [np.arange(3), np.array("cat"), np.array([["cat", "dog", "owl"]]), np.array([b"cat"])]
)
def test_classes_must_be_a_list_of_texts(tmp_path, classes):
    assert "classes must be texts [C]" in failure(save(tmp_path / "train.npz", classes=classes))


def test_keys_are_checked_all_at_once(tmp_path):
    np.savez(tmp_path / "train.npz", pictures=IMAGES, labels=LABELS, names=np.array(["a"]))
    message = failure(tmp_path)
    assert "missing: images; unknown: names, pictures" in message


def test_python_objects_are_never_unpickled(tmp_path):
    path = save(tmp_path / "train.npz", classes=np.array(["cat", "dog", None], dtype=object))
    assert "allow_pickle=False" in failure(path) and "without Python objects" in failure(path)


@pytest.mark.parametrize("keep", [0.0, 0.1, 0.5, 0.99])
def test_a_cut_file(tmp_path, keep):
    path = save(tmp_path / "train.npz")
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content))])
    assert f"{path} is not a whole npz file" in failure(path)


def test_a_file_that_is_no_archive(tmp_path):
    buffer = io.BytesIO()
    np.save(buffer, IMAGES)
    (tmp_path / "train.npz").write_bytes(buffer.getvalue())
    assert "not a whole npz file" in failure(tmp_path)


def test_a_flipped_bit_inside_an_array(tmp_path):
    path = save(tmp_path / "train.npz")
    content = bytearray(path.read_bytes())
    content[content.index(IMAGES.tobytes()) + 7] ^= 1
    path.write_bytes(content)
    message = failure(path)
    assert f"cannot read {path}" in message and "CRC" in message


def test_a_member_that_is_no_array(tmp_path):
    with zipfile.ZipFile(tmp_path / "train.npz", "w") as archive:
        archive.writestr("images.npy", b"not an array")
        archive.writestr("labels.npy", b"")
    message = failure(tmp_path)
    assert "train.npz" in message and "magic string" in message and "numpy.savez" in message
