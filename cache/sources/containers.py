"""Sources whose images lie many in a file: WebDataset tars and Parquet files."""

from collections import Counter
from pathlib import Path

import numpy as np

from darht.cache.sources.folders import TEST, TRAIN
from darht.cache.sources.located import locate_rows
from darht.cache.sources.parquet import SUFFIX, read_labels
from darht.cache.sources.rows import Listing, numbered, read_lines
from darht.cache.sources.tars import read_tars
from darht.core.errors import DataError

_NAMES = "classes.txt"


def list_webdataset(root: Path, split: str, rules: int) -> Listing:
    """The samples of the tars of a split, in the order of names, and inside a tar in its own.

    Class names are the lines of `classes.txt` in the root, or the numbers up to the largest label.

    Raises:
        DataError: there are no tars, one cannot be read, or samples lack image or label.
    """
    paths, passed = _containers(root, split, ".tar"), Counter[str]()
    places, found = read_tars(paths, passed)
    labels = np.concatenate(found)
    names = root / _NAMES
    fix = "write one class name a line, or remove it"
    lines = read_lines(names, fix) if names.is_file() else None
    classes = numbered(labels, paths[0].parent) if lines is None else tuple(line.strip() for line in lines)
    return Listing(locate_rows(root, paths, places), labels, classes, paths[0].parent, passed)


def list_parquet(root: Path, split: str, rules: int) -> Listing:
    """The rows of the Parquet files of a split, in the order of names, and inside a file in its own.

    Raises:
        DataError: there are no files, pyarrow is not installed, or one is not what it should be.
    """
    paths = _containers(root, split, SUFFIX)
    places, found, classes = read_labels(paths)
    labels, where = np.concatenate(found), paths[0].parent
    return Listing(locate_rows(root, paths, places), labels, classes or numbered(labels, where), where, Counter())


def _containers(root: Path, split: str, suffix: str) -> list[Path]:
    """The files of a split: those of a folder of its name, or those of its name in the root or in `data`."""
    names = TRAIN if split == "train" else TEST
    for name in names:
        for folder in (root / name, root, root / "data"):
            found = sorted(folder.glob(f"*{suffix}")) if folder.is_dir() else []
            here = [path for path in found if not path.name.startswith(".")]
            chosen = here if folder.name == name else [path for path in here if name in path.name]
            if chosen:
                return chosen
    raise DataError(
        f"the {split} split needs files *{suffix} in {root / names[0]}, or with '{names[0]}' in their names in {root} "
        f"or {root / 'data'}; there are none"
    )
