"""Files that are whole or absent: write to a temporary neighbour, fsync, rename."""

import contextlib
import hashlib
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from darht.core.errors import CacheError, ConfigError, DarhtError


def write_atomic(path: Path, data: bytes | memoryview) -> None:
    """Replace `path` by `data` so that a reader, or a machine that loses power, sees the old file or the new one.

    Raises:
        DarhtError: the folder cannot be written or the disk is full; what was there before stays.
    """
    with whole_file(path) as file:
        file.write(data)


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write piece by piece, that replaces `path` when the block ends, and never when it fails.

    Raises:
        DarhtError: the folder cannot be written or the disk is full; what was there before stays.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
        try:
            with os.fdopen(descriptor, "w+b") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            Path(temporary).chmod(0o644)
            Path(temporary).replace(path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
        _fsync_folder(path.parent)
    except OSError as error:
        raise DarhtError(
            f"cannot write {path}: {error.strerror}; what was there before is whole: run again once it can be written"
        ) from error


def is_free(folder: Path) -> bool:
    """True for a folder that is absent, or empty but for what `write_atomic` leaves when it is killed.

    Raises:
        CacheError: it is a file.
    """
    if folder.is_file():
        raise CacheError(f"{folder} is a file: choose a new or empty --out folder")
    if not folder.is_dir():
        return not folder.exists()
    return all(path.name.startswith(".") and path.name.endswith(".tmp") for path in folder.iterdir())


def expanded(path: Path | str) -> Path:
    """A path with the home of its user in the place of `~`.

    Raises:
        ConfigError: the machine knows no such user.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise ConfigError(f"{path} names a home that this machine does not know: write the path in full") from error


def user_data_folder() -> Path:
    """Where darht keeps what it knows of this user's machine: below `XDG_DATA_HOME`, or `~/.local/share`.

    Raises:
        DarhtError: the machine knows no home.
    """
    try:
        return Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share") / "darht"
    except RuntimeError as error:
        raise DarhtError("the user has no home folder: set XDG_DATA_HOME") from error


def is_inside(key: str) -> bool:
    """Whether a path with slashes, relative to a folder, stays inside of it on every system."""
    parts = key.split("/")
    return bool(key) and not any(part in ("", ".", "..") or "\\" in part or ":" in part for part in parts)


def is_sha256(text: str) -> bool:
    """Whether a text is a sha256 as darht writes it, in hexadecimal, and so may name a file."""
    return re.fullmatch(r"[0-9a-f]{64}", text) is not None


def _fsync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_file(path: Path) -> str:
    """The sha256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_bytes(data: bytes | memoryview) -> str:
    """The sha256 of bytes in memory, in hexadecimal."""
    return hashlib.sha256(data).hexdigest()
