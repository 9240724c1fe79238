"""Images that stay encoded until somebody wants their pixels, and the index that spares reading them all again."""

import functools
import hashlib
import io
import json
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from darht.cache.format.images import encode_png, is_plain
from darht.cache.sources.decode import Decoding, decode, quiet
from darht.cache.sources.located import Located
from darht.cache.sources.rows import LazyImages, one_line
from darht.cache.sources.scan import THREADS, Scanned
from darht.core.errors import DataError
from darht.core.memory import share_one_heap

T = TypeVar("T")
_PART = 8  # images that a thread decodes in one go
_HASHED = 256  # images in memory while pixels are hashed
_PLACES = ("file", "offset", "size", "changed")
_PLACE = 1 << 40  # bytes in a file, at most; with the file's number one number says where an image lies


@dataclass(frozen=True, eq=False)
class EncodedImages(LazyImages):
    """The images of a split: `images[rows]` reads and decodes them, for a slice or an array of rows.

    What was read is compared with its sha256 first, so pixels are always those of the index.

    Attributes:
        located: where each row lies.
        scanned: what is known of each.
        how: they become pixels.
    """

    located: Located
    scanned: Scanned
    how: Decoding

    def __len__(self) -> int:
        return len(self.located)

    @functools.cached_property
    def shape(self) -> tuple[int, ...]:
        """`[N, 3, H, W]` as of an array; `[N, 3]` where images differ in size."""
        sizes = self.sizes(slice(None))
        return (len(self), 3, *sizes[0].tolist()) if (sizes == sizes[0]).all() else (len(self), 3)

    def sizes(self, rows: slice) -> NDArray[np.int32]:
        """Height and width of some images as they are decoded, int32 `[n, 2]`."""
        found, side = self.scanned.size[rows], self.how.image_size
        return found if side is None else np.full_like(found, side)

    def __getitem__(self, rows: slice | NDArray[np.int64]) -> NDArray[np.uint8]:
        """Pixels, uint8 `[n, 3, H, W]`, decoded by threads.

        Raises:
            DataError: a file is not what it was.
        """
        numbers = np.arange(*rows.indices(len(self))) if isinstance(rows, slice) else rows
        images = np.empty((len(numbers), *self.shape[1:]), dtype=np.uint8)

        def fill(at: int) -> None:
            images[at] = self.decode(int(numbers[at])).transpose(2, 0, 1)

        in_threads(fill, len(numbers))
        return images

    def pieces(self) -> Iterator[NDArray[np.uint8]]:
        """All pixels, some hundred images at a time."""
        for start in range(0, len(self), _HASHED):
            yield self[start : start + _HASHED]

    def pixels(self, rows: slice) -> list[NDArray[np.uint8]]:
        """Pixels of images that may differ in size, each uint8 `[3, H, W]`, decoded by threads.

        Raises:
            DataError: a file is not what it was.
        """
        numbers = range(len(self))[rows]
        return in_threads(lambda at: self.decode(numbers[at]).transpose(2, 0, 1), len(numbers))

    def stored(self, rows: slice, kind: Literal["jpeg", "png"]) -> list[bytes]:
        """What a cache keeps of rows: the bytes of files of that kind that need no change, else their pixels as PNG.

        Raises:
            DataError: a file is not what it was.
        """
        numbers = range(len(self))[rows]

        def one(at: int) -> bytes:
            row = numbers[at]
            if self.how.image_size is None and not self.scanned.changes[row] and is_plain(data := self.read(row), kind):
                return data
            return encode_png(self.decode(row).transpose(2, 0, 1))

        return in_threads(one, len(numbers))

    def decode(self, row: int) -> NDArray[np.uint8]:
        """The pixels of a row, uint8 `[H, W, 3]`.

        Raises:
            DataError: its file is not what it was.
        """
        try:
            return decode(self.read(row), self.how).pixels
        except (DataError, OSError) as error:
            place = self.located.root / self.located.place(row)
            raise DataError(f"{place} cannot be read: {one_line(error)}; bring it back, or build anew") from error

    def read(self, row: int) -> bytes:
        """The bytes of a row's file.

        Raises:
            DataError: they are not those that were indexed.
            OSError: they cannot be read.
        """
        data = self.located.read(row)
        if hashlib.sha256(data).digest() != self.scanned.sha256[row].tobytes():
            raise DataError("its contents changed since it was indexed")
        return data


