"""Shards on disk: golden bytes, what a reader notices, what the metadata say."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from darht.cache.format.layout import ArrayLayout, shard_key
from darht.cache.format.store import Store
from darht.cache.format.zarr_arrays import encode_shard
from darht.core import storage
from darht.core.errors import CorruptError, IncompleteError


def layout(name="delta/a", dtype="int8", packed=True, rows=20, rest=(2, 3), shard=8, chunk=4) -> ArrayLayout:
    return ArrayLayout(name, "delta", (rows, *rest), dtype, shard, chunk, packed, "f" * 64, {"scale": 1.0})


def values(array: ArrayLayout, shard: int) -> np.ndarray:
    rows = array.rows(shard)
    shape = (rows.stop - rows.start, *array.shape[1:])
    return (np.arange(rows.start * 6, rows.stop * 6) % 113 - 50).astype(array.dtype).reshape(shape)


def shard_path(store: Store, array: ArrayLayout, shard: int) -> Path:
    return Path(store.storage.name(shard_key(array, shard)))


@pytest.fixture
def written(tmp_path: Path) -> tuple[Store, ArrayLayout]:
    store, array = Store(tmp_path), layout()
    store.create({array.name: array})
    for shard in range(array.shards):
        store.write(array, shard, values(array, shard))
    return store, array


# The packed bytes are Zstandard's: a new release of it may change them, and then caches built before and
# after it differ in their root hashes. That is worth a line in the changelog, which is why they are pinned here.
@pytest.mark.parametrize(
    ("dtype", "packed", "shard", "size", "sha256"),
    [
        ("int8", False, 0, 92, "4f9945013ca05fd4a7098c4d079af6095e3a2152f281b4913afbb3d22937895b"),
        ("int8", True, 0, 110, "e2ce66f5ddc1eeab9b7b0eab6743d086425d864e1dbf575f99697c3e6afb2e58"),
        ("int8", True, 2, 73, "eaa740fd1b8a5563b131f7194a964fe30540af8a8e001902ca5be8fffb17d96d"),
        ("float16", False, 1, 140, "7778624c0e18ace67a8ff94439ff482e69c7f3f654469b693b2871824c20fb74"),
    ],
)
def test_golden_bytes(dtype, packed, shard, size, sha256):
    array = layout(dtype=dtype, packed=packed)
    data = encode_shard(array, shard, values(array, shard))
    assert (len(data), hashlib.sha256(data).hexdigest()) == (size, sha256)


def test_a_plain_shard_is_its_chunks_each_with_a_checksum_and_an_index():
    array = layout(packed=False)
    data = encode_shard(array, 0, values(array, 0))
    chunk = 4 * 2 * 3
    assert data[:chunk] == values(array, 0)[:4].tobytes()
    index = np.frombuffer(data[-(2 * 16 + 4) : -4], dtype="<u8").reshape(2, 2)
    assert index.tolist() == [[0, chunk + 4], [chunk + 4, chunk + 4]]
    assert len(data) == 2 * (chunk + 4) + 2 * 16 + 4


def test_what_is_written_reads_back(written):
    store, array = written
    whole = np.concatenate([values(array, shard) for shard in range(array.shards)])
    for rows in (slice(0, 20), slice(0, 1), slice(7, 9), slice(19, 20), slice(5, 5)):
        np.testing.assert_array_equal(store.read(array, rows), whole[rows])


def test_write_reports_size_and_hash(written):
    store, array = written
    size, sha256, _ = store.write(array, 1, values(array, 1))
    data = shard_path(store, array, 1).read_bytes()
    assert (size, sha256) == (len(data), hashlib.sha256(data).hexdigest())


def test_zeros_are_stored_and_not_left_out(tmp_path: Path):
    store, array = Store(tmp_path), layout()
    store.create({array.name: array})
    size, *_ = store.write(array, 0, np.zeros((8, 2, 3), dtype=np.int8))
    assert shard_path(store, array, 0).stat().st_size == size > 2 * 16 + 4


@pytest.mark.parametrize(
    ("array", "shard", "key"),
    [
        (layout("label", rest=()), 3, "data.zarr/label/c/3"),
        (layout("image", rest=(3, 8, 8)), 0, "data.zarr/image/c/0/0/0/0"),
        (layout("logits/vit/clean"), 1, "data.zarr/logits/vit/clean/c/1/0/0"),
    ],
)
def test_where_shards_lie(array, shard, key):
    assert shard_key(array, shard) == key


@pytest.mark.parametrize(("dtype", "fill"), [("int8", 0), ("float16", "NaN")])
def test_the_metadata_of_an_array(tmp_path: Path, dtype, fill):
    array = layout(dtype=dtype)
    Store(tmp_path).create({array.name: array})
    root = tmp_path / "data.zarr"
    assert sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()) == [
        "delta/a/zarr.json",
        "delta/zarr.json",
        "zarr.json",
    ]
    meta = json.loads((root / "delta/a/zarr.json").read_text())
    assert (meta["zarr_format"], meta["node_type"], meta["data_type"]) == (3, "array", dtype)
    assert (meta["shape"], meta["fill_value"], meta["attributes"]) == ([20, 2, 3], fill, {"scale": 1.0})
    assert meta["chunk_grid"] == {"name": "regular", "configuration": {"chunk_shape": [8, 2, 3]}}
    (sharding,) = meta["codecs"]
    assert sharding["name"] == "sharding_indexed"
    settings = sharding["configuration"]
    assert settings["chunk_shape"] == [4, 2, 3] and settings["index_location"] == "end"
    assert [codec["name"] for codec in settings["codecs"]] == ["bytes", "zstd", "crc32c"]
    assert [codec["name"] for codec in settings["index_codecs"]] == ["bytes", "crc32c"]
    assert settings["codecs"][1]["configuration"] == {"level": 1, "checksum": False}
    assert json.loads((root / "zarr.json").read_text())["node_type"] == "group"


def test_metadata_are_written_once(written):
    store, array = written
    before = {path: path.stat().st_mtime_ns for path in store.storage.folder.rglob("zarr.json")}
    store.create({array.name: array})
    assert before == {path: path.stat().st_mtime_ns for path in store.storage.folder.rglob("zarr.json")}


@pytest.mark.parametrize("packed", [True, False])
def test_every_flipped_bit_is_noticed(tmp_path: Path, packed):
    store, array = Store(tmp_path), layout(packed=packed)
    store.create({array.name: array})
    store.write(array, 0, values(array, 0))
    path = shard_path(store, array, 0)
    data = path.read_bytes()
    for position in range(len(data)):
        path.write_bytes(data[:position] + bytes([data[position] ^ (1 << position % 8)]) + data[position + 1 :])
        with pytest.raises(CorruptError, match=r"rows 0\.\.7 of delta/a do not decode"):
            store.read(array, slice(0, 8))
    path.write_bytes(data)
    np.testing.assert_array_equal(store.read(array, slice(0, 8)), values(array, 0))


@pytest.mark.parametrize("keep", [1, 20, -1])
def test_a_cut_shard_is_noticed(written, keep):
    store, array = written
    path = shard_path(store, array, 1)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CorruptError, match=r"rows 8\.\.15 of delta/a do not decode"):
        store.read(array, slice(8, 16))


def test_an_empty_shard_is_no_zeros(written):
    store, array = written
    shard_path(store, array, 1).write_bytes(b"")
    with pytest.raises(CorruptError, match=r"delta/a/c/1/0/0 is empty: run darht-cache build again"):
        store.read(array, slice(0, 20))


def test_a_missing_shard_is_no_zeros(written):
    store, array = written
    shard_path(store, array, 1).unlink()
    with pytest.raises(IncompleteError, match=r"delta/a/c/1/0/0 is missing: run darht-cache build again"):
        store.read(array, slice(0, 20))
    assert store.read(array, slice(16, 20)).shape == (4, 2, 3)


def test_a_disk_that_gives_back_other_bytes(written, monkeypatch):
    store, array = written
    monkeypatch.setattr(storage, "write_atomic", lambda path, data: path.write_bytes(data[:-1] + b"!"))
    with pytest.raises(CorruptError, match=r"reads back with sha256 [0-9a-f]{12}, written was [0-9a-f]{12}"):
        store.write(array, 0, values(array, 0))


@pytest.mark.parametrize("wrong", [np.zeros((7, 2, 3), np.int8), np.zeros((8, 2, 3), np.int16)])
def test_a_unit_has_the_shape_and_type_of_its_layout(wrong):
    with pytest.raises(AssertionError):
        encode_shard(layout(), 0, wrong)
