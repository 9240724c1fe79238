"""The arrays on disk: whole shards and metadata, written, read back and read.

A shard is encoded whole in memory (`zarr_arrays.py`) and written by us, in one atomic step, because zarr itself neither
fsyncs nor writes through a temporary name, and takes nine times as long to fill a shard chunk by chunk.
"""

import contextlib
import functools
import hashlib
from collections.abc import Iterator, Mapping

import numpy as np

from darht.cache.format.layout import ArrayLayout, shard_key
from darht.cache.format.shards import Index, decode_rows, index_size, read_index, view_span
from darht.core.errors import CorruptError, IncompleteError
from darht.core.files import sha256_bytes
from darht.core.storage import Location, Readable, open_file, open_storage


class ShardReader:
    """The arrays of one cache, to be read."""

    def __init__(self, files: Readable) -> None:
        self._files = files

    def shard(self, array: ArrayLayout, shard: int) -> bytes:
        """The bytes of a shard.

        Raises:
            IncompleteError: it is missing (zarr would give the fill value in silence).
            CorruptError: it is empty (zarr would give the fill value here too).
        """
        data, name = self._files.read(shard_key(array, shard)), self._files.name(shard_key(array, shard))
        if data is None:
            raise IncompleteError(f"{name} is missing: run darht-cache build again")
        if not data:
            raise CorruptError(f"{name} is empty: run darht-cache build again")
        return data

    def read(self, array: ArrayLayout, rows: slice) -> np.ndarray:
        """Read rows of an array.

        Raises:
            IncompleteError: a shard is missing.
            CorruptError: a shard is empty, or a checksum fails.
        """
        values = np.empty((max(0, rows.stop - rows.start), *array.shape[1:]), dtype=array.dtype)
        for shard in array.shards_of(rows):
            part, wanted = array.overlap(shard, rows)
            self.decode_into(array, shard, self.shard(array, shard), part, values[wanted])
        return values

    def decode(self, array: ArrayLayout, shard: int, data: bytes) -> np.ndarray:
        """The rows of a unit from the bytes of its shard.

        Raises:
            CorruptError: a checksum fails.
        """
        rows = array.rows(shard)
        values = np.empty((rows.stop - rows.start, *array.shape[1:]), dtype=array.dtype)
        self.decode_into(array, shard, data, slice(0, len(values)), values)
        return values

    def decode_into(self, array: ArrayLayout, shard: int, data: bytes, part: slice, out: np.ndarray) -> None:
        """Rows of a unit, counted from its first, from the bytes of its shard into `out`.

        Raises:
            CorruptError: a checksum fails.
        """
        with self._explained(array, shard):
            index = read_index(array, data[-index_size(array) :])
            decode_rows(array, index, lambda start, stop: data[start:stop], part, out)

    def read_index(self, array: ArrayLayout, shard: int, size: int) -> Index:
        """Where the chunks of a shard of `size` bytes lie.

        Raises:
            IncompleteError: the shard is missing.
            CorruptError: its checksum fails.
        """
        with self._explained(array, shard):
            return read_index(array, self._piece(array, shard, max(0, size - index_size(array)), size))

    def read_part(
        self, array: ArrayLayout, shard: int, index: Index, part: slice, out: np.ndarray, *, view: int | None = None
    ) -> None:
        """As `decode_into`, but reads only the chunks that hold the rows; of one view, `[rows, 1, ...]`, where asked.

        Args:
            array: the array.
            shard: which of its units.
            index: from `read_index`.
            part: rows of the unit.
            out: where they go.
            view: its number, of an array `by_view`.

        Raises:
            IncompleteError: the shard is missing.
            CorruptError: a checksum fails.
        """
        with self._explained(array, shard):
            decode_rows(array, index, functools.partial(self._piece, array, shard), part, out, view=view)

    def view_sha256(self, array: ArrayLayout, shard: int, view: int) -> str:
        """Of the bytes of one view, of an array `by_view`.

        Raises:
            IncompleteError: the shard is missing.
        """
        span = view_span(array, shard, view)
        return sha256_bytes(self._piece(array, shard, span.start, span.stop))

    def _piece(self, array: ArrayLayout, shard: int, start: int, stop: int) -> bytes:
        key = shard_key(array, shard)
        data = self._files.read(key, start, stop)
        if data is None:
            raise IncompleteError(f"{self._files.name(key)} is missing: run darht-cache build again")
        return data

    @contextlib.contextmanager
    def _explained(self, array: ArrayLayout, shard: int) -> Iterator[None]:
        """Damage as an error that says where it is."""
        try:
            yield
        except (ValueError, RuntimeError) as error:
            rows = array.rows(shard)
            what = f"rows {rows.start}..{rows.stop - 1} of {array.name} do not decode: {error}"
            raise CorruptError(
                f"{self._files.name(shard_key(array, shard))}: {what}; run darht-cache build again"
            ) from error


class Store(ShardReader):
    """The arrays of one cache, to be written and read."""

    def __init__(self, location: Location) -> None:
        self.storage = open_storage(location)
        super().__init__(self.storage)

    @staticmethod
    def describe(arrays: Mapping[str, ArrayLayout]) -> dict[str, bytes]:
        """The metadata of the group and of every array, by key."""
        from darht.cache.format.zarr_arrays import metadata_files  # who reads needs no zarr

        return metadata_files(arrays.values())

    def create(self, arrays: Mapping[str, ArrayLayout]) -> dict[str, bytes]:
        """Write the metadata of the group and of every array where they are not there yet; gives them by key."""
        metadata = self.describe(arrays)
        for key in sorted(metadata):
            if self.storage.read(key) != metadata[key]:
                self.storage.write(key, metadata[key])
        return metadata

    def write(self, array: ArrayLayout, shard: int, values: np.ndarray) -> tuple[int, str, tuple[str, ...]]:
        """Write one whole shard, read it back, and return its size in bytes, its sha256 and those of its parts.

        Raises:
            CorruptError: the file system gave back other bytes than were written.
        """
        from darht.cache.format.zarr_arrays import encode_shard

        data, key = encode_shard(array, shard, values), shard_key(array, shard)
        self.storage.write(key, data)
        expected = sha256_bytes(data)
        with open_file(self.storage, key, len(data)) as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != expected:
            raise CorruptError(
                f"{self.storage.name(key)} reads back with sha256 {found[:12]}, written was {expected[:12]}"
            )
        return len(data), expected, part_hashes(array, shard, data)


def part_hashes(array: ArrayLayout, shard: int, data: bytes) -> tuple[str, ...]:
    """The sha256 of each view's bytes in a shard; none where views do not lie apart."""
    views = range(array.views_per_shard if array.by_view else 0)
    return tuple(sha256_bytes(memoryview(data)[view_span(array, shard, view)]) for view in views)
