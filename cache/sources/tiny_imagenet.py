"""Tiny ImageNet-200, as its archive holds it and as it is commonly rearranged: validation images in class folders."""

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from darht.cache.sources.files import image_files, listing
from darht.cache.sources.located import locate_files
from darht.cache.sources.rows import Listing, read_lines, shown
from darht.core.errors import DataError

_FOLDER = "tiny-imagenet-200"
_REMEDY = f"unpack the official archive {_FOLDER}.zip there"
_BOXES = ".txt"  # CLASS_boxes.txt of the archive; nobody misses it


def list_tiny_imagenet(root: Path, split: str, rules: int) -> Listing:
    """The files of Tiny ImageNet-200, labels numbered by the lines of `wnids.txt`.

    Train rows are sorted by label and then by file name. The test split is the official validation set (the official
    test images have no labels), in the order of `val_annotations.txt`; of validation images in class folders, in the
    order of the numbers in their names, which is the same. Class names are the first names in `words.txt`, or the
    WordNet identifiers where it has none. `root` is the official folder or the one around it.

    Raises:
        DataError: a file is missing, or files and lists disagree.
    """
    base = root / _FOLDER if (root / _FOLDER).is_dir() else root
    if not (base / "wnids.txt").is_file():
        raise DataError(f"tiny-imagenet needs the file {base / 'wnids.txt'}, which is not there; {_REMEDY}")
    wnids = [line.strip() for line in read_lines(base / "wnids.txt", _REMEDY)]
    if len(set(wnids)) != len(wnids):
        raise DataError(f"{base / 'wnids.txt'} must name each class once; {len(wnids) - len(set(wnids))} are repeated")
    passed: Counter[str] = Counter()
    entries = _train(base, wnids, rules, passed) if split == "train" else _val(base, wnids, rules, passed)
    paths, labels = [path for path, _ in entries], np.array([label for _, label in entries], dtype=np.int64)
    del passed[_BOXES]
    return Listing(locate_files(root, paths), labels, _names(base, wnids), base, passed)


def check_tiny(path: Path, height: int, width: int) -> None:
    """Raise DataError unless the images, of which `path` is the first, are of 64x64 pixels."""
    if (height, width) != (64, 64):
        raise DataError(f"{path} must be 64x64 pixels; it is {width}x{height}; {_REMEDY}")


def _class_folders(folder: Path, wnids: Sequence[str]) -> None:
    """Raise DataError unless a folder holds one folder for each class."""
    visible = [path for path in listing(folder) if not path.name.startswith(".")] if folder.is_dir() else []
    present = {path.name for path in visible if path.is_dir()}
    differing = sorted(present ^ set(wnids))
    if differing:
        raise DataError(
            f"{folder} must hold one folder for each line of wnids.txt; {len(present)} folders and {len(wnids)} lines "
            f"differ in {shown(differing)}; {_REMEDY}"
        )


def _train(base: Path, wnids: Sequence[str], rules: int, passed: Counter[str]) -> list[tuple[Path, int]]:
    train = base / "train"
    _class_folders(train, wnids)
    files = {wnid: image_files(_images(train / wnid), rules, passed) for wnid in wnids}
    missing = [wnid for wnid in wnids if not files[wnid]]
    if missing:
        raise DataError(f"{train} must hold CLASS/images for every class; none for {shown(missing)}; {_REMEDY}")
    return [(path, label) for label, wnid in enumerate(wnids) for path in files[wnid]]


def _images(folder: Path) -> Path:
    """Where the images of a class lie: in `images`, or in the folder itself."""
    return folder / "images" if (folder / "images").is_dir() else folder


def _val(base: Path, wnids: Sequence[str], rules: int, passed: Counter[str]) -> list[tuple[Path, int]]:
    val = base / "val"
    if val.is_dir() and any((val / wnid).is_dir() for wnid in wnids):
        return _val_in_class_folders(val, wnids, rules, passed)
    table, images = val / "val_annotations.txt", val / "images"
    lines = [line.split("\t") for line in read_lines(table, _REMEDY)]
    label_of = {wnid: label for label, wnid in enumerate(wnids)}
    wrong = [number for number, cells in enumerate(lines, 1) if len(cells) < 2 or cells[1].strip() not in label_of]
    if wrong:
        raise DataError(f"{table}: lines {shown(wrong)} must give a file and a class of wnids.txt; {_REMEDY}")
    listed = [cells[0].strip() for cells in lines]
    present = [path.name for path in image_files(images, rules, passed)] if images.is_dir() else []
    differing = sorted(set(listed) ^ set(present))
    if differing or len(set(listed)) != len(listed):
        raise DataError(
            f"{table} must list every file of {images} once; {len(listed)} lines and {len(present)} files differ"
            f" in {shown(differing) or 'repeated lines'}; {_REMEDY}"
        )
    return [(images / name, label_of[cells[1].strip()]) for name, cells in zip(listed, lines, strict=True)]


def _val_in_class_folders(val: Path, wnids: Sequence[str], rules: int, passed: Counter[str]) -> list[tuple[Path, int]]:
    """`val/CLASS/IMAGE` or `val/CLASS/images/IMAGE`; an empty `val/images` that moving them left does not matter."""
    left = val / "images"
    if left.is_dir() and (remaining := image_files(left, rules, passed)):
        raise DataError(f"{val} has class folders, and {len(remaining)} images are still in {left}: move them too")
    present = {path.name for path in listing(val) if path.is_dir() and path != left and not path.name.startswith(".")}
    differing = sorted(present ^ set(wnids))
    if differing:
        raise DataError(f"{val} must hold one folder for each line of wnids.txt; they differ in {shown(differing)}; "
                        f"{_REMEDY}")  # fmt: skip
    entries = [
        (path, label) for label, wnid in enumerate(wnids) for path in image_files(_images(val / wnid), rules, passed)
    ]
    return sorted(entries, key=lambda entry: (_numbered(entry[0].name), entry[1]))


def _numbered(name: str) -> list[tuple[int, str]]:
    """Sorts val_10 behind val_9."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def _names(base: Path, wnids: Sequence[str]) -> tuple[str, ...]:
    path = base / "words.txt"
    lines = read_lines(path, _REMEDY) if path.is_file() else []
    words = {wnid: names.split(",")[0].strip() for wnid, _, names in (line.partition("\t") for line in lines)}
    return tuple(words.get(wnid) or wnid for wnid in wnids)
