"""Shards and metadata as zarr writes them, in memory: the only module that knows zarr. Who reads does not import it."""

import warnings
from collections.abc import Iterable
from typing import Any

import numpy as np
import zarr
from zarr.abc.codec import BytesBytesCodec
from zarr.codecs import Crc32cCodec, ZstdCodec
from zarr.core.buffer import default_buffer_prototype
from zarr.core.sync import sync
from zarr.dtype import VariableLengthBytes
from zarr.errors import UnstableSpecificationWarning
from zarr.storage import MemoryStore

from darht.cache.format.layout import DATA, ArrayLayout, shard_key
from darht.cache.format.shards import encode_values, order_by_view


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
    if array.encoded:
        return encode_values(array, values.tolist())  # zarr takes a second for a thousand chunks
    store = MemoryStore()
    with zarr.config.set({"array.write_empty_chunks": True}):
        _create(store, array)[rows] = values
    data = _items(store)[shard_key(array, shard).removeprefix(f"{DATA}/")]
    return order_by_view(array, shard, data) if array.by_view else data


def metadata_files(arrays: Iterable[ArrayLayout]) -> dict[str, bytes]:
    """The metadata of the group and of every array, by key."""
    store = MemoryStore()
    zarr.create_group(store, zarr_format=3)
    for array in arrays:
        for depth in range(1, array.name.count("/") + 1):
            zarr.open_group(store, path="/".join(array.name.split("/")[:depth]), mode="a", zarr_format=3)
        _create(store, array)
    return {f"{DATA}/{key}": data for key, data in _items(store).items()}


def _create(store: MemoryStore, array: ArrayLayout) -> Any:
    if array.encoded:
        return _create_encoded(store, array)
    rest = array.shape[1:]
    compressors: list[BytesBytesCodec] = [Crc32cCodec()]
    if array.packed:
        # Perturbations crowd at the edge of the ball, which entropy coding alone turns into 2.4 to 3.8 bits a value;
        # level 1 decodes above 1 GB/s per core, bit shuffling first is larger and slower: docs/benchmarks-cache.md.
        compressors.insert(0, ZstdCodec(level=1, checksum=False))
    return zarr.create_array(
        store,
        name=array.name,
        shape=array.shape,
        chunks=array.chunk_shape,
        shards=(array.rows_per_shard, *rest),
        dtype=array.dtype,
        compressors=compressors,
        fill_value=array.fill_value,
        attributes=array.attributes,
        zarr_format=3,
    )


def _create_encoded(store: MemoryStore, array: ArrayLayout) -> Any:
    with warnings.catch_warnings():
        # The type is registered, and zarr warns of all types that are not in the core of the specification.
        warnings.simplefilter("ignore", UnstableSpecificationWarning)
        return zarr.create_array(
            store,
            name=array.name,
            shape=array.shape,
            chunks=(array.rows_per_chunk,),
            shards=(array.rows_per_shard,),
            dtype=VariableLengthBytes(),
            compressors=[Crc32cCodec()],
            fill_value=b"",
            attributes=array.attributes,
            zarr_format=3,
        )


def _items(store: MemoryStore) -> dict[str, bytes]:
    async def collect() -> dict[str, bytes]:
        prototype = default_buffer_prototype()
        values = {key: await store.get(key, prototype) async for key in store.list()}
        return {key: value.to_bytes() for key, value in values.items() if value is not None}

    return sync(collect())
