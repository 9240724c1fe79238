"""Open a source: as `load.py` loads it, but pixels stay in image files and numpy archives until they are wanted."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from darht.cache.format.mixture import UNLABELLED
from darht.cache.format.resample import centre_boxes, centred, resample_all
from darht.cache.format.spec import PIXEL_RULES
from darht.cache.sources.decode import Decoding
from darht.cache.sources.encoded import EncodedImages, Index, encoded_sha256
from darht.cache.sources.load import (
    OF_FILES,
    FileSource,
    Source,
    check_classes,
    check_official,
    check_side,
    checked_root,
    content_sha256,
    described,
    list_files,
    load_source,
    notes_of,
    pixels_sha256,
    skipped_of,
)
from darht.cache.sources.npz import named, open_npz
from darht.cache.sources.rows import shown
from darht.cache.sources.scan import scan
from darht.core.errors import DataError

_CENTRED = 256  # images that are decoded at once, before they are resized


def open_source(
    name: str,
    root: Path | None,
    split: str,
    *,
    index: Index | None = None,
    rules: int,
    labelled: bool = True,
    classes: tuple[str, ...] | None = None,
    **options: Any,
) -> Source | FileSource:
    """As `load_source`, but images stay in image files and numpy archives; each was looked at once, and can be decoded.

    Args:
        name: one of `SOURCES`.
        root: folder (or file, for npz) of the data; None for digits.
        split: 'train' or 'test'.
        index: of an earlier look; files that did not change since are not read.
        rules: how image files are read and hashed; see `DataSpec`.
        labelled: whether labels are wanted; otherwise all are -1, and neither they nor class names are in the hash.
        classes: that the source must have, though not rows of all of them; a numpy archive without names takes these.
        options: `limit`, `image_size`, `download` and `skip_broken`, as of `load_source`; also `mixed`, whether image
            files may differ in size.

    Raises:
        DataError: as `load_source`; or the classes are others.
    """
    if name == "npz":
        source = _open_npz(root, split, labelled, classes, **options)
    elif name in OF_FILES:
        given = root, labelled, classes is None
        source = _open_files(name, split, given, index=index, rules=rules, **options)
    else:
        options.pop("mixed", None)  # their images have one size
        loaded = load_source(name, root, split, rules=rules, **options)
        if labelled:
            _check_same(loaded.classes, classes, described(name, root, split))
            return loaded
        labels = np.full(len(loaded.labels), UNLABELLED, dtype=np.int64)
        return replace(loaded, labels=labels, classes=(), sha256=content_sha256(loaded.images, labels, ()))
    _check_same(source.classes, classes if labelled else None, described(name, root, split))
    return source


def _open_files(
    name: str,
    split: str,
    given: tuple[Path | None, bool, bool],
    *,
    index: Index | None,
    rules: int,
    **options: Any,
) -> FileSource:
    """`given` are the root, whether labels are wanted, and whether rows of every class must be there."""
    root, labelled, all_there = given
    limit, download = options.pop("limit", None), options.pop("download", False)
    how = Decoding(rules=rules, **options)
    found = checked_root(name, root, split, how, limit=limit, download=download)
    assert found is not None  # what consists of files has a root
    listing = list_files(name, found, split, rules)
    known = None if index is None else (index.scanned, index.match(listing.located, rules))
    done = scan(listing.located, limit, str(listing.where), how, keep=False, known=known)
    images = EncodedImages(listing.located.take(done.kept), done.scanned, how)
    check_official(name, listing, done, images.shape)
    if not labelled:
        listing = listing._replace(labels=np.full_like(listing.labels, UNLABELLED), classes=())
    else:
        labels, where = listing.labels[done.kept], described(name, found, split)
        check_classes(labels, listing.classes, limit, where, all_there=all_there)
    content = images, listing.labels[done.kept], listing.classes
    return FileSource(name, split, *content, _content(*content), notes_of(listing, done), skipped_of(listing, done))


def _open_npz(
    root: Path | None, split: str, labelled: bool, classes: tuple[str, ...] | None, **options: Any
) -> FileSource:
    limit, size = options.get("limit"), options.get("image_size")
    how = Decoding(size, options.get("skip_broken", False))
    found = checked_root("npz", root, split, how, limit=limit, download=options.get("download", False))
    assert found is not None
    images, labels, names = open_npz(found, split, limit, labelled=labelled)
    where = described("npz", found, split)
    check_side(images.shape, size, where)
    if labels is None:
        labels, names = np.full(len(images), UNLABELLED, dtype=np.int64), ()
    else:
        names, labels = names or classes or named(None, labels, images.path), labels[: len(images)]
        check_classes(labels, names, limit, where, all_there=classes is None)
    sha256 = pixels_sha256(images.shape, images.pieces(), labels, names)
    return FileSource("npz", split, images, labels, names, sha256)


def _check_same(found: tuple[str, ...], classes: tuple[str, ...] | None, where: str) -> None:
    if classes is not None and found != classes:
        raise DataError(
            f"{where} has the classes {shown(found)}, the source before it {shown(classes)}; sources of one cache have "
            "the same ones in the same order: use labels: none to leave them out"
        )


def _content(images: EncodedImages, labels: NDArray[np.int64], classes: tuple[str, ...]) -> str:
    if images.how.rules > PIXEL_RULES:
        return encoded_sha256(images.scanned.sha256, labels, classes)
    return pixels_sha256(images.shape, images.pieces(), labels, classes)


def load_centred(size: int, name: str, root: Path | None, split: str, *, rules: int, **options: Any) -> Source:
    """A split as view 0 of resized crops shows it: the centred square of every image at `size` pixels.

    Args:
        size: S.
        name: one of `SOURCES`.
        root: folder (or file, for npz) of the data; None for digits.
        split: 'train' or 'test'.
        rules: how image files are read.
        options: as of `open_source`; images may differ in size.

    Raises:
        DataError: as `load_source`.
    """
    source = open_source(name, root, split, rules=rules, mixed=True, **options)
    images = np.empty((len(source.labels), 3, size, size), dtype=np.uint8)
    for start in range(0, len(images), _CENTRED):
        rows = slice(start, min(start + _CENTRED, len(images)))
        if isinstance(source.images, EncodedImages):
            images[rows] = resample_all(source.images.pixels(rows), centre_boxes(source.images.sizes(rows)), size)
        else:
            images[rows] = centred(source.images[rows], size)
    sha256 = content_sha256(images, source.labels, source.classes)
    return Source(name, split, images, source.labels, source.classes, sha256, source.notes, source.skipped)
