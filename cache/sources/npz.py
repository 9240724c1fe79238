"""Images and labels in numpy archives.

A file holds `images` (uint8, `[N, H, W]`, `[N, H, W, 3]` or `[N, 3, H, W]`), `labels` (whole numbers, `[N]`) and, if it
likes, `classes` (C texts), and nothing else; `image` and `label`, as public generated sets call them, are the same.
Without `classes` the names are '0' to the largest label of that file. Labels and names are read at once, images when
they are wanted.
"""

import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from darht.cache.sources.npz_member import ImageMember, open_images
from darht.cache.sources.rows import LazyImages, Rows, numbered, one_line, rows_to_take, shown
from darht.core.errors import DataError

_KEYS = {"image": "images", "label": "labels"}  # other names of keys
_KNOWN = ("images", "labels", "classes")
_BROKEN = (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile, zlib.error)
_PIECE = 256  # images in memory while all of them are read


class NpzRows(NamedTuple):
    """One split of an npz source, whose images stay in their file."""

    images: "NpzImages"
    labels: NDArray[np.int64] | None  # of all rows of the file; None where they were not wanted
    classes: tuple[str, ...] | None  # None where the file does not name any


class NpzImages(LazyImages):
    """The images of a file, uint8 `[N, 3, H, W]`: `images[rows]` reads those rows; grey ones have three channels.

    Attributes:
        path: of the file.
    """

    def __init__(self, path: Path, member: ImageMember, rows: int) -> None:
        self.path, self._member, self._rows = path, member, rows

    def __len__(self) -> int:
        return self._rows

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """`[N, 3, H, W]`."""
        shape = self._member.shape
        height, width = shape[1:3] if len(shape) == 3 or shape[3] == 3 else shape[2:4]
        return self._rows, 3, height, width

    def __getitem__(self, rows: slice | NDArray[np.int64]) -> NDArray[np.uint8]:
        """Pixels, uint8 `[n, 3, H, W]`.

        Raises:
            DataError: the file cannot be read, or is not what it was.
        """
        try:
            return _nchw(self._member.read(np.arange(self._rows)[rows]))
        except _BROKEN as error:
            raise DataError(f"cannot read {self.path}: {one_line(error)}; bring it back, or build anew") from error

    def pieces(self) -> Iterator[NDArray[np.uint8]]:
        """All rows, some hundred at a time; the archive's checksum of all its images is compared on the way.

        Raises:
            DataError: the file is damaged.
        """
        left = self._rows
        try:
            for images in self._member.pieces(_PIECE):
                if left:
                    yield _nchw(images[:left])
                left -= min(left, len(images))
        except _BROKEN as error:
            raise _unreadable(self.path, error) from error


def read_npz(root: Path, split: str, limit: int | None) -> Rows:
    """Read one split of an npz source: uint8 `[N, 3, H, W]`; grey images are replicated to three channels.

    A folder holds `train.npz` and `test.npz`. A single file holds one split: test if it is called `test.npz`, train
    under any other name.

    Raises:
        DataError: the file is missing, cut, or holds something else; asking a file for the split it does not hold.
    """
    images, labels, classes = open_npz(root, split, limit)
    assert labels is not None
    whole, at = np.empty(images.shape, dtype=np.uint8), 0
    for piece in images.pieces():
        whole[at : at + len(piece)] = piece
        at += len(piece)
    return Rows(whole, labels[: len(whole)], named(classes, labels, images.path))


def open_npz(root: Path, split: str, limit: int | None, *, labelled: bool = True) -> NpzRows:
    """As `read_npz`, but the images stay in the file; without `labelled` its labels are not looked at.

    Raises:
        DataError: as `read_npz`, but for damage inside the images.
    """
    path = _split_file(root, split)
    try:
        with path.open("rb") as handle:
            if not zipfile.is_zipfile(handle):
                raise DataError(f"{path} is not a whole npz file (a zip archive of arrays); save it again")
            handle.seek(0)
            with np.load(handle, allow_pickle=False) as archive:
                keys = _keys(archive.files, path, labelled)
                wanted = ("labels", "classes") if labelled else ()
                arrays = {name: archive[keys[name]] for name in wanted if name in keys}
        member = open_images(path, keys["images"])
    except _BROKEN as error:
        raise _unreadable(path, error) from error
    foreign = [key for key, array in arrays.items() if not isinstance(array, np.ndarray)]  # numpy returns raw bytes
    if foreign:
        raise DataError(f"{path} must hold arrays; {shown(foreign)} are none; save it again with numpy.savez")
    _check_images(member, path)
    labels = _labels(arrays["labels"], path) if labelled else None
    if labels is not None and member.shape[0] != len(labels):
        raise DataError(f"{path}: images and labels must have one length; got {member.shape[0]} and {len(labels)}")
    take = rows_to_take(limit, member.shape[0], str(path))
    classes = _class_names(arrays.get("classes"), path)
    return NpzRows(NpzImages(path, member, take), labels, classes)


