"""Sources side by side, and archives of images that are read a few rows at a time."""

import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
from generated import generated_digits, save_generated
from hypothesis import given
from hypothesis import strategies as st

from darht.cache.format.spec import RULES
from darht.cache.sources import npz_member
from darht.cache.sources.load import content_sha256, load_source
from darht.cache.sources.mixture import mix
from darht.cache.sources.npz import NpzImages
from darht.cache.sources.open import open_source
from darht.core.errors import DataError

IMAGES, LABELS = generated_digits(40)
PIXELS = IMAGES.transpose(0, 3, 1, 2)


def opened(path: Path, **options):
    return open_source("npz", path, "train", rules=RULES, **options)


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "compressed"])
def archive(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_generated(tmp_path_factory.mktemp("npz") / "made.npz", 40, compressed=request.param)


def test_an_open_archive_is_the_source_that_is_loaded(archive):
    lazy, whole = opened(archive), load_source("npz", archive, "train")
    assert isinstance(lazy.images, NpzImages) and lazy.images.shape == (40, 3, 8, 8)
    assert lazy.sha256 == whole.sha256 and lazy.classes == whole.classes
    np.testing.assert_array_equal(lazy.images[:], whole.images)
    np.testing.assert_array_equal(lazy.labels, LABELS)


@given(
    wanted=st.lists(
        st.one_of(
            st.tuples(st.integers(0, 40), st.integers(0, 40)).map(lambda ends: slice(min(ends), max(ends))),
            st.lists(st.integers(0, 39), max_size=6).map(lambda rows: np.array(rows, dtype=np.int64)),
        ),
        min_size=1,
        max_size=5,
    )
)
def test_any_rows_in_any_order(archive, wanted):
    images = opened(archive, labelled=False).images
    for rows in wanted:
        np.testing.assert_array_equal(images[rows], PIXELS[rows])


def test_images_go_to_another_process_without_open_files(archive):
    images = opened(archive).images
    images[5:7]
    there = pickle.loads(pickle.dumps(images))
    np.testing.assert_array_equal(there[3:9], PIXELS[3:9])


def test_rows_in_order_are_decompressed_once(archive, monkeypatch):
    images, begun, reader = opened(archive).images, [], zipfile.ZipFile
    monkeypatch.setattr(npz_member.zipfile, "ZipFile", lambda path: begun.append(path) or reader(path))
    for start in range(0, 40, 8):
        images[start : start + 8]
    assert len(begun) <= 1


def test_pixels_in_fortran_order(tmp_path):
    for save, name in ((np.savez, "plain.npz"), (np.savez_compressed, "small.npz")):
        save(tmp_path / name, image=np.asfortranarray(IMAGES), label=LABELS)
        np.testing.assert_array_equal(opened(tmp_path / name).images[7:9], PIXELS[7:9])


def test_a_flipped_bit_is_found_while_the_content_is_hashed(tmp_path):
    path = save_generated(tmp_path / "made.npz", 40)
    content = bytearray(path.read_bytes())
    content[content.index(IMAGES[20].tobytes()) + 7] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match="CRC"):
        opened(path, labelled=False)


def test_labels_that_are_not_wanted_are_not_in_the_hash(archive, tmp_path):
    np.savez(tmp_path / "bare.npz", image=IMAGES)
    bare, made = opened(tmp_path / "bare.npz", labelled=False), opened(archive, labelled=False)
    assert set(bare.labels) == {-1} and bare.classes == ()
    assert bare.sha256 == made.sha256 == content_sha256(PIXELS, bare.labels, ())
    with pytest.raises(DataError, match="missing: labels"):
        opened(tmp_path / "bare.npz")


def test_a_source_is_taken_without_its_labels(tmp_path):
    digits = open_source("digits", None, "train", rules=RULES, labelled=False)
    assert set(digits.labels) == {-1} and digits.classes == ()


def test_an_archive_without_names_takes_those_of_the_source_before_it(tmp_path):
    names = tuple("abcdefghij")
    np.savez(tmp_path / "few.npz", image=IMAGES[:2], label=np.array([3, 9]))
    few = opened(tmp_path / "few.npz", classes=names)
    assert few.classes == names and few.labels.tolist() == [3, 9]
    with pytest.raises(DataError, match="row 1 has 9"):
        opened(tmp_path / "few.npz", classes=names[:9])
    with pytest.raises(DataError, match="has the classes 0, 1, 2, 3, 4 and 5 more, the source before it a, b, c"):
        open_source("digits", None, "train", rules=RULES, classes=names)


def test_rows_follow_one_another(archive):
    digits = open_source("digits", None, "train", rules=RULES, limit=60)
    both = mix([digits, opened(archive, labelled=False)])
    assert both.images.shape == (100, 3, 8, 8) and both.name == "digits" and both.classes == digits.classes
    rows = np.array([99, 3, 60, 59])
    expected = np.concatenate([digits.images, PIXELS])
    np.testing.assert_array_equal(both.images[rows], expected[rows])
    np.testing.assert_array_equal(np.concatenate(list(both.images.pieces())), expected)
    assert both.labels.tolist() == [*digits.labels.tolist(), *[-1] * 40]


def test_images_have_one_size(archive, tmp_path):
    np.savez(tmp_path / "wide.npz", image=np.zeros((4, 9, 8, 3), np.uint8))
    with pytest.raises(DataError, match="those of npz have 8x9 pixels, those of digits 8x8"):
        mix([load_source("digits", None, "train"), opened(tmp_path / "wide.npz", labelled=False)])
