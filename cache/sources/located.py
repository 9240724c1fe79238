"""Where encoded images lie: in files of their own, at places inside tars, or in rows of Parquet files.

Only the places are in memory, some 100 bytes for each image; the bytes are read when somebody asks for them.
"""

import os
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from darht.cache.sources.parquet import Tables, is_table
from darht.core.errors import DataError

_HEADER = 512  # bytes of a member's header in a tar, before its data


@dataclass(frozen=True, eq=False)
class Located:
    """The encoded images of a split, in source order; N of them in F files.

    Attributes:
        root: of the source.
        files: paths below `root`, F.
        file: which of them holds an image, int64 `[N]`.
        offset: the image's first byte in it, or in a Parquet file its row, int64 `[N]`.
        size: in bytes, -1 where the file is not there, int64 `[N]`.
        changed: when each file was changed, in ns, int64 `[F]`.
        tables: reads Parquet files.
    """

    root: Path
    files: tuple[str, ...]
    file: NDArray[np.int64]
    offset: NDArray[np.int64]
    size: NDArray[np.int64]
    changed: NDArray[np.int64]
    tables: Tables = field(default_factory=Tables)

    def __len__(self) -> int:
        return len(self.file)

    def take(self, numbers: Sequence[int] | NDArray[np.int64]) -> "Located":
        """Only some of the images; all files are still named."""
        chosen = np.asarray(numbers, dtype=np.int64)
        return replace(self, file=self.file[chosen], offset=self.offset[chosen], size=self.size[chosen])

    def path(self, number: int) -> Path:
        """The file that holds an image."""
        return self.root / self.files[int(self.file[number])]

    def place(self, number: int) -> str:
        """The file below the root, and where in it an image lies, for a person."""
        name, offset = self.files[int(self.file[number])], int(self.offset[number])
        if is_table(name):
            return f"{name}:row {offset}"
        return name if offset == 0 else f"{name}:{_member(self.path(number), offset)}"

    def read(self, number: int) -> bytes:
        """The bytes of an image.

        Raises:
            OSError: the file cannot be read.
            DataError: it is shorter than it was, or holds no bytes there.
        """
        path, offset, size = self.path(number), int(self.offset[number]), int(self.size[number])
        if is_table(path.name):
            return self.tables.read(path, offset)
        with path.open("rb", buffering=0) as file:
            file.seek(offset)
            data = file.read(max(0, size))
        if len(data) < size:
            raise DataError(f"its file was cut since it was listed, {size - len(data)} bytes are missing")
        return data


def _member(path: Path, offset: int) -> str:
    """The name of the member of a tar whose data begin at `offset`, from the header before them."""
    try:
        with path.open("rb") as file:
            file.seek(offset - _HEADER)
            return tarfile.TarInfo.frombuf(file.read(_HEADER), "utf-8", "replace").name
    except (OSError, ValueError, tarfile.TarError):
        return f"byte {offset}"


def locate_files(root: Path, paths: Sequence[Path]) -> Located:
    """Files with an image each."""
    stats = [_stat(path) for path in paths]
    count = len(paths)
    return Located(
        root=root,
        files=tuple(os.path.relpath(path, root) if path.is_relative_to(root) else str(path) for path in paths),
        file=np.arange(count, dtype=np.int64),
        offset=np.zeros(count, dtype=np.int64),
        size=np.array([size for size, _ in stats], dtype=np.int64),
        changed=np.array([changed for _, changed in stats], dtype=np.int64),
    )


def _stat(path: Path) -> tuple[int, int]:
    """Size in bytes and time of change; -1 and 0 of a file that is not there, which reading it will say better."""
    try:
        found = path.stat()
    except OSError:
        return -1, 0
    return found.st_size, found.st_mtime_ns


def locate_rows(root: Path, paths: Sequence[Path], rows: Sequence[NDArray[np.int64]]) -> Located:
    """Images inside of files; `rows` has their offsets and sizes, int64 `[n, 2]`, for each file."""
    every = np.concatenate(rows) if rows else np.empty((0, 2), dtype=np.int64)
    return Located(
        root=root,
        files=tuple(path.relative_to(root).as_posix() for path in paths),
        file=np.repeat(np.arange(len(paths), dtype=np.int64), [len(part) for part in rows]),
        offset=every[:, 0],
        size=every[:, 1],
        changed=np.array([_stat(path)[1] for path in paths], dtype=np.int64),
    )
