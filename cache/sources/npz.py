"""Images and labels in numpy archives.

A file holds `images` (uint8, `[N, H, W]`, `[N, H, W, 3]` or `[N, 3, H, W]`), `labels` (whole numbers, `[N]`) and, if it
likes, `classes` (C texts), and nothing else. Without `classes` the names are '0' to the largest label of that file.
"""

import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from darht.cache.sources.rows import Rows, one_line, rows_to_take, shown
from darht.core.errors import DataError

_KEYS = ("images", "labels", "classes")


def read_npz(root: Path, split: str, limit: int | None) -> Rows:
    """Read one split of an npz source: uint8 `[N, 3, H, W]`; grey images are replicated to three channels.

    A folder holds `train.npz` and `test.npz`. A single file holds one split: test if it is called `test.npz`, train
    under any other name.

    Raises:
        DataError: the file is missing, cut, or holds something else; asking a file for the split it does not hold.
    """
    path = _split_file(root, split)
    arrays = _load_arrays(path)
    images, labels = _nchw(arrays["images"], path), _labels(arrays["labels"], path)
    if len(images) != len(labels):
        raise DataError(f"{path}: images and labels must have one length; got {len(images)} and {len(labels)}")
    take = rows_to_take(limit, len(labels), str(path))
    classes = _class_names(arrays.get("classes"), labels, path)
    return Rows(images[:take], labels[:take], classes)


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


def _load_arrays(path: Path) -> dict[str, NDArray[Any]]:
    try:
        with path.open("rb") as handle:
            if not zipfile.is_zipfile(handle):
                raise DataError(f"{path} is not a whole npz file (a zip archive of arrays); save it again")
            handle.seek(0)
            with np.load(handle, allow_pickle=False) as archive:
                _check_keys(set(archive.files), path)
                arrays = {key: archive[key] for key in archive.files}
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(
            f"cannot read {path}: {one_line(error)}; save it again with numpy.savez and without Python objects"
        ) from error
    foreign = [key for key, array in arrays.items() if not isinstance(array, np.ndarray)]  # numpy returns raw bytes
    if foreign:
        raise DataError(f"{path} must hold arrays; {shown(foreign)} are none; save it again with numpy.savez")
    return arrays


def _check_keys(found: set[str], path: Path) -> None:
    missing = [key for key in ("images", "labels") if key not in found]
    unknown = sorted(found - set(_KEYS))
    if missing or unknown:
        raise DataError(
            f"{path} must hold images, labels and at most classes; missing: {shown(missing) or 'none'}; "
            f"unknown: {shown(unknown) or 'none'}"
        )


def _nchw(images: NDArray[Any], path: Path) -> NDArray[np.uint8]:
    if images.dtype != np.uint8:
        fix = "save it as uint8 in 0..255"
        if images.dtype.kind == "f":
            fix = "if it lies in [0, 1], multiply by 255, round, and save as uint8"
        raise DataError(f"{path}: images must be uint8; got {images.dtype}; {fix}")
    if 0 in images.shape:
        raise DataError(f"{path}: images must not be empty; got {list(images.shape)}")
    if images.ndim == 3:
        return np.repeat(images[:, None], 3, axis=1)
    first, last = images.ndim == 4 and images.shape[1] == 3, images.ndim == 4 and images.shape[3] == 3
    if first == last:
        known = "[N, H, W], [N, H, W, 3] or [N, 3, H, W], and one of them only"
        raise DataError(f"{path}: images must be {known}; got {list(images.shape)}")
    return np.ascontiguousarray(images if first else images.transpose(0, 3, 1, 2))


def _labels(labels: NDArray[Any], path: Path) -> NDArray[np.int64]:
    if labels.ndim != 1 or labels.dtype.kind not in "iu":
        raise DataError(f"{path}: labels must be whole numbers [N]; got {labels.dtype} {list(labels.shape)}")
    wrong = np.flatnonzero((labels < 0) | (labels > np.iinfo(np.int64).max))
    if len(wrong):
        raise DataError(f"{path}: labels must be 0 or more; row {wrong[0]} has {labels[wrong[0]]}")
    return labels.astype(np.int64)


def _class_names(classes: NDArray[Any] | None, labels: NDArray[np.int64], path: Path) -> tuple[str, ...]:
    if classes is None:
        _check_largest(labels, path)
        return tuple(str(label) for label in range(int(labels.max()) + 1))
    if classes.ndim != 1 or classes.dtype.kind != "U":
        raise DataError(f"{path}: classes must be texts [C]; got {classes.dtype} {list(classes.shape)}")
    return tuple(str(name) for name in classes)


def _check_largest(labels: NDArray[np.int64], path: Path) -> None:
    """A label of N or more leaves a class without images: say so before naming millions of classes."""
    if labels.max() >= len(labels):
        raise DataError(
            f"{path}: {len(labels)} rows cannot fill the {int(labels.max()) + 1} classes that label {labels.max()} "
            "implies; number the labels from 0 without gaps"
        )
