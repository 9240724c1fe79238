"""Near-duplicates are told from rows that are merely alike, whatever the data: digits are all alike."""

from pathlib import Path

import numpy as np
import pytest
from planted import one_hot, write_cache

from darht.cache.read.reader import Cache, open_cache
from darht.cache.sources.load import Source, load_source
from darht.core.errors import DataError
from darht.tools.duplicates import find_duplicates, measure_null


def sealed(folder: Path, images: np.ndarray, labels: np.ndarray) -> Cache:
    C = int(labels.max()) + 1
    return open_cache(write_cache(
        folder, images=images, labels=labels, deltas={"a": np.zeros(images.shape, dtype=np.int8)},
        logits={"a": {"clean": one_hot(labels, C), "pgd-a": one_hot(labels, C)}},
        rows_per_shard=8 * len(images),
    ))  # fmt: skip


@pytest.fixture(scope="module")
def digits() -> tuple[Source, Source]:
    return load_source("digits", None, "train"), load_source("digits", None, "test")


@pytest.fixture(scope="module")
def cache(digits: tuple[Source, Source], tmp_path_factory: pytest.TempPathFactory) -> Cache:
    return sealed(tmp_path_factory.mktemp("digits") / "cache", digits[0].images, digits[0].labels)


@pytest.fixture(scope="module")
def few(digits: tuple[Source, Source], tmp_path_factory: pytest.TempPathFactory) -> Cache:
    return sealed(tmp_path_factory.mktemp("few") / "cache", digits[0].images[:300], digits[0].labels[:300])


def test_no_digit_is_called_a_duplicate_of_another(cache: Cache, few: Cache, digits: tuple[Source, Source]):
    for one in (cache, few):
        null = measure_null(one)
        assert null.pixels > 0.97 and null.detail > 0.97 and not null.refusal
        assert len(find_duplicates(one, digits[1].images, {}, null)) <= 1


def test_copies_of_digits_are_found_among_them(cache: Cache, digits: tuple[Source, Source]):
    generator = np.random.default_rng(0)
    rows = generator.choice(len(digits[0].images), 60, replace=False)
    copies = digits[0].images[rows].astype(np.float64)
    copies[:20] += generator.normal(0, 6, copies[:20].shape)
    copies[20:40] = copies[20:40] * 0.8 + 20
    copies[40:] = copies[40:, ..., ::-1]
    test = np.concatenate([np.clip(copies, 0, 255).astype(np.uint8), digits[1].images[:200]])
    found = find_duplicates(cache, test, {})
    right = {pair.test for pair in found if pair.test < 60 and pair.row == rows[pair.test]}
    assert len(right) >= 57
    assert len([pair for pair in found if pair.test >= 60]) <= 1


def test_rows_that_are_all_but_the_same_cannot_be_told(tmp_path: Path):
    image = np.random.default_rng(0).integers(20, 230, (1, 3, 8, 8))
    images = np.repeat(image, 40, axis=0).astype(np.uint8)
    images[np.arange(40), 0, 0, 0] += np.arange(40, dtype=np.uint8) % 3
    cache = sealed(tmp_path / "same", images, np.arange(40) % 2)
    with pytest.raises(
        DataError, match="near-duplicates cannot be told: rows that are no duplicates correlate by up to"
    ):
        find_duplicates(cache, images[:3], {})
