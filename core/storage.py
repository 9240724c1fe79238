"""Where files lie: a folder of this machine, or anything that fsspec reaches by a URL.

A place is a tree of whole files with keys such as `commits/label/00000.json`. A write replaces a whole file at once:
on a local disk by rename, in an object store because that is what a PUT does. Other protocols can only be read.
"""

import functools
import io
import os
import stat
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from darht.core.bounded import cut
from darht.core.errors import ConfigError, DarhtError
from darht.core.files import is_free, write_atomic

_PUT_IS_ATOMIC = ("s3", "s3a", "gs", "gcs", "az", "abfs", "adl", "memory")
_ABSENT = (FileNotFoundError, NotADirectoryError, IsADirectoryError)  # no such file
_TRIES, _FIRST_WAIT = 5, 0.2  # 0.2 + 0.4 + 0.8 + 1.6 s: a busy object store has answered by then, or will not soon
_LOOKUPS = 16  # questions to an object store at a time
T = TypeVar("T")


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
        path = f"{self.folder}/{key}"  # and no questions first: a streamed cache is read in many small pieces
        try:
            with open(path, "rb", buffering=0) as file:  # noqa: PTH123
                file.seek(start)
                return file.read() if stop is None else _read_all(file, stop - start)
        except _ABSENT:
            return None
        except OSError as error:
            raise DarhtError(f"cannot read {self.name(key)}: {error.strerror}") from error

    def size(self, key: str) -> int | None:
        """The bytes of a file, or None where there is none."""
        try:
            found = (self.folder / key).stat()
        except _ABSENT:
            return None
        except OSError as error:
            raise DarhtError(f"cannot read {self.name(key)}: {error.strerror}") from error
        return found.st_size if stat.S_ISREG(found.st_mode) else None

    def modified(self, key: str) -> float | None:
        """When a file was written, in seconds since the epoch, or None where there is none."""
        path = self.folder / key
        return path.stat().st_mtime if path.is_file() else None

    def write(self, key: str, data: bytes) -> None:
        """Replace a file at once, and only when all of it is on the disk."""
        write_atomic(self.folder / key, data)

    def remove(self, key: str) -> None:
        """Remove a file; nothing happens where there is none."""
        (self.folder / key).unlink(missing_ok=True)

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


@dataclass(frozen=True)
class RemoteStorage:
    """A folder behind a URL of fsspec (`s3://`, `memory://`, read-only `http(s)://`, ...).

    Every call is tried five times. Settings and credentials come from where the protocol's package looks for them
    (for S3: `AWS_ENDPOINT_URL`, `AWS_PROFILE` and so on). To HTTP servers goes the token in `DARHT_TOKEN`, where it is
    set, or else what `~/.netrc` has for the host.
    """

    url: str

    def __str__(self) -> str:
        return self.url

    def name(self, key: str) -> str:
        """What to call a file in a message."""
        return f"{self.url}/{key}"

    def read(self, key: str, start: int = 0, stop: int | None = None) -> bytes | None:
        """The bytes [start, stop) of a file, or None where there is none."""
        bounds = {"start": start, "end": stop} if start or stop is not None else {}

        def fetch() -> bytes | None:
            data = bytes(self._system.cat_file(self.name(key), **bounds))
            if stop is not None and len(data) > stop - start:  # a server that knows no ranges sends everything
                return data[start:stop]
            return data

        return self._try("read", key, fetch)

    def size(self, key: str) -> int | None:
        """The bytes of a file, or None where there is none."""
        size = self._try("read", key, lambda: self._system.info(self.name(key))["size"])
        return None if size is None else int(size)

    def modified(self, key: str) -> float | None:
        """When a file was written, in seconds since the epoch, or None where there is none or nobody knows."""

        def ask() -> float | None:
            try:
                return float(self._system.modified(self.name(key)).timestamp())
            except NotImplementedError:
                return None

        return self._try("read", key, ask)

    def write(self, key: str, data: bytes) -> None:
        """Replace a file at once."""
        path, protocol = self.name(key), self.url.split("://", 1)[0]
        if protocol not in _PUT_IS_ATOMIC:
            raise DarhtError(
                f"cannot write {path}: {protocol}:// does not replace files at once; give a folder or an s3:// URL"
            )

        def put() -> bool:
            self._system.pipe_file(path, data)
            return True

        if self._try("write", key, put) is None:
            raise DarhtError(f"cannot write {path}: there is no such bucket or folder; make it first")

    def remove(self, key: str) -> None:
        """Remove a file; nothing happens where there is none."""
        self._try("remove", key, lambda: self._system.rm_file(self.name(key)))

    def keys(self, prefix: str = "") -> list[str]:
        """Every file under a folder of the place, in order."""
        root = str(self._system._strip_protocol(self.url)).rstrip("/")
        found = self._try("list", prefix, lambda: self._system.find(f"{self.url}/{prefix}".rstrip("/"))) or []
        return sorted(str(path).removeprefix(root).lstrip("/") for path in found)

    def is_free(self) -> bool:
        """Whether nothing is there."""
        return not self.keys()

    @property
    def _system(self) -> Any:
        return _file_system(self.url, os.getpid())

    def _try(self, what: str, key: str, action: Callable[[], T]) -> T | None:
        """What `action` gives, None when the file is not there, and an error after the last of several tries."""
        for attempt in range(_TRIES):
            try:
                return action()
            except FileNotFoundError:
                return None
            except PermissionError as error:
                raise DarhtError(f"cannot {what} {self.name(key)}: permission denied ({error})") from error
            except Exception as error:  # every protocol fails in its own classes
                last = error
                if attempt + 1 < _TRIES:
                    time.sleep(_FIRST_WAIT * 2**attempt)
        reason = " ".join(f"{type(last).__name__}: {last}".split())
        raise DarhtError(f"cannot {what} {self.name(key)} after {_TRIES} tries ({reason}); run again later") from last


