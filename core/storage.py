"""Where files lie: a folder of this machine, or anything that obstore or fsspec reaches by a URL.

A place is a tree of whole files with keys such as `commits/label/00000.json`. A write replaces a whole file at once:
on a local disk by rename, in an object store because that is what a PUT does. Other protocols can only be read.
"""

import io
import os
import stat
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from darht.core import hub, storage_fsspec, storage_hub, storage_remote
from darht.core.bounded import cut
from darht.core.errors import ConfigError, DarhtError
from darht.core.files import expanded, is_free, write_atomic
from darht.core.retry import RETRY_FOR

_ABSENT = (FileNotFoundError, NotADirectoryError, IsADirectoryError)  # no such file
_LOOKUPS = 16  # questions to an object store at a time


def _read_all(file: io.FileIO, size: int) -> bytes:
    """A system call may give less than was asked for (2 GiB at most); a file that ends gives what there is."""
    data = file.read(size)
    while len(data) < size and (more := file.read(size - len(data))):
        data += more
    return data


@dataclass(frozen=True)
class LocalStorage:
    """A folder of this machine."""

    folder: Path

    def __str__(self) -> str:
        return str(self.folder)

    def name(self, key: str) -> str:
        """What to call a file in a message."""
        return str(self.folder / key)

    def read(self, key: str, start: int = 0, stop: int | None = None) -> bytes | None:
        """The bytes [start, stop) of a file, or None where there is none."""
        found = self.read_tagged(key, start, stop)
        return None if found is None else found[0]

    def read_tagged(self, key: str, start: int = 0, stop: int | None = None) -> tuple[bytes, str] | None:
        """As `read`, and the file's size, time of change and inode in one string."""
        path = f"{self.folder}/{key}"  # and no questions first: a streamed cache is read in many small pieces
        try:
            with open(path, "rb", buffering=0) as file:  # noqa: PTH123
                file.seek(start)
                found = os.fstat(file.fileno())
                data = file.read() if stop is None else _read_all(file, stop - start)
                return data, f"{found.st_size} {found.st_mtime_ns} {found.st_ino}"
        except _ABSENT:
            return None
        except OSError as error:
            raise DarhtError(f"cannot read {self.name(key)}: {error.strerror}") from error

    def size(self, key: str) -> int | None:
        """The bytes of a file, or None where there is none."""
        found = self._stat(key)
        return None if found is None else found.st_size

    def modified(self, key: str) -> float | None:
        """When a file was written, in seconds since the epoch, or None where there is none."""
        found = self._stat(key)
        return None if found is None else found.st_mtime

    def _stat(self, key: str) -> os.stat_result | None:
        try:
            found = (self.folder / key).stat()
        except _ABSENT:
            return None
        except OSError as error:
            raise DarhtError(f"cannot read {self.name(key)}: {error.strerror}") from error
        return found if stat.S_ISREG(found.st_mode) else None

    def write(self, key: str, data: bytes) -> None:
        """Replace a file at once, and only when all of it is on the disk."""
        write_atomic(self.folder / key, data)

    def remove(self, key: str) -> None:
        """Remove a file; nothing happens where there is none."""
        try:
            (self.folder / key).unlink(missing_ok=True)
        except OSError as error:
            raise DarhtError(f"cannot remove {self.name(key)}: {error.strerror}") from error

    def keys(self, prefix: str = "") -> list[str]:
        """Every file under a folder of the place, in order."""
        found = (self.folder / prefix).rglob("*")
        return sorted(path.relative_to(self.folder).as_posix() for path in found if path.is_file())

    def is_free(self) -> bool:
        """Whether nothing is there but what a killed write leaves."""
        try:
            return is_free(self.folder)
        except OSError as error:
            raise DarhtError(f"cannot list {self.folder}: {error.strerror}") from error


class Readable(Protocol):
    """Files of a folder somewhere."""

    def name(self, key: str) -> str:
        """What to call a file in a message."""

    def read(self, key: str, start: int = 0, stop: int | None = None) -> bytes | None:
        """The bytes [start, stop) of a file, or None where there is none."""


