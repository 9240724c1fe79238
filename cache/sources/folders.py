"""Sources made of a folder for each class, read as torchvision's ImageFolder and timm read them.

Pixels are what Pillow decodes, as 8-bit RGB: grey is replicated, EXIF orientation is applied, and transparent pixels
are laid on black. Specs of rules 1 were read with neither of the last two, and without nested folders.
"""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from darht.cache.sources.files import class_folders, image_files, listing, passed_text, suffixes
from darht.cache.sources.located import locate_files
from darht.cache.sources.rows import Listing, shown
from darht.core.errors import DataError

TRAIN, TEST = ("train",), ("test", "val", "valid", "validation")


def list_imagefolder(root: Path, split: str, rules: int) -> Listing:
    """The files `root/SPLIT/CLASS/.../IMAGE`, sorted by class name, folder and file name.

    SPLIT is `train`, or for the test split the first of `test`, `val`, `valid` and `validation` that has folders of the
    classes (a `test` without labels is not it). The class folders of `train` give the labels of both splits.

    Raises:
        DataError: a folder is missing or empty, or the splits differ in classes.
    """
    passed: Counter[str] = Counter()
    train, ignored = _split_folder(root, TRAIN), Counter[str]()
    classes = class_folders(train, rules, passed if split == "train" else ignored)
    folder, notes = (train, ()) if split == "train" else _test_folder(root, classes)
    if folder != train:
        differing = sorted(set(classes) ^ set(class_folders(folder, rules, passed)))
        if differing:
            raise DataError(f"{folder} and {train} must have the same class folders; only one has: {shown(differing)}")
    files = [image_files(folder / name, rules, passed) for name in classes]
    empty = [str(folder / name) for name, found in zip(classes, files, strict=True) if not found]
    if empty:
        raise DataError(
            f"every class folder must hold images ({', '.join(suffixes(rules))}); none in {shown(empty)}; "
            f"add images, or remove the folder from both splits{passed_text(passed)}"
        )
    paths = [path for found in files for path in found]
    labels = np.repeat(np.arange(len(classes), dtype=np.int64), [len(found) for found in files])
    return Listing(locate_files(root, paths), labels, classes, folder, passed, notes)


def _split_folder(root: Path, names: Sequence[str]) -> Path:
    for name in names:
        if (root / name).is_dir():
            return root / name
    raise DataError(
        f"imagefolder needs the folder {' or '.join(str(root / name) for name in names)}, which is not there; "
        "put images in CLASS folders there"
    )


def _test_folder(root: Path, classes: Sequence[str]) -> tuple[Path, tuple[str, ...]]:
    """The first folder of test images that has labels, and a note where another was passed over."""
    first = _split_folder(root, TEST)
    for name in TEST[TEST.index(first.name) :]:
        here = {path.name for path in listing(root / name) if path.is_dir()} if (root / name).is_dir() else set()
        if here & set(classes):
            note = f"{first} has no folders of the classes, so no labels: {root / name} is the test split"
            return root / name, () if root / name == first else (note,)
    return first, ()
