"""An array inside of a numpy archive, read by rows and never whole.

What `numpy.savez` wrote lies in the file as it is, and is mapped into memory. What `numpy.savez_compressed` wrote is
decompressed from its beginning up to the rows that are wanted, and from there on for the rows after them.
"""

import struct
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

_LOCAL = 30  # bytes of a local header of a zip before the member's name, whose length and that of the rest end it


class ImageMember:
    """One array of an archive.

    Attributes:
        shape: of the whole array.
        dtype: of its values.
    """

    def __init__(self, path: Path, info: zipfile.ZipInfo) -> None:
        self._path, self._info = path, info
        with zipfile.ZipFile(path) as archive, archive.open(info) as file:
            self.shape, self._fortran, self.dtype = _read_header(file)
            self._header = file.tell()
        self._lock = threading.Lock()
        self._stream: tuple[zipfile.ZipFile, IO[bytes], int] | None = None  # where it stands, in rows
        self._mapped: NDArray[Any] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Without open files, which another process opens for itself."""
        return {key: value for key, value in vars(self).items() if key != "_lock"} | {"_stream": None, "_mapped": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.Lock())

    def read(self, rows: NDArray[np.int64]) -> NDArray[Any]:
        """Some rows, in the order in which they are named.

        Raises:
            OSError, EOFError, ValueError, zipfile.BadZipFile, zlib.error: the file is damaged, or not what it was.
        """
        if not len(rows):
            return np.empty((0, *self.shape[1:]), dtype=self.dtype)
        with self._lock:
            if self._info.compress_type == zipfile.ZIP_STORED or self._fortran:
                return np.asarray(self._map()[rows])
            wanted, places = np.unique(rows, return_inverse=True)
            runs = np.split(
                wanted, np.flatnonzero(np.diff(wanted) > 1) + 1
            )  # of neighbours; what lies between is passed
            return np.concatenate([self._decompress(int(run[0]), int(run[-1]) + 1) for run in runs])[places]

    def pieces(self, size: int) -> Iterator[NDArray[Any]]:
        """All rows in order, `size` at a time; the archive's checksum is compared after the last.

        Raises:
            OSError, EOFError, ValueError, zipfile.BadZipFile, zlib.error: the file is damaged, or not what it was.
        """
        with zipfile.ZipFile(self._path) as archive, archive.open(self._info) as file:
            if self._fortran:
                whole = np.lib.format.read_array(file, allow_pickle=False)
                yield from (whole[start : start + size] for start in range(0, self.shape[0], size))
            else:
                file.read(self._header)  # seeking would switch the checksum off
                for start in range(0, self.shape[0], size):
                    yield self._take(file, min(size, self.shape[0] - start))
            if file.read(1):
                raise ValueError("it holds more than its array")

    def _map(self) -> NDArray[Any]:
        """The array as it lies in the file; one in Fortran's order, compressed, is the only one that is read whole."""
        if self._mapped is None and self._info.compress_type != zipfile.ZIP_STORED:
            with zipfile.ZipFile(self._path) as archive, archive.open(self._info) as file:
                self._mapped = np.lib.format.read_array(file, allow_pickle=False)
        elif self._mapped is None:
            with self._path.open("rb") as file:
                file.seek(self._info.header_offset)
                name, extra = struct.unpack("<HH", file.read(_LOCAL)[-4:])
            start = self._info.header_offset + _LOCAL + name + extra + self._header
            order: Any = "F" if self._fortran else "C"
            self._mapped = np.memmap(self._path, self.dtype, "r", start, self.shape, order)
        assert self._mapped is not None
        return self._mapped

    def _decompress(self, first: int, stop: int) -> NDArray[Any]:
        """Rows `first` to `stop`; the stream stays open behind them."""
        archive, file, at = self._stream or (None, None, 0)
        if archive is None or file is None or at > first:
            if archive is not None:
                archive.close()
            archive = zipfile.ZipFile(self._path)
            file, at = archive.open(self._info), 0
            file.seek(self._header)
        file.seek((first - at) * self._row_bytes, 1)
        self._stream = archive, file, stop
        return self._take(file, stop - first)

    @property
    def _row_bytes(self) -> int:
        return int(np.prod(self.shape[1:])) * self.dtype.itemsize

    def _take(self, file: IO[bytes], rows: int) -> NDArray[Any]:
        data = file.read(rows * self._row_bytes)
        if len(data) < rows * self._row_bytes:
            raise EOFError(f"its array is cut, {rows * self._row_bytes - len(data)} bytes are missing")
        return np.frombuffer(data, dtype=self.dtype).reshape(rows, *self.shape[1:])


def open_images(path: Path, key: str) -> ImageMember:
    """The array `key` of an archive.

    Raises:
        OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile: it cannot be read, or is no array of numbers.
    """
    with zipfile.ZipFile(path) as archive:
        info = archive.getinfo(f"{key}.npy")
    return ImageMember(path, info)


def _read_header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    version = np.lib.format.read_magic(file)
    read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}.get(version)
    if read is None:
        raise ValueError(f"{version} is a version of arrays that is not known")
    shape, fortran, dtype = read(file)
    if dtype.hasobject:
        raise ValueError("Object arrays cannot be loaded when allow_pickle=False")
    return shape, bool(fortran) and len(shape) > 1, dtype