def named(classes: tuple[str, ...] | None, labels: NDArray[np.int64], path: Path) -> tuple[str, ...]:
    """The class names of a file, from its labels where it has none.

    Raises:
        DataError: a label that leaves classes without images.
    """
    if classes is not None:
        return classes
    return numbered(labels, path)


def _unreadable(path: Path, error: BaseException) -> DataError:
    return DataError(
        f"cannot read {path}: {one_line(error)}; save it again with numpy.savez and without Python objects"
    )


def _split_file(root: Path, split: str) -> Path:
    if root.suffix != ".npz" or root.is_dir():
        path = root / f"{split}.npz"
        if not path.is_file():
            raise DataError(
                f"npz needs the file {path}, which is not there; save it with numpy.savez(images=, labels=)"
            )
        return path
    if not root.is_file():
        raise DataError(f"npz needs the file {root}, which is not there; save it with numpy.savez(images=, labels=)")
    held = "test" if root.stem == "test" else "train"
    if held != split:
        raise DataError(
            f"{root} is the {held} split (test.npz is test, any other name is train); split '{split}' was asked for; "
            f"put train.npz and test.npz in one folder and give the folder"
        )
    return root


def _keys(found: list[str], path: Path, labelled: bool) -> dict[str, str]:
    """What the file calls images, labels and classes."""
    keys = {_KEYS.get(key, key): key for key in found}
    missing = [key for key in ("images", "labels") if key not in keys and (labelled or key == "images")]
    unknown = sorted(key for key in found if _KEYS.get(key, key) not in _KNOWN)
    if missing or unknown or len(keys) < len(found):
        raise DataError(
            f"{path} must hold images, labels and at most classes, each once; missing: {shown(missing) or 'none'}; "
            f"unknown: {shown(unknown) or 'none'}"
        )
    return keys


def _check_images(member: ImageMember, path: Path) -> None:
    shape, dtype = member.shape, member.dtype
    if dtype != np.uint8:
        fix = "save it as uint8 in 0..255"
        if dtype.kind == "f":
            fix = "if it lies in [0, 1], multiply by 255, round, and save as uint8"
        raise DataError(f"{path}: images must be uint8; got {dtype}; {fix}")
    if 0 in shape:
        raise DataError(f"{path}: images must not be empty; got {list(shape)}")
    if len(shape) != 3 and (len(shape) != 4 or (shape[1] == 3) == (shape[3] == 3)):
        known = "[N, H, W], [N, H, W, 3] or [N, 3, H, W], and one of them only"
        raise DataError(f"{path}: images must be {known}; got {list(shape)}")


def _nchw(images: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Images of a layout that was checked as `[n, 3, H, W]`."""
    if images.ndim == 3:
        return np.repeat(images[:, None], 3, axis=1)
    return np.ascontiguousarray(images if images.shape[1] == 3 else images.transpose(0, 3, 1, 2))


def _labels(labels: NDArray[Any], path: Path) -> NDArray[np.int64]:
    if labels.ndim != 1 or labels.dtype.kind not in "iu":
        raise DataError(f"{path}: labels must be whole numbers [N]; got {labels.dtype} {list(labels.shape)}")
    wrong = np.flatnonzero((labels < 0) | (labels > np.iinfo(np.int64).max))
    if len(wrong):
        raise DataError(f"{path}: labels must be 0 or more; row {wrong[0]} has {labels[wrong[0]]}")
    return labels.astype(np.int64)


def _class_names(classes: NDArray[Any] | None, path: Path) -> tuple[str, ...] | None:
    if classes is None:
        return None
    if classes.ndim != 1 or classes.dtype.kind != "U":
        raise DataError(f"{path}: classes must be texts [C]; got {classes.dtype} {list(classes.shape)}")
    return tuple(str(name) for name in classes)
