"""Shards decoded without zarr: the same values, and nothing that is damaged or missing."""

from pathlib import Path

import google_crc32c
import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from numcodecs import zstd

from darht.cache.format.layout import ArrayLayout, shard_key
from darht.cache.format.shards import decode_rows, index_size, read_index
from darht.cache.format.store import Store
from darht.cache.format.zarr_arrays import encode_shard
from darht.core.errors import CorruptError


def layout(dtype="int8", packed=True, rows=20, rest=(2, 3), shard=8, chunk=4) -> ArrayLayout:
    return ArrayLayout("delta/a", "delta", (rows, *rest), dtype, shard, chunk, packed, "f" * 64, {})


def values(array: ArrayLayout, shard: int, seed: int = 0) -> np.ndarray:
    rows = array.rows(shard)
    random = np.random.default_rng([seed, shard])
    return random.integers(-8, 9, (rows.stop - rows.start, *array.shape[1:])).astype(array.dtype)


def sealed(body: bytes) -> bytes:
    return body + google_crc32c.value(body).to_bytes(4, "little")


def decode(array: ArrayLayout, data: bytes, part: slice) -> np.ndarray:
    out = np.empty((part.stop - part.start, *array.shape[1:]), array.dtype)
    index = read_index(array, data[-index_size(array) :])
    decode_rows(array, index, lambda start, stop: data[start:stop], part, out)
    return out


@settings(max_examples=25)
@given(
    chunk=st.integers(1, 5),
    chunks=st.integers(1, 4),
    rows=st.integers(1, 40),
    kind=st.sampled_from([("int8", True), ("uint8", True), ("float16", False), ("int64", False)]),
    rest=st.sampled_from([(), (3,), (2, 3)]),
    data=st.data(),
)
def test_rows_are_those_that_zarr_reads(chunk, chunks, rows, kind, rest, data, tmp_path_factory):
    dtype, packed = kind
    array = layout(dtype, packed, rows, rest, chunk * chunks, chunk)
    folder: Path = tmp_path_factory.mktemp("zarr")
    store = Store(folder)
    store.create({array.name: array})
    for shard in range(array.shards):
        store.write(array, shard, values(array, shard, seed=rows))
    theirs = zarr.open_array(folder / "data.zarr", path=array.name, mode="r")
    np.testing.assert_array_equal(store.read(array, slice(0, rows)), theirs[:])
    first = data.draw(st.integers(0, rows - 1))
    last = data.draw(st.integers(first + 1, rows))
    found = store.read(array, slice(first, last))
    assert found.dtype == theirs.dtype
    np.testing.assert_array_equal(found, theirs[first:last])
    shard = first // array.rows_per_shard
    part, _ = array.overlap(shard, slice(first, last))
    out = np.empty((part.stop - part.start, *rest), dtype)
    size = store.storage.size(shard_key(array, shard))
    store.read_part(array, shard, store.read_index(array, shard, size), part, out)
    np.testing.assert_array_equal(out, found[: len(out)])


@pytest.mark.parametrize("packed", [True, False])
def test_rows_go_into_strided_arrays(packed):
    array = layout(packed=packed)
    data = encode_shard(array, 0, values(array, 0))
    wide = np.full((8, 2, 4, 3), 99, np.int8)
    decode_rows(
        array, read_index(array, data[-index_size(array) :]), lambda a, b: data[a:b], slice(0, 8), wide[:, :, 1]
    )
    np.testing.assert_array_equal(wide[:, :, 1], values(array, 0))
    assert (wide[:, :, [0, 2, 3]] == 99).all()


def test_only_the_chunks_that_hold_the_rows_are_read():
    array = layout(packed=False)
    data, asked = encode_shard(array, 0, values(array, 0)), []

    def fetch(start: int, stop: int) -> bytes:
        asked.append((start, stop))
        return data[start:stop]

    out = np.empty((2, 2, 3), np.int8)
    decode_rows(array, read_index(array, data[-index_size(array) :]), fetch, slice(5, 7), out)
    np.testing.assert_array_equal(out, values(array, 0)[5:7])
    assert asked == [(28, 56)]  # the second chunk: 24 bytes and a checksum


def test_a_hole_is_no_zeros(tmp_path: Path):
    array, store = layout(), Store(tmp_path)
    data = encode_shard(array, 0, values(array, 0))
    tail = bytearray(data[-index_size(array) : -4])
    tail[16:32] = b"\xff" * 16
    holed = data[: -index_size(array)] + sealed(bytes(tail))
    np.testing.assert_array_equal(decode(array, holed, slice(0, 4)), values(array, 0)[:4])
    with pytest.raises(ValueError, match=r"one of the chunks 0\.\.1 is a hole"):
        decode(array, holed, slice(3, 5))
    store.storage.write(shard_key(array, 0), holed)
    with pytest.raises(CorruptError, match=r"rows 0\.\.7 of delta/a do not decode: one of the chunks 1\.\.1 is a hole"):
        store.read(array, slice(4, 8))


@pytest.mark.parametrize("count", [0, 1, 300, 70_000])
def test_a_frame_of_another_size_is_refused(count):
    """Its checksums fit, and Zstandard would leave the rest of the rows as they were."""
    array = layout(shard=4)
    body = sealed(zstd.compress(np.zeros(count, np.int8), 1))
    index = sealed(np.array([0, len(body)], "<u8").tobytes())
    with pytest.raises(ValueError, match="bytes, not those of 4 rows"):
        decode(array, body + index, slice(0, 4))


@pytest.mark.parametrize("count", [24, 300, 70_000])
def test_the_size_of_a_frame_is_read_in_each_of_its_forms(count):
    array = layout(shard=4, rest=(count // 4,))
    held = np.arange(count, dtype=np.int64).astype(np.int8).reshape(4, -1)
    body = sealed(zstd.compress(held, 1))
    np.testing.assert_array_equal(
        decode(array, body + sealed(np.array([0, len(body)], "<u8").tobytes()), slice(0, 4)), held
    )


def test_what_is_no_frame_is_refused():
    array, body = layout(shard=4), sealed(b"no frame of Zstandard")
    with pytest.raises(ValueError, match="a chunk holds -1 bytes"):
        decode(array, body + sealed(np.array([0, len(body)], "<u8").tobytes()), slice(0, 4))
