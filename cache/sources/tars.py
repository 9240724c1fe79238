"""WebDataset tars of images: of each sample one image file and its label in a `.cls` file, under one key."""

import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import NDArray

from darht.cache.sources.files import SUFFIXES
from darht.cache.sources.rows import one_line, shown
from darht.core.errors import DataError

_LABEL = ".cls"
_LONGEST = 20  # bytes of a label's text
_DIGITS = 18  # of a label; an int64 holds them all


def read_tars(paths: Sequence[Path], passed: Counter[str]) -> tuple[list[NDArray[np.int64]], list[NDArray[np.int64]]]:
    """Of each tar the places of its images, int64 `[n, 2]` (first byte, size), and their labels `[n]`, in its order.

    Members that are neither image nor label are counted in `passed`.

    Raises:
        DataError: a tar cannot be read at a place (it is compressed, or no tar), or samples lack image or label.
    """
    places, labels, problems = list[NDArray[np.int64]](), list[NDArray[np.int64]](), list[str]()
    for path in paths:
        images, found = dict[str, tuple[int, int]](), dict[str, int]()
        for key, suffix, place, label in _members(path, passed):
            if suffix == _LABEL and label is not None:
                found[key] = label
            elif suffix == _LABEL:
                problems.append(f"{path}:{key}{_LABEL} is no whole number of at most {_DIGITS} digits")
            elif key in images:
                problems.append(f"{path}:{key} has two images")
            else:
                images[key] = place
        problems += [f"{path}:{key} has no {_LABEL}" for key in images.keys() - found.keys()]
        problems += [f"{path}:{key} has no image" for key in found.keys() - images.keys()]
        both = [key for key in images if key in found]
        places.append(np.array([images[key] for key in both], dtype=np.int64).reshape(-1, 2))
        labels.append(np.array([found[key] for key in both], dtype=np.int64))
    if problems:
        raise DataError(f"every sample must have an image and its label; {len(problems)} do not: "
                        f"{shown(sorted(problems), 40)}; mend the tars")  # fmt: skip
    return places, labels


def _members(path: Path, passed: Counter[str]) -> Iterator[tuple[str, str, tuple[int, int], int | None]]:
    """Key, suffix, place and, of labels, the number of every member that belongs to a sample."""
    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                archive.members = []  # type: ignore[attr-defined]  # tarfile keeps all it has seen: 1 kB for each image
                name = PurePosixPath(member.name)
                stem, dot, rest = name.name.partition(".")
                suffix = f".{rest.lower()}"
                if not member.isreg() or name.name.startswith(".") or not dot or suffix not in (*SUFFIXES, _LABEL):
                    passed[_kind(member, name)] += not member.isdir()
                    continue
                label = _number(archive, member) if suffix == _LABEL else None
                yield str(name.with_name(stem)), suffix, (member.offset_data, member.size), label
    except (OSError, tarfile.TarError) as error:
        fix = "unpack it if it is compressed, or replace it"
        raise DataError(f"cannot read {path} as a plain tar: {one_line(error)}; {fix}") from error


def _kind(member: tarfile.TarInfo, name: PurePosixPath) -> str:
    if not member.isreg():
        return "link" if member.issym() or member.islnk() else "neither file nor folder"
    return "hidden file" if name.name.startswith(".") else name.suffix.lower() or "file without a suffix"


def _number(archive: tarfile.TarFile, member: tarfile.TarInfo) -> int | None:
    file = archive.extractfile(member)
    text = b"" if file is None or member.size > _LONGEST else file.read().strip()
    return int(text) if text.isdigit() and len(text) <= _DIGITS else None
