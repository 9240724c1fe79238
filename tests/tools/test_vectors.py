"""Vectors have unit length and ignore what they should; blocks cover every row once."""

from pathlib import Path

import numpy as np
import pytest
from planted import one_hot, write_cache

from darht.cache.read.reader import Cache, open_cache
from darht.core.errors import ConfigError
from darht.tools import vectors
from darht.tools.vectors import (
    blocks,
    cache_spaces,
    image_vectors,
    logit_vectors,
    need_attacks,
    sample_rows,
    take,
    unit,
)


def test_a_space_gives_unit_vectors_for_every_row(tiny_cache: Path) -> None:
    cache = open_cache(tiny_cache)
    spaces = cache_spaces(cache, {"me": (5, lambda images: images.reshape(len(images), -1)[:, :5] + np.float32(1))})
    assert list(spaces) == ["image", "delta/pgd-cnn", "delta/pgd-vit", "logits/cnn", "logits/vit", "features/me"]
    for space in spaces.values():
        values = take(cache, space, np.arange(cache.rows))
        assert values.shape == (100, space.dim) and values.dtype == np.float32
        assert np.linalg.norm(values, axis=1) == pytest.approx(1, abs=1e-5)


def test_rows_are_taken_in_the_order_asked_for(tiny_cache: Path) -> None:
    cache = open_cache(tiny_cache)
    space = cache_spaces(cache)["delta/pgd-vit"]
    whole = unit(cache.read("delta/pgd-vit")[:, 0])
    rows = np.array([99, 3, 40, 3])
    assert np.array_equal(take(cache, space, rows), whole[rows])


def test_zeros_stay_zeros() -> None:
    assert np.array_equal(unit(np.zeros((2, 3))), np.zeros((2, 3), dtype=np.float32))


def test_a_shift_of_logits_and_the_brightness_of_an_image_change_nothing() -> None:
    logits = np.random.default_rng(0).standard_normal((4, 10))
    assert logit_vectors(logits + 7) == pytest.approx(logit_vectors(logits), abs=1e-6)
    image = np.random.default_rng(0).integers(0, 100, (2, 3, 4, 4), dtype=np.uint8)
    assert image_vectors(image + np.uint8(50)) == pytest.approx(image_vectors(image), abs=1e-5)


@pytest.mark.parametrize("limit", [1, 5_000, 2**25])
def test_blocks_cover_every_row_once_whatever_their_size(
    tiny_cache: Path, monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    cache = open_cache(tiny_cache)
    monkeypatch.setattr(vectors, "_BLOCK_BYTES", limit)
    for name in ("image", "logits/cnn/clean"):
        layout, found = cache.arrays[name], list(blocks(cache, name))
        assert [row for block in found for row in range(block.start, block.stop)] == list(range(100))
        row_bytes = np.dtype(layout.dtype).itemsize * int(np.prod(layout.shape[1:]))
        most = max((block.stop - block.start) * row_bytes for block in found)
        assert most <= max(limit, layout.rows_per_chunk * row_bytes)


def test_a_sample_is_sorted_distinct_and_the_same_again(planted: Cache) -> None:
    rows = sample_rows(planted, 50, seed=1)
    assert len(set(rows.tolist())) == 50 and (np.diff(rows) > 0).all()
    assert np.array_equal(rows, sample_rows(planted, 50, seed=1))
    assert np.array_equal(sample_rows(planted, 10**6), np.arange(planted.rows))


def test_a_cache_without_attacks_is_refused(tmp_path: Path) -> None:
    images = np.zeros((16, 3, 4, 4), dtype=np.uint8)
    labels = np.arange(16) % 2
    logits = {"t": {"clean": one_hot(labels, 2)}}
    folder = write_cache(tmp_path / "c", images=images, labels=labels, deltas={}, logits=logits, rows_per_shard=16)
    with pytest.raises(ConfigError, match="holds no attacks"):
        need_attacks(open_cache(folder))