Storage = LocalStorage | RemoteStorage
Location = Storage | Path | str
# Others of fsspec chain URLs, unpack archives or read lists of further URLs, so that a cache's name alone could do more
# than read a folder; ftp has no encryption.
_PROTOCOLS = ("s3", "s3a", "gs", "gcs", "az", "abfs", "adl", "http", "https", "memory", "file")
_PIECE = 1 << 20  # bytes of one request while a file is read through; a whole shard may be larger than the memory


class _Pieces(io.RawIOBase):
    """A file of a place, read piece by piece."""

    def __init__(self, where: Storage, key: str, size: int) -> None:
        self._where, self._key, self._size, self._at = where, key, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        return self._at

    def readinto(self, buffer: Any) -> int:
        stop = min(self._at + len(buffer), self._size)
        data = self._where.read(self._key, self._at, stop) or b"" if stop > self._at else b""
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


def open_file(where: Storage, key: str, size: int) -> io.BufferedReader:
    """The first `size` bytes of a file as a stream that reads, and can seek, without holding the whole of it."""
    return io.BufferedReader(_Pieces(where, key, size), _PIECE)


def open_storage(location: Location) -> Storage:
    """The place that a path, a URL or a place names.

    Raises:
        ConfigError: a URL that is chained or whose protocol is not among those above, or whose package is not
            installed.
    """
    if isinstance(location, LocalStorage | RemoteStorage):
        return location
    text = str(location)
    if "://" not in text:
        return LocalStorage(Path(text).expanduser())
    if text.startswith("file://"):
        return LocalStorage(Path(text.removeprefix("file://")))
    protocol = text.split("://", 1)[0]
    if protocol not in _PROTOCOLS or "::" in text:
        raise ConfigError(
            f"{cut(text, 200)} is no location that can be used: a location is a folder or one URL of "
            f"{', '.join(_PROTOCOLS)}; got {cut(protocol, 60)}://: copy it to one of these first"
        )
    found = RemoteStorage(text.rstrip("/"))
    _file_system(found.url, os.getpid())
    return found


def sizes(folder: Storage, keys: Sequence[str]) -> list[int | None]:
    """`size` of many files, several at a time: behind a URL the times of so many small questions would add up."""
    with ThreadPoolExecutor(_LOOKUPS) as pool:
        return list(pool.map(folder.size, keys))


def _credentials() -> dict[str, str]:
    token = os.environ.get("DARHT_TOKEN", "").strip()
    return {"Authorization": f"Bearer {token}"} if token else {}


@functools.lru_cache
def _file_system(url: str, process: int) -> Any:
    """One for each process: the threads and connections of another do not survive a fork."""
    import fsspec

    protocol = url.split("://", 1)[0]
    options: dict[str, Any] = {"use_listings_cache": False}
    if protocol in ("http", "https"):
        options["client_kwargs"] = {"trust_env": True, "headers": _credentials()}
    try:
        return fsspec.url_to_fs(url, **options)[0]
    except ImportError as error:
        extra = {"s3": "darht[s3]", "http": "darht[http]", "https": "darht[http]"}.get(protocol)
        fix = f"pip install '{extra}'" if extra else str(error)
        raise ConfigError(f"{protocol}:// URLs need a package that is not installed: {fix}") from error
    except ValueError as error:
        raise ConfigError(f"{url} is no location that can be used: {error}") from error
