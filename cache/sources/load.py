"""Images and labels to distil from: one frozen `Source`, whatever files it came from.

The main path: read the rows of a split (each format has its reader), check the labels, hash the content. The hash
goes into a cache's spec, so it covers what the teachers see (pixels, labels, class names) and not how it was stored.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from darht.cache.format.spec import RULES
from darht.cache.sources.cifar import read_cifar
from darht.cache.sources.decode import Decoding
from darht.cache.sources.folders import read_imagefolder
from darht.cache.sources.npz import read_npz
from darht.cache.sources.rows import Rows, rows_to_take, shown
from darht.cache.sources.tiny_imagenet import read_tiny_imagenet
from darht.core.errors import DataError

SOURCES: tuple[str, ...] = ("digits", "cifar10", "cifar100", "tiny-imagenet", "imagefolder", "npz")
_SPLITS = ("train", "test")
_DOWNLOADABLE = ("cifar10", "cifar100")
OF_FILES = ("imagefolder", "tiny-imagenet")  # a file for each image
_FIXED_SIZES = {"digits": 8, "cifar10": 32, "cifar100": 32, "tiny-imagenet": 64}


@dataclass(frozen=True, eq=False)
class Source:
    """One split of a data set in memory; row i keeps its number i for ever."""

    name: str  # one of SOURCES
    split: str  # 'train' or 'test'
    images: NDArray[np.uint8]  # [N, 3, H, W]
    labels: NDArray[np.int64]  # [N], in [0, C)
    classes: tuple[str, ...]  # C names
    sha256: str  # of shape, pixels, labels and class names
    notes: tuple[str, ...] = ()  # sentences on files that are not rows, and rows that are not a file's own pixels
    skipped: tuple[str, ...] = ()  # files left out because they cannot be decoded, below the root


def load_source(
    name: str,
    root: Path | None,
    split: str,
    *,
    limit: int | None = None,
    image_size: int | None = None,
    download: bool = False,
    skip_broken: bool = False,
    rules: int = RULES,
) -> Source:
    """Load one split of a source.

    Args:
        name: one of `SOURCES`.
        root: folder (or file, for npz) of the data; None for digits, which comes with scikit-learn.
        split: 'train' or 'test'.
        limit: take only the first so many rows; the hash is then that of these rows.
        image_size: side in pixels to resize and cut the images of an imagefolder to; elsewhere it must equal the side
            that the images have.
        download: fetch CIFAR's official archive into `root` when its files are not there.
        skip_broken: leave image files out that cannot be decoded, instead of refusing all.
        rules: how image files are read; those of a cache's spec (`DataSpec`) give its rows again.

    Returns:
        The source: uint8 `[N, 3, H, W]`, labels in [0, C), every class with at least one row.

    Raises:
        DataError: an argument does not fit the source, or a file is missing, cut or wrong.
    """
    _check_arguments(name, root, split, limit, download)
    _check_image_size(name, image_size)
    if skip_broken and name not in OF_FILES:
        raise DataError(f"only {' and '.join(OF_FILES)} have image files to skip; got '{name}'; leave skip_broken out")
    root = None if root is None else root.expanduser()
    rows = _read(name, root, split, limit=limit, download=download, how=Decoding(image_size, skip_broken, rules))
    where = f"the {split} split of {name}" + ("" if root is None else f" in {root}")
    _check_side(rows, image_size, where)
    _check_classes(rows, limit, where)
    content = rows.images, rows.labels, rows.classes
    return Source(name, split, *content, content_sha256(*content), rows.notes, rows.skipped)


def content_sha256(images: NDArray[np.uint8], labels: NDArray[np.int64], classes: tuple[str, ...]) -> str:
    """The sha256 of a source's content, in hexadecimal.

    Hashed are one line of ASCII JSON (shape and class names), the pixels `[N, 3, H, W]` in C order, and the labels as
    little-endian int64.
    """
    header = json.dumps({"classes": classes, "shape": images.shape}, sort_keys=True, separators=(",", ":"))
    digest = hashlib.sha256(f"{header}\n".encode("ascii"))
    digest.update(np.ascontiguousarray(images).data)
    digest.update(np.ascontiguousarray(labels, dtype="<i8").data)
    return digest.hexdigest()


def _check_arguments(name: str, root: Path | None, split: str, limit: int | None, download: bool) -> None:
    if name not in SOURCES:
        raise DataError(f"source must be one of {', '.join(SOURCES)}; got '{name}'")
    if split not in _SPLITS:
        raise DataError(f"split must be one of {', '.join(_SPLITS)}; got '{split}'")
    if limit is not None and limit < 1:
        raise DataError(f"limit must be at least 1 row; got {limit}; leave it out to take all rows")
    if download and name not in _DOWNLOADABLE:
        raise DataError(f"only {' and '.join(_DOWNLOADABLE)} can be downloaded; got '{name}'; leave --download out")
    if name == "digits" and root is not None:
        raise DataError(f"source 'digits' comes with scikit-learn and reads no folder; got {root}; leave root out")
    if name != "digits" and root is None:
        raise DataError(f"source '{name}' reads files; give the folder that holds them as root")


def _check_image_size(name: str, image_size: int | None) -> None:
    """Before anything is read: what the name alone can tell."""
    if image_size is None:
        return
    if image_size < 1:
        raise DataError(f"image_size must be at least 1 pixel; got {image_size}")
    if image_size != _FIXED_SIZES.get(name, image_size):
        raise DataError(
            f"image_size resizes only an imagefolder; {name} is {_FIXED_SIZES[name]} pixels; got {image_size}"
        )


def _check_side(rows: Rows, image_size: int | None, where: str) -> None:
    height, width = rows.images.shape[2:]
    if image_size is not None and (height, width) != (image_size, image_size):
        raise DataError(
            f"image_size resizes only an imagefolder; {where} holds images of {width}x{height} pixels; got {image_size}"
        )


def _read(name: str, root: Path | None, split: str, *, limit: int | None, download: bool, how: Decoding) -> Rows:
    if root is None:
        return _read_digits(split, limit)
    if name in _DOWNLOADABLE:
        return read_cifar(name, root, split, limit, download)
    if name == "tiny-imagenet":
        return read_tiny_imagenet(root, split, limit, how)
    if name == "imagefolder":
        return read_imagefolder(root, split, limit, how)
    return read_npz(root, split, limit)


def _read_digits(split: str, limit: int | None) -> Rows:
    """scikit-learn's 1,797 digits, grey 8x8 in 17 levels: rows with index % 5 == 4 are test (359), the others train."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    is_test = np.arange(len(digits.target)) % 5 == 4
    chosen = np.flatnonzero(is_test if split == "test" else ~is_test)
    chosen = chosen[: rows_to_take(limit, len(chosen), f"the {split} split of digits")]
    grey = np.round(digits.images[chosen] * 255 / 16).astype(np.uint8)
    labels = digits.target[chosen].astype(np.int64)
    return Rows(np.repeat(grey[:, None], 3, axis=1), labels, tuple(str(digit) for digit in range(10)))


def _check_classes(rows: Rows, limit: int | None, where: str) -> None:
    count = len(rows.classes)
    if len(set(rows.classes)) != count or "" in rows.classes:
        repeated = {name for name in rows.classes if not name or rows.classes.count(name) > 1}
        raise DataError(
            f"class names must be distinct and not empty in {where}; got {shown(map(repr, sorted(repeated)))}"
        )
    wrong = np.flatnonzero((rows.labels < 0) | (rows.labels >= count))
    if len(wrong):
        raise DataError(
            f"labels must lie in 0..{count - 1} ({count} classes) in {where}; row {wrong[0]} has "
            f"{rows.labels[wrong[0]]}; rows out of range: {len(wrong)}; mend the labels, or name all classes"
        )
    empty = np.flatnonzero(np.bincount(rows.labels, minlength=count) == 0)
    if len(empty):
        named = shown(f"class {label} ({rows.classes[label]})" for label in empty)
        fix = "add images, or leave the class out"
        if limit is not None:
            fix = f"raise limit (first {limit} rows), or leave it out"
        raise DataError(f"{named} {'has' if len(empty) == 1 else 'have'} no images in {where}; {fix}")