class Storage(Readable, Protocol):
    """A folder somewhere: what `LocalStorage` promises, and the others with it."""

    def read_tagged(self, key: str, start: int = 0, stop: int | None = None) -> tuple[bytes, str] | None:
        """As `read`, and a tag that changes when the file is replaced; empty where nothing tells."""

    def size(self, key: str) -> int | None:
        """The bytes of a file, or None where there is none."""

    def modified(self, key: str) -> float | None:
        """When a file was written, in seconds since the epoch, or None where there is none or nobody knows."""

    def write(self, key: str, data: bytes) -> None:
        """Replace a file at once."""

    def remove(self, key: str) -> None:
        """Remove a file; nothing happens where there is none."""

    def keys(self, prefix: str = "") -> list[str]:
        """Every file under a folder of the place, in order."""

    def is_free(self) -> bool:
        """Whether nothing is there."""


Location = Storage | Path | str
_PIECE = 1 << 20  # bytes of one read while a file is read through; a whole shard may be larger than the memory


class _Pieces(io.RawIOBase):
    """A file of a place, read piece by piece."""

    def __init__(self, where: Readable, key: str, size: int) -> None:
        self._where, self._key, self._size, self._at = where, key, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        return self._at

    def readall(self) -> bytes:
        data = self._where.read(self._key, self._at, self._size) or b"" if self._size > self._at else b""
        self._at += len(data)
        return data

    def readinto(self, buffer: Any) -> int:
        stop = min(self._at + len(buffer), self._size)
        data = self._where.read(self._key, self._at, stop) or b"" if stop > self._at else b""
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


def open_file(where: Readable, key: str, size: int) -> io.BufferedReader:
    """The first `size` bytes of a file as a stream that reads, and can seek, without holding the whole of it."""
    return io.BufferedReader(_Pieces(where, key, size), max(1, min(size, getattr(where, "buffer", _PIECE))))


def open_storage(location: Location, *, retry_for: float = RETRY_FOR) -> Storage:
    """The place that a path, a URL or a place names. Nothing is asked of a server yet, but the hub for a commit.

    Args:
        location: where.
        retry_for: seconds for which a request that fails is tried again.

    Raises:
        ConfigError: a URL that is chained or whose scheme is not among those known, or whose package is not installed.
    """
    if not isinstance(location, Path | str):
        return location
    text = str(location)
    if "://" not in text:
        return LocalStorage(expanded(text))
    if text.startswith("file://"):
        return LocalStorage(Path(text.removeprefix("file://")))
    if text.startswith(hub.SCHEME):
        return storage_hub.open_hub(text, retry_for)
    # Others that fsspec has chain URLs, unpack archives or read lists of further URLs, so that a cache's name alone
    # could do more than read a folder; ftp has no encryption.
    if text.startswith("gcs://"):  # Google's other name for it
        text = "gs://" + text.removeprefix("gcs://")
    scheme, url = text.split("://", 1)[0], text.rstrip("/")
    if "::" not in text and scheme in storage_remote.SCHEMES:
        return storage_remote.RemoteStorage(url, retry_for)
    if "::" not in text and scheme in storage_fsspec.SCHEMES:
        return storage_fsspec.FsspecStorage(url, retry_for)
    known = (*storage_remote.SCHEMES, *storage_fsspec.SCHEMES, "hf", "file")
    raise ConfigError(
        f"{cut(text, 200)} is no location that can be used: a location is a folder or one URL of "
        f"{', '.join(known)}; got {cut(scheme, 60)}://: copy it to one of these first"
    )


Coming = Future[bytes | None]  # of a whole file


def read_together(folder: Storage, keys: Sequence[str]) -> list[Coming]:
    """What `read` gives of whole files that are asked for at once: behind a URL, one round trip.

    Who does not need a file does not ask what became of it: a store may refuse to say that it is not there.
    """
    with ThreadPoolExecutor(len(keys)) as pool:
        return [pool.submit(folder.read, key) for key in keys]


def sizes(folder: Storage, keys: Sequence[str]) -> list[int | None]:
    """`size` of many files, several at a time: behind a URL the times of so many small questions would add up."""
    with ThreadPoolExecutor(_LOOKUPS) as pool:
        return list(pool.map(folder.size, keys))
