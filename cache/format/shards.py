"""The bytes of a shard: Zarr v3's `sharding_indexed`, decoded without zarr's pipeline.

A shard is its chunks and then an index: offset and size of every chunk, and a crc32c. Where chunks hold one view each,
all of one view lie together, view after view. Each chunk ends in a crc32c of its own; pixels and perturbations are
one Zstandard frame before it; a chunk of encoded images is one image, as zarr's `vlen-bytes` writes it. zarr reads
the same bytes several times slower, because it plans every chunk in an event loop and copies it twice. Unpacking and
hashing release the interpreter's lock, so threads share this work.
"""

import math
from collections.abc import Callable, Sequence

import google_crc32c
import numpy as np
from numcodecs import zstd

from darht.cache.format.layout import ArrayLayout

Fetch = Callable[[int, int], bytes]
Index = tuple[tuple[int, int] | None, ...]
_CHECKSUM, _ENTRY, _HOLE = 4, 16, 2**64 - 1
_LENGTH, _ONE_VALUE = 4, b"\x01\0\0\0"  # of vlen-bytes: how many values, then the length and the bytes of each


def index_size(array: ArrayLayout) -> int:
    """The bytes at the end of a shard that say where its chunks lie."""
    return _ENTRY * _chunks(array) * array.views_per_shard + _CHECKSUM


def _chunks(array: ArrayLayout) -> int:
    """How many chunks of rows a shard has; the last shard of an array may leave some of them out."""
    return array.rows_per_shard // array.rows_per_chunk


