"""Which files below a class's folder are images, and what lies beside them and is passed over."""

import os
from collections import Counter
from pathlib import Path

from darht.cache.sources.rows import one_line
from darht.core.errors import DataError

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".ppm", ".pgm", ".tif", ".tiff")  # as torchvision's ImageFolder
_SUFFIXES_OF_RULES_1 = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


def suffixes(rules: int) -> tuple[str, ...]:
    """The suffixes of image files under the rules of a spec."""
    return SUFFIXES if rules > 1 else _SUFFIXES_OF_RULES_1


def listing(folder: Path) -> list[Path]:
    """What a folder holds, in the order of names.

    Raises:
        DataError: it cannot be listed.
    """
    try:
        return sorted(folder.iterdir(), key=lambda path: path.name)
    except OSError as error:
        raise DataError(f"cannot list {folder}: {one_line(error)}") from error


def class_folders(folder: Path, rules: int, passed: Counter[str]) -> tuple[str, ...]:
    """The names of the folders in a folder, sorted; what else it holds is counted in `passed`.

    Raises:
        DataError: there are none, or one is a link to nothing.
    """
    names, dangling = [], []
    for path in listing(folder):
        if path.is_dir() and not path.name.startswith("."):
            names.append(path.name)
        elif path.is_symlink() and not path.exists():
            dangling.append(str(path))
        else:
            passed[_kind(path)] += 1
    if dangling and rules > 1:
        raise DataError(f"{dangling[0]} is a link to nothing (such links: {len(dangling)}); mend or remove it")
    if not names:
        raise DataError(f"{folder} must hold one folder for each class; it holds none{passed_text(passed)}")
    return tuple(names)


def image_files(folder: Path, rules: int, passed: Counter[str]) -> list[Path]:
    """The image files of a class, in torchvision's order: those of each folder by name, folders by path.

    Folders inside the class's are searched too (not under rules 1), through links as well, each once. A link to nothing
    whose name is an image's counts as a file: it is a row that is not there. What is not read is counted in `passed`.

    Raises:
        DataError: a folder cannot be listed.
    """
    found: list[Path] = []
    entered = {os.path.realpath(folder)}
    waiting = [folder]
    while waiting:
        inner = []
        for path in listing(waiting.pop()):
            if path.name.startswith("."):
                passed[_kind(path)] += 1
            elif path.is_dir():
                inner.append(path)
            elif path.suffix.lower() in suffixes(rules) and (path.is_file() or (rules > 1 and path.is_symlink())):
                found.append(path)
            else:
                passed[_kind(path)] += 1
        for path in inner:
            if rules > 1 and (real := os.path.realpath(path)) not in entered:
                entered.add(real)
                waiting.append(path)
            else:
                passed["folder" if rules == 1 else "link to a folder that is read already"] += 1
    return sorted(found, key=lambda path: (str(path.parent), path.name))


def _kind(path: Path) -> str:
    if path.name.startswith("."):
        return "hidden folder" if path.is_dir() else "hidden file"
    if path.is_symlink() and not path.exists():
        return "link to nothing"
    if not path.is_file():
        return "neither file nor folder"
    return path.suffix.lower() or "file without a suffix"


def passed_text(passed: Counter[str]) -> str:
    """`; passed over: 12 x .gif, 1 x hidden file`, or nothing."""
    listed = ", ".join(f"{count} x {kind}" for kind, count in sorted(passed.items(), key=lambda one: (-one[1], one[0])))
    return f"; passed over: {listed}" if listed else ""
