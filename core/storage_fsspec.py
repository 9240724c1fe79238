"""Folders behind URLs of schemes that obstore does not know, through fsspec: `memory://`, in which tests write."""

import functools
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from darht.core.errors import ConfigError, DarhtError
from darht.core.retry import RETRY_FOR, TransientError, patiently

SCHEMES = ("memory",)
T = TypeVar("T")


@dataclass(frozen=True)
class FsspecStorage:
    """A folder behind a URL of fsspec.

    Attributes:
        url: of the folder.
        retry_for: seconds for which a call that fails is tried again.
    """

    url: str
    retry_for: float = RETRY_FOR

    def __str__(self) -> str:
        return self.url

    def name(self, key: str) -> str:
        """What to call a file in a message."""
        return f"{self.url}/{key}"

    def read(self, key: str, start: int = 0, stop: int | None = None) -> bytes | None:
        """The bytes [start, stop) of a file, or None where there is none."""
        bounds = {"start": start, "end": stop} if start or stop is not None else {}
        return self._try("read", key, lambda: bytes(self._system.cat_file(self.name(key), **bounds)))

    def read_tagged(self, key: str, start: int = 0, stop: int | None = None) -> tuple[bytes, str] | None:
        """As `read`; fsspec tells nothing that would change with a file's contents, so the tag is empty."""
        data = self.read(key, start, stop)
        return None if data is None else (data, "")

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

        def put() -> bool:
            self._system.pipe_file(self.name(key), data)
            return True

        if self._try("write", key, put) is None:
            raise DarhtError(f"cannot write {self.name(key)}: there is no such bucket or folder; make it first")

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
        """What `action` gives, or None when the file is not there."""

        def once() -> T | None:
            try:
                return action()
            except FileNotFoundError:
                return None
            except DarhtError:
                raise
            except PermissionError as error:
                raise DarhtError(f"cannot {what} {self.name(key)}: permission denied ({error})") from error
            except Exception as error:  # every protocol fails in its own classes
                raise TransientError(" ".join(f"{type(error).__name__}: {error}".split())) from error

        return patiently(once, f"{what} {self.name(key)}", self.url.partition("://")[2], self.retry_for)


@functools.lru_cache
def _file_system(url: str, process: int) -> Any:
    """One for each process: the threads and connections of another do not survive a fork."""
    try:
        import fsspec

        return fsspec.url_to_fs(url, use_listings_cache=False)[0]
    except ImportError as error:
        raise ConfigError(f"{url} needs a package that is not installed: {error}") from error
    except ValueError as error:
        raise ConfigError(f"{url} is no location that can be used: {error}") from error