def view_span(array: ArrayLayout, shard: int, view: int) -> slice:
    """The bytes of a shard that hold one view of all its rows; of arrays `by_view`, which are not compressed."""
    rows = array.rows(shard)
    size = -(-(rows.stop - rows.start) // array.rows_per_chunk) * _chunk_size(array)
    return slice(view * size, (view + 1) * size)


def _chunk_size(array: ArrayLayout) -> int:
    return math.prod(array.chunk_shape) * np.dtype(array.dtype).itemsize + _CHECKSUM


def plain_index(array: ArrayLayout, shard: int) -> Index:
    """Where the chunks of an array `by_view` lie, which follows from its shape; as `read_index` has them."""
    size, views = _chunk_size(array), array.views_per_shard
    step = view_span(array, shard, 0).stop
    there = step // size
    return tuple(
        (view * step + row * size, size) if row < there else None
        for row in range(_chunks(array))
        for view in range(views)
    )


def order_by_view(array: ArrayLayout, shard: int, data: bytes) -> bytes:
    """The bytes of a shard with its chunks in the order of views, then rows; zarr's own order is another."""
    found, ordered = read_index(array, data[-index_size(array) :]), plain_index(array, shard)
    pieces = {new[0]: data[old[0] : sum(old)] for old, new in zip(found, ordered, strict=True) if old and new}
    table = np.array([entry or (_HOLE, _HOLE) for entry in ordered], dtype="<u8").tobytes()
    checksum = google_crc32c.value(table).to_bytes(_CHECKSUM, "little")
    return b"".join([*(pieces[offset] for offset in sorted(pieces)), table, checksum])


def read_index(array: ArrayLayout, tail: bytes) -> Index:
    """Offset and size of every chunk, None for holes, from the last `index_size` bytes of a shard.

    Raises:
        ValueError: it is cut, or its checksum fails.
    """
    if len(tail) != index_size(array):
        raise ValueError(f"the index of its chunks has {len(tail)} bytes, not {index_size(array)}")
    entries = _checked(np.frombuffer(tail, np.uint8), "the index").view("<u8").reshape(-1, 2).tolist()
    return tuple(None if _HOLE in entry else (entry[0], entry[1]) for entry in entries)


def decode_rows(
    array: ArrayLayout, index: Index, fetch: Fetch, part: slice, out: np.ndarray, *, view: int | None = None
) -> None:
    """Decode rows of a shard: in all views, or in one of an array `by_view`.

    Args:
        array: the array.
        index: from `read_index`.
        fetch: gives the bytes [start, stop) of the shard; asked once for each view whose chunks lie apart.
        part: the rows, counted from the first of the shard.
        out: where they go, `[rows, ...]` in the array's type, or `[rows, 1, ...]` of a view; may be strided.
        view: its number.

    Raises:
        ValueError, RuntimeError: a chunk is missing or cut, its checksum fails, or it does not decompress.
    """
    if not array.by_view:
        _decode_view(array, index, fetch, part, out)
        return
    V = array.views_per_shard
    for place, number in enumerate(range(V) if view is None else (view,)):
        _decode_view(array, index[number::V], fetch, part, out[:, place : place + 1])


def _decode_view(array: ArrayLayout, index: Index, fetch: Fetch, part: slice, out: np.ndarray) -> None:
    size = array.rows_per_chunk
    chunks = range(part.start // size, -(-part.stop // size))
    spans = [span for span in index[chunks.start : chunks.stop] if span is not None]
    if len(spans) < len(chunks):
        raise ValueError(f"one of the chunks {chunks.start}..{chunks.stop - 1} is a hole")
    if not spans:
        return
    start, stop = min(offset for offset, _ in spans), max(offset + length for offset, length in spans)
    data = np.frombuffer(fetch(start, stop), np.uint8)
    for chunk, (offset, length) in zip(chunks, spans, strict=True):
        body = _checked(data[offset - start : offset - start + length], f"chunk {chunk}")
        first, last = max(part.start, chunk * size), min(part.stop, (chunk + 1) * size)
        _decode_chunk(
            array, body, slice(first - chunk * size, last - chunk * size), out[first - part.start : last - part.start]
        )


def encode_values(array: ArrayLayout, values: Sequence[bytes]) -> bytes:
    """The shard of some encoded images, the bytes that zarr would write."""
    parts: list[bytes] = []  # no copies of images: those of a shard are most of what a build holds
    entries, at = [], 0
    for value in values:
        head = _ONE_VALUE + len(value).to_bytes(_LENGTH, "little")
        check = google_crc32c.extend(google_crc32c.value(head), value)
        parts += [head, value, check.to_bytes(_CHECKSUM, "little")]
        entries.append((at, len(head) + len(value) + _CHECKSUM))
        at += entries[-1][1]
    entries += [(_HOLE, _HOLE)] * (array.rows_per_shard - len(entries))
    index = np.array(entries, dtype="<u8").tobytes()
    return b"".join([*parts, index, google_crc32c.value(index).to_bytes(_CHECKSUM, "little")])


def _decode_value(body: np.ndarray) -> bytes:
    data = body.tobytes()
    length = int.from_bytes(data[_LENGTH : 2 * _LENGTH], "little")
    if data[:_LENGTH] != _ONE_VALUE or length != len(data) - 2 * _LENGTH:
        raise ValueError(f"a chunk of {len(data)} bytes is not one image")
    return data[2 * _LENGTH :]


def _decode_chunk(array: ArrayLayout, body: np.ndarray, rows: slice, out: np.ndarray) -> None:
    if array.encoded:
        out[0] = _decode_value(body)
        return
    shape, dtype = array.chunk_shape, np.dtype(array.dtype).newbyteorder("<")
    if not array.packed:
        out[...] = body.view(dtype).reshape(shape)[rows]
        return
    if _content_size(body) != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"a chunk holds {_content_size(body)} bytes, not those of {shape[0]} rows")
    if len(out) == shape[0] and out.flags.c_contiguous:
        zstd.decompress(body, out)  # without a copy
        return
    whole = np.empty(shape, dtype)
    zstd.decompress(body, whole)
    out[...] = whole[rows]


def _checked(data: np.ndarray, what: str) -> np.ndarray:
    """The bytes before a crc32c that fits them."""
    body = data[:-_CHECKSUM]
    if google_crc32c.value(body) != int.from_bytes(data[-_CHECKSUM:].tobytes(), "little"):
        raise ValueError(f"the crc32c of {what} is wrong")
    return body


def _content_size(frame: np.ndarray) -> int:
    """The bytes that a Zstandard frame decompresses to, by its header (RFC 8878, 3.1.1); -1 when it does not say."""
    header = frame[:18].tobytes()
    if len(header) < 6 or header[:4] != b"\x28\xb5\x2f\xfd":
        return -1
    flags = header[4]
    single, width = flags >> 5 & 1, (0, 2, 4, 8)[flags >> 6] or (flags >> 5 & 1)
    start = 5 + (1 - single) + (0, 1, 2, 4)[flags & 3]
    if not width:
        return -1
    return int.from_bytes(header[start : start + width], "little") + (256 if width == 2 else 0)
