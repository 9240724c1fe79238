"""A local copy of shards behind a URL: fetched whole and once, checked on the way in, shared by all runs of a machine.

A file is named by the sha256 of its bytes, so runs, ranks and caches share what they have in common, and what is there
is right whoever put it there. One process fetches a file while others wait for its lock, which a kill releases; it
appears under its name in one step. Who used a file last is its time of change; when room is needed, the file that was
used longest ago goes first, and never one of the cache that is being read: a cache that does not fit is copied in
part, and the rest of it is streamed.
"""

import contextlib
import errno
import fcntl
import hashlib
import os
import shutil
import threading
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from darht.core.errors import CorruptError, IncompleteError
from darht.core.files import expanded
from darht.core.retry import LOG
from darht.core.storage import LocalStorage
from darht.core.storage_remote import IN_FLIGHT, PIECE, RemoteStorage, piece_pool

_MARGIN = 64 << 20  # bytes of a disk that are left free
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EFBIG)


@dataclass(frozen=True)
class CopySettings:
    """Where copies lie, and how many bytes they may take."""

    folder: Path
    size: int

    def __str__(self) -> str:
        return f"local copy in {self.folder}, up to {self.size / 1e9:.3g} GB"


def default_copy(folder: Path | None = None, size: int | None = None) -> CopySettings:
    """The user's cache folder, and half of what its disk has free besides what is copied already."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    where = expanded(folder or Path(base) / "darht" / "shards")
    if size is None:
        there = next(parent for parent in (where.absolute(), *where.absolute().parents) if parent.is_dir())
        size = (shutil.disk_usage(there).free + sum(used for _, used, _ in _entries(where))) // 2
    return CopySettings(where, size)


class CopiedStorage:
    """A folder behind a URL, of whose files some are read from local copies.

    Attributes:
        remote: where the files come from.
        copies: where they go.
        files: bytes and sha256 of those that are copied, by key.
    """

    def __init__(self, remote: RemoteStorage, copies: CopySettings, files: Mapping[str, tuple[int, str]]) -> None:
        self.remote, self.copies, self.files = remote, copies, dict(files)
        self._begin()

    def _begin(self) -> None:
        self._lock = threading.Lock()
        self._paths: dict[str, Path | None] = {}
        self._fresh: set[str] = set()  # keys of copies that this process has fetched, and so compared
        self._coming: dict[str, Future[Path | None]] = {}
        self._fetchers = ThreadPoolExecutor(IN_FLIGHT, thread_name_prefix="darht-copies")
        self._room = _Room(self.copies, frozenset(sha256 for _, sha256 in self.files.values()))
        self._process, self._local = os.getpid(), LocalStorage(self.copies.folder)

    def __getstate__(self) -> dict[str, Any]:
        return {"remote": self.remote, "copies": self.copies, "files": self.files}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._begin()

    def __str__(self) -> str:
        return str(self.remote)

    def name(self, key: str) -> str:
        """What to call a file in a message."""
        return self.remote.name(key)

    def read(self, key: str, start: int = 0, stop: int | None = None) -> bytes | None:
        """The bytes [start, stop) of a file, or None where there is none."""
        found = self.read_tagged(key, start, stop)
        return None if found is None else found[0]

    def read_tagged(self, key: str, start: int = 0, stop: int | None = None) -> tuple[bytes, str] | None:
        """As `read`; the tag of a copy is its sha256, with a word behind it unless this process has compared it.

        Raises:
            CorruptError: what the server sends is not what was sealed.
            IncompleteError: it has no such file.
        """
        for _ in range(2 if key in self.files else 0):
            if self._copy(key) is None:
                break
            sha256 = self.files[key][1]
            data = self._local.read(f"{sha256[:2]}/{sha256}", start, stop)
            if data is not None:
                return data, sha256 if key in self._fresh else f"{sha256} once"
            self._forget(key)  # another run needed the room
        return self.remote.read_tagged(key, start, stop)

    def prefetch(self, keys: Iterable[str]) -> None:
        """Begin to fetch files that are wanted soon."""
        for key in keys:
            if key in self.files and key not in self._paths:
                self._start(key)

    def drop(self, key: str) -> bool:
        """Remove a copy whose bytes went bad on the disk; whether there was one."""
        path = self._forget(key)
        if path is None:
            return False
        path.unlink(missing_ok=True)
        return True

    def cancel(self) -> None:
        """Begin no file more of those that were wanted soon: a process ends when its threads have nothing to do."""
        with self._lock:
            self._coming = {key: file for key, file in self._coming.items() if not file.cancel()}

    def _forget(self, key: str) -> Path | None:
        self._fresh.discard(key)
        return self._paths.pop(key, None)

    def size(self, key: str) -> int | None:
        """The bytes of a file, or None where there is none."""
        return self.files[key][0] if self._paths.get(key) else self.remote.size(key)

    def modified(self, key: str) -> float | None:
        """When a file was written, in seconds since the epoch, or None where there is none or nobody knows."""
        return self.remote.modified(key)

    def write(self, key: str, data: bytes) -> None:
        """Replace a file at once, at the URL."""
        self.remote.write(key, data)

    def remove(self, key: str) -> None:
        """Remove a file at the URL."""
        self.remote.remove(key)

    def keys(self, prefix: str = "") -> list[str]:
        """Every file under a folder of the place, in order."""
        return self.remote.keys(prefix)

    def is_free(self) -> bool:
        """Whether nothing is there."""
        return self.remote.is_free()

    def _copy(self, key: str) -> Path | None:
        """The copy of a file, fetched when it is not there; None when it cannot be kept."""
        if key in self._paths:
            return self._paths[key]
        while True:
            with contextlib.suppress(CancelledError):  # another reader of this cache has ended
                return self._start(key).result()

    def _start(self, key: str) -> "Future[Path | None]":
        if self._process != os.getpid():
            self._begin()  # threads and locks do not survive a fork
        with self._lock:
            if key not in self._coming:
                self._coming[key] = self._fetchers.submit(self._fetch, key)
            return self._coming[key]

    def _fetch(self, key: str) -> Path | None:
        try:
            path = self._fetched(key)
        except OSError as error:
            if error.errno not in _FULL:
                raise
            self._room.give_up(f"{self.copies.folder}: {error.strerror}")
            path = None
        finally:
            with self._lock:
                self._coming.pop(key, None)
        self._paths[key] = path
        return path

    def _fetched(self, key: str) -> Path | None:
        size, sha256 = self.files[key]
        path = self.copies.folder / sha256[:2] / sha256
        if _is_there(path, size):
            return path
        if self._room.closed:
            return None
        path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(path.with_suffix(".part")) as file:
            if _is_there(path, size):  # another process has fetched it meanwhile
                Path(file.name).unlink(missing_ok=True)
                return path
            if not self._room.make(size):
                Path(file.name).unlink(missing_ok=True)
                return None
            try:
                download(self.remote, key, size, sha256, file)
                Path(file.name).replace(path)
                self._fresh.add(key)
            except BaseException:
                Path(file.name).unlink(missing_ok=True)
                raise
        return path


def download(remote: RemoteStorage, key: str, size: int, sha256: str, file: Any) -> None:
    """Fetch a file in pieces, many at a time, into an open local one, and compare its sha256.

    Raises:
        IncompleteError: it is not there.
        CorruptError: it is not what was sealed.
    """
    for _ in range(2):  # a proxy on the way may have spoilt the first
        file.truncate(size)
        _pieces(remote, key, size, file.fileno())
        file.seek(0)
        if hashlib.file_digest(file, "sha256").hexdigest() == sha256:
            return
    raise CorruptError(
        f"{remote.name(key)} does not have the sha256 that was sealed, and was fetched twice: it was changed there; "
        "run darht-cache verify where it lies"
    )


def _pieces(remote: RemoteStorage, key: str, size: int, descriptor: int) -> None:
    missing = f"{remote.name(key)} is missing: run darht-cache build again, or push it again"

    def take(start: int) -> None:
        part = remote.part(key, start, min(start + PIECE, size))
        if part is None:
            raise IncompleteError(missing)
        os.pwrite(descriptor, part.data, start)

    if not remote.sends_ranges:
        data = remote.read(key)
        if data is None:
            raise IncompleteError(missing)
        os.pwrite(descriptor, data[:size], 0)
    elif size <= PIECE:
        take(0)
    else:
        list(piece_pool(os.getpid()).map(take, range(0, size, PIECE)))


class _Room:
    """The bytes that copies may take, counted now and then: other processes add to them too."""

    def __init__(self, copies: CopySettings, kept: frozenset[str]) -> None:
        self.closed = copies.size <= 0
        self._copies, self._kept = copies, kept
        self._lock, self._free, self._until_count = threading.Lock(), 0, 0

    def make(self, size: int) -> bool:
        """Room for so many bytes, at the cost of files that nobody used for longest; False where there is none."""
        with self._lock:
            if size > min(self._free, self._until_count):
                self._count(size)
            if size > self._free:
                return False
            self._free -= size
            self._until_count -= size
            return True

    def give_up(self, reason: str) -> None:
        """Copy nothing from now on."""
        with self._lock:
            first, self.closed = not self.closed, True
        if first:
            LOG.warning(f"no further local copies ({reason}); what is not copied yet is streamed in every epoch")

    def _count(self, size: int) -> None:
        entries = sorted(_entries(self._copies.folder))
        used = sum(bytes_ for _, bytes_, _ in entries)
        free = min(self._copies.size - used, shutil.disk_usage(self._copies.folder).free - _MARGIN)
        for _, bytes_, path in entries:
            if free >= size:
                break
            if path.stem not in self._kept and _removed(path):
                free += bytes_
        self._free, self._until_count = free, max(size, self._copies.size // 64)


def _is_there(path: Path, size: int) -> bool:
    """Whether a copy is there; it counts as used now."""
    try:
        if path.stat().st_size != size:
            return False
        os.utime(path)
    except OSError:
        return False
    return True


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[Any]:
    """A file that no other process has open so; its lock goes with the process."""
    while True:
        with path.open("a+b") as opened:
            fcntl.flock(opened, fcntl.LOCK_EX)
            try:
                is_current = os.path.samestat(os.fstat(opened.fileno()), path.stat())
            except FileNotFoundError:  # who had it has given the file its name
                is_current = False
            if is_current:
                with path.open("r+b") as file:  # "a" writes at the end alone
                    yield file
                return


def _entries(folder: Path) -> Iterator[tuple[float, int, Path]]:
    """When each copy was used last, its bytes and its path."""
    for path in folder.glob("??/*"):
        with contextlib.suppress(OSError):
            found = path.stat()
            yield found.st_mtime, found.st_size, path


def _removed(path: Path) -> bool:
    """Remove a copy, or a part that a killed process left; not one that is being fetched."""
    try:
        if path.suffix == ".part":
            with path.open("r+b") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()
        else:
            path.unlink()
    except OSError:
        return False
    return True
