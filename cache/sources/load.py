"""Images and labels to distil from: one frozen `Source`, whatever files it came from.

The main path: read the rows of a split (each format has its reader), check the labels, hash the content. The hash
goes into a cache's spec, so it covers what the teachers see: pixels, labels, class names. `load_source` holds all
pixels in memory; `open.py: open_source` leaves those of files and archives there until they are wanted.
"""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from darht.cache.format.spec import PIXEL_RULES
from darht.cache.sources.cifar import read_cifar
from darht.cache.sources.containers import list_parquet, list_webdataset
from darht.cache.sources.decode import CHANGES, Decoding
from darht.cache.sources.files import passed_text
from darht.cache.sources.folders import list_imagefolder
from darht.cache.sources.npz import read_npz
from darht.cache.sources.rows import LazyImages, Listing, Rows, rows_to_take, shown
from darht.cache.sources.scan import Scan, scan
from darht.cache.sources.tiny_imagenet import check_tiny, list_tiny_imagenet
from darht.core.errors import DataError
from darht.core.files import expanded

SOURCES: tuple[str, ...] = ("digits", "cifar10", "cifar100", "tiny-imagenet", "imagefolder", "npz", "webdataset",
                            "parquet")  # fmt: skip
_SPLITS = ("train", "test")
_DOWNLOADABLE = ("cifar10", "cifar100")
OF_FILES = ("imagefolder", "tiny-imagenet", "webdataset", "parquet")  # encoded images, which are read, not loaded
OF_ANY_SIZE = ("imagefolder", "webdataset", "parquet")  # of these, image_size makes one
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


@dataclass(frozen=True, eq=False)
class FileSource:
    """One split of a data set whose images stay in their files; as `Source` otherwise."""

    name: str  # one of SOURCES
    split: str  # 'train' or 'test'
    images: LazyImages  # [N, 3, H, W] by rows
    labels: NDArray[np.int64]  # [N], in [0, C), or -1 everywhere where they are not wanted
    classes: tuple[str, ...]  # C names; none of a source without labels
    sha256: str  # of the files' bytes, labels and class names; under rules 1 and 2 as of `Source`
    notes: tuple[str, ...] = ()
    skipped: tuple[str, ...] = ()