def in_threads(action: Callable[[int], T], count: int) -> list[T]:
    """What an action gives for 0..count-1, in order."""

    def some(start: int) -> list[T]:
        return [action(at) for at in range(start, min(start + _PART, count))]

    share_one_heap()
    with quiet(), ThreadPoolExecutor(THREADS) as threads:
        return [one for part in threads.map(some, range(0, count, _PART)) for one in part]


def encoded_sha256(sha256: NDArray[np.uint8], labels: NDArray[np.int64], classes: tuple[str, ...]) -> str:
    """The sha256 of the content of a source that is read, in hexadecimal.

    Hashed are one line of ASCII JSON (class names, that images are encoded, and their number), the sha256 of every
    image's bytes `[N, 32]`, and the labels as little-endian int64.
    """
    about = {"classes": classes, "images": "encoded", "rows": len(labels)}
    digest = hashlib.sha256(f"{json.dumps(about, sort_keys=True, separators=(',', ':'))}\n".encode("ascii"))
    digest.update(np.ascontiguousarray(sha256).data)
    digest.update(np.ascontiguousarray(labels, dtype="<i8").data)
    return digest.hexdigest()


@dataclass(frozen=True, eq=False)
class Index:
    """What an earlier scan found, and where: files that did not change since need not be read again.

    Attributes:
        located: of the rows.
        scanned: of the rows.
        rules: they were read under.
    """

    located: Located
    scanned: Scanned
    rules: int

    def match(self, located: Located, rules: int) -> NDArray[np.int64]:
        """For each image its row here, or -1: the file has the same name, size and time of change."""
        if rules != self.rules or not len(self.located):
            return np.full(len(located), -1, dtype=np.int64)
        numbers = {name: number for number, name in enumerate(self.located.files)}
        there = np.array([numbers.get(name, -1) for name in located.files], dtype=np.int64)
        same = (there >= 0) & (located.changed == self.located.changed[there]) & (located.changed > 0)
        own = self.located.file * _PLACE + self.located.offset
        order = np.argsort(own, kind="stable")
        wanted = there[located.file] * _PLACE + located.offset
        found = order[np.searchsorted(own, wanted, sorter=order).clip(max=len(own) - 1)]
        fits = same[located.file] & (own[found] == wanted) & (self.located.size[found] == located.size)
        return np.where(fits, found, -1)


def index_key(source: int) -> str:
    """Where the index of a cache's first, second, ... source lies in it."""
    return f"source-index-{source}.npz" if source else "source-index.npz"


def write_index(images: EncodedImages) -> bytes:
    """An index as a file."""
    located, scanned, file = images.located, images.scanned, io.BytesIO()
    arrays = {f"place_{name}": getattr(located, name) for name in _PLACES}
    arrays |= {f"image_{name}": value for name, value in vars(scanned).items()}
    names = np.frombuffer("\0".join(located.files).encode("utf-8", "surrogateescape"), np.uint8)
    np.savez_compressed(file, names=names, rules=np.array(images.how.rules), allow_pickle=False, **arrays)
    return file.getvalue()


def read_index(data: bytes | None, root: Path | None) -> Index | None:
    """The index in a file, or None where there is none that can be read: then all images are looked at again."""
    if data is None or root is None:
        return None
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as file:
            arrays: dict[str, Any] = dict(file)
        names = tuple(arrays["names"].tobytes().decode("utf-8", "surrogateescape").split("\0"))
        located = Located(root, names, *(arrays[f"place_{name}"] for name in _PLACES))
        scanned = Scanned(*(arrays[f"image_{name}"] for name in ("sha256", "size", "changes")))
        return Index(located, scanned, int(arrays["rules"]))
    except (ValueError, OSError, KeyError, zipfile.BadZipFile, EOFError):
        return None
