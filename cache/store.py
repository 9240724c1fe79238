"""The arrays on disk: the only module that knows zarr.

A shard is encoded whole in memory and written by us, in one atomic step, because zarr itself neither fsyncs nor
writes through a temporary name, and takes nine times as long to fill a shard chunk by chunk.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from zarr.abc.codec import BytesBytesCodec
from zarr.codecs import BloscCodec, Crc32cCodec
from zarr.core.buffer import default_buffer_prototype
from zarr.core.sync import sync
from zarr.storage import LocalStore, MemoryStore

from darht.cache.layout import ArrayLayout
from darht.core.errors import CorruptError, IncompleteError
from darht.core.files import write_atomic

DATA = "data.zarr"


class Store:
    """The arrays of one cache folder."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / DATA

    def create(self, arrays: Mapping[str, ArrayLayout]) -> None:
        """Write the metadata of the group and of every array that is not there yet."""
        memory = _metadata(arrays.values())
        for key in sorted(memory):
            path = self.root / key
            if not path.is_file() or path.read_bytes() != memory[key]:
                write_atomic(path, memory[key])

    def path(self, array: ArrayLayout, shard: int) -> Path:
        """Where a shard lies."""
        return self.root / shard_key(array, shard)

    def write(self, array: ArrayLayout, shard: int, values: np.ndarray) -> tuple[int, str]:
        """Write one whole shard, read it back, and return its size in bytes and its sha256.

        Raises:
            CorruptError: the file system gave back other bytes than were written.
        """
        data = encode_shard(array, shard, values)
        path = self.path(array, shard)
        write_atomic(path, data)
        expected, found = hashlib.sha256(data).hexdigest(), hashlib.sha256(path.read_bytes()).hexdigest()
        if found != expected:
            raise CorruptError(f"{path} reads back with sha256 {found[:12]}, written was {expected[:12]}")
        return len(data), expected

    def read(self, array: ArrayLayout, rows: slice) -> np.ndarray:
        """Read rows of an array.

        Raises:
            IncompleteError: a shard file is missing (zarr would give the fill value in silence).
            CorruptError: a checksum fails, or a shard file is empty (zarr would give the fill value here too).
        """
        first, last = rows.start // array.rows_per_shard, -(-rows.stop // array.rows_per_shard)
        for shard in range(first, last):
            path = self.path(array, shard)
            if not path.is_file():
                raise IncompleteError(f"{path} is missing: run darht-cache build again")
            if path.stat().st_size == 0:
                raise CorruptError(f"{path} is empty: run darht-cache build again")
        try:
            values: np.ndarray = self._open(array)[rows]
        except (ValueError, RuntimeError) as error:
            reason = f"rows {rows.start}..{rows.stop - 1} of {array.name} do not decode: {error}"
            raise CorruptError(
                f"{self.root}: {reason}; run darht-cache build again after removing the shard"
            ) from error
        return values

    def _open(self, array: ArrayLayout) -> Any:
        return zarr.open_array(LocalStore(self.root, read_only=True), path=array.name, mode="r")


def shard_key(array: ArrayLayout, shard: int) -> str:
    """The key of a shard inside `data.zarr`."""
    return "/".join([array.name, "c", str(shard), *("0" for _ in array.shape[1:])])


def encode_shard(array: ArrayLayout, shard: int, values: np.ndarray) -> bytes:
    """The bytes of one shard, the same for the same values on any machine.

    Args:
        array: the array.
        shard: which of its units.
        values: all rows of the unit, `[rows, ...]`.
    """
    rows = array.rows(shard)
    expected = (rows.stop - rows.start, *array.shape[1:])
    assert values.shape == expected and values.dtype == array.dtype, (array.name, values.shape, values.dtype)
    store = MemoryStore()
    with zarr.config.set({"array.write_empty_chunks": True}):
        _create(store, array)[rows] = values
    return _items(store)[shard_key(array, shard)]


def _metadata(arrays: Any) -> dict[str, bytes]:
    store = MemoryStore()
    zarr.create_group(store, zarr_format=3)
    for array in arrays:
        for depth in range(1, array.name.count("/") + 1):
            zarr.open_group(store, path="/".join(array.name.split("/")[:depth]), mode="a", zarr_format=3)
        _create(store, array)
    return _items(store)


def _create(store: MemoryStore, array: ArrayLayout) -> Any:
    rest = array.shape[1:]
    compressors: list[BytesBytesCodec] = [Crc32cCodec()]
    if array.packed:
        compressors.insert(0, BloscCodec(cname="zstd", clevel=3, shuffle="bitshuffle", typesize=1))
    return zarr.create_array(
        store,
        name=array.name,
        shape=array.shape,
        chunks=(array.rows_per_chunk, *rest),
        shards=(array.rows_per_shard, *rest),
        dtype=array.dtype,
        compressors=compressors,
        fill_value=array.fill_value,
        attributes=array.attributes,
        zarr_format=3,
    )


def _items(store: MemoryStore) -> dict[str, bytes]:
    async def collect() -> dict[str, bytes]:
        prototype = default_buffer_prototype()
        values = {key: await store.get(key, prototype) async for key in store.list()}
        return {key: value.to_bytes() for key, value in values.items() if value is not None}

    return sync(collect())