def load_source(
    name: str,
    root: Path | None,
    split: str,
    *,
    limit: int | None = None,
    image_size: int | None = None,
    download: bool = False,
    skip_broken: bool = False,
    rules: int = PIXEL_RULES,
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
    how = Decoding(image_size, skip_broken, rules)
    root = checked_root(name, root, split, how, limit=limit, download=download)
    where = described(name, root, split)
    if name in OF_FILES and root is not None:
        rows = _decoded(name, list_files(name, root, split, rules), limit, how)
    else:
        rows = _read(name, root, split, limit=limit, download=download)
    check_side(rows.images.shape, image_size, where)
    check_classes(rows.labels, rows.classes, limit, where)
    content = rows.images, rows.labels, rows.classes
    return Source(name, split, *content, content_sha256(*content), rows.notes, rows.skipped)


def _decoded(name: str, listing: Listing, limit: int | None, how: Decoding) -> Rows:
    done = scan(listing.located, limit, str(listing.where), how, keep=True)
    assert done.images is not None
    check_official(name, listing, done, done.images.shape)
    return Rows(
        done.images, listing.labels[done.kept], listing.classes, notes_of(listing, done), skipped_of(listing, done)
    )


def check_official(name: str, listing: Listing, done: Scan, shape: tuple[int, ...]) -> None:
    """Raise DataError where Tiny ImageNet's files hold other images than its own."""
    if name == "tiny-imagenet":
        check_tiny(listing.located.path(int(done.kept[0])), *shape[2:])


def notes_of(listing: Listing, done: Scan) -> tuple[str, ...]:
    """What a person should know about files that are not rows, and rows that are not the file's pixels."""
    notes, where = list(listing.notes), listing.where
    for bit, change in sorted(CHANGES.items(), key=lambda one: one[1]):
        if count := int((done.scanned.changes & bit > 0).sum()):
            notes.append(f"{where}: {count} images {change}")
    if done.broken:
        names = shown(listing.located.root / listing.located.place(number) for number in done.broken)
        notes.append(f"{where}: {len(done.broken)} files cannot be decoded and are left out: {names}")
    if listing.passed:
        notes.append(f"{where}{passed_text(listing.passed)}")
    return tuple(notes)


def skipped_of(listing: Listing, done: Scan) -> tuple[str, ...]:
    """The images left out, as paths below the root."""
    return tuple(listing.located.place(number) for number in done.broken)


def list_files(name: str, root: Path, split: str, rules: int) -> Listing:
    """The encoded images of a source of files, before any is read."""
    lists = {"tiny-imagenet": list_tiny_imagenet, "imagefolder": list_imagefolder, "webdataset": list_webdataset,
             "parquet": list_parquet}  # fmt: skip
    return lists[name](root, split, rules)


def described(name: str, root: Path | None, split: str) -> str:
    """A split of a source, for messages."""
    return f"the {split} split of {name}" + ("" if root is None else f" in {root}")


def checked_root(
    name: str, root: Path | None, split: str, how: Decoding, *, limit: int | None, download: bool
) -> Path | None:
    """The root with its ~ resolved; the arguments of `load_source` are checked as far as that goes without reading."""
    _check_arguments(name, root, split, limit, download)
    _check_image_size(name, how.image_size)
    if how.skip_broken and name not in OF_FILES:
        known = f"{', '.join(OF_FILES[:-1])} and {OF_FILES[-1]}"
        raise DataError(f"only {known} have image files to skip; got '{name}'; leave skip_broken out")
    return None if root is None else expanded(root)


def content_sha256(images: NDArray[np.uint8], labels: NDArray[np.int64], classes: tuple[str, ...]) -> str:
    """The sha256 of a source's content, in hexadecimal.

    Hashed are one line of ASCII JSON (shape and class names), the pixels `[N, 3, H, W]` in C order, and the labels as
    little-endian int64.
    """
    return pixels_sha256(images.shape, [images], labels, classes)


def pixels_sha256(
    shape: tuple[int, ...], parts: Iterable[NDArray[np.uint8]], labels: NDArray[np.int64], classes: tuple[str, ...]
) -> str:
    """As `content_sha256`, of pixels that come in parts."""
    header = json.dumps({"classes": classes, "shape": shape}, sort_keys=True, separators=(",", ":"))
    digest = hashlib.sha256(f"{header}\n".encode("ascii"))
    for images in parts:
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


def check_side(shape: tuple[int, ...], image_size: int | None, where: str) -> None:
    """Raise DataError where images `[N, 3, H, W]` have another side than was asked for."""
    height, width = shape[2:]
    if image_size is not None and (height, width) != (image_size, image_size):
        raise DataError(
            f"image_size resizes only an imagefolder; {where} holds images of {width}x{height} pixels; got {image_size}"
        )


def _read(name: str, root: Path | None, split: str, *, limit: int | None, download: bool) -> Rows:
    if root is None:
        return _read_digits(split, limit)
    if name in _DOWNLOADABLE:
        return read_cifar(name, root, split, limit, download)
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


def check_classes(
    labels: NDArray[np.int64], classes: tuple[str, ...], limit: int | None, where: str, *, all_there: bool = True
) -> None:
    """Raise DataError for labels outside of the classes, names that clash, and, if all must be there, empty classes."""
    count = len(classes)
    if len(set(classes)) != count or "" in classes:
        repeated = {name for name in classes if not name or classes.count(name) > 1}
        raise DataError(
            f"class names must be distinct and not empty in {where}; got {shown(map(repr, sorted(repeated)))}"
        )
    wrong = np.flatnonzero((labels < 0) | (labels >= count))
    if len(wrong):
        raise DataError(
            f"labels must lie in 0..{count - 1} ({count} classes) in {where}; row {wrong[0]} has "
            f"{labels[wrong[0]]}; rows out of range: {len(wrong)}; mend the labels, or name all classes"
        )
    empty = np.flatnonzero(np.bincount(labels, minlength=count) == 0)
    if len(empty) and all_there:
        named = shown(f"class {label} ({classes[label]})" for label in empty)
        fix = "add images, or leave the class out"
        if limit is not None:
            fix = f"raise limit (first {limit} rows), or leave it out"
        raise DataError(f"{named} {'has' if len(empty) == 1 else 'have'} no images in {where}; {fix}")
