"""What every reader of a source returns, and the few rules that all readers share."""

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from darht.core.errors import DataError

if TYPE_CHECKING:
    from darht.cache.sources.located import Located


class LazyImages(ABC):
    """Images that are read when they are wanted: `images[rows]` gives uint8 `[n, 3, H, W]`."""

    @abstractmethod
    def __len__(self) -> int:
        """N."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]:
        """`[N, 3, H, W]`, as of an array; `[N, 3]` where images differ in size."""

    @abstractmethod
    def __getitem__(self, rows: slice | NDArray[np.int64]) -> NDArray[np.uint8]:
        """Pixels of some rows, for a slice or an array of row numbers."""

    @abstractmethod
    def pieces(self) -> Iterator[NDArray[np.uint8]]:
        """All rows in order, some hundred at a time."""


class Rows(NamedTuple):
    """The rows of one split, in source order."""

    images: NDArray[np.uint8]  # [N, 3, H, W]
    labels: NDArray[np.int64]  # [N]
    classes: tuple[str, ...]  # C names
    notes: tuple[str, ...] = ()  # sentences on what was passed over or changed
    skipped: tuple[str, ...] = ()  # files left out because they cannot be decoded, below the root


def numbered(labels: NDArray[np.int64], where: Path) -> tuple[str, ...]:
    """Class names that are the numbers up to the largest label.

    Raises:
        DataError: a label that leaves classes without images; said before millions of them are named.
    """
    most = int(labels.max(initial=-1))
    if most >= len(labels):
        raise DataError(
            f"{where}: {len(labels)} rows cannot fill the {most + 1} classes that label {most} implies; number the "
            "labels from 0 without gaps"
        )
    return tuple(str(label) for label in range(most + 1))


class Listing(NamedTuple):
    """The encoded images of a split before any is read, in source order.

    Attributes:
        located: where they lie.
        labels: int64 `[N]`.
        classes: C names.
        where: the folder, for messages.
        passed: what lies beside them and is not read, by kind.
        notes: sentences on what was passed over.
    """

    located: "Located"
    labels: NDArray[np.int64]
    classes: tuple[str, ...]
    where: Path
    passed: Counter[str]
    notes: tuple[str, ...] = ()


def rows_to_take(limit: int | None, available: int, where: str) -> int:
    """How many of the `available` rows a limit asks for; None asks for all.

    Raises:
        DataError: there are no rows, or fewer than the limit.
    """
    if available < 1:
        raise DataError(f"{where} holds no rows; at least 1 is needed")
    if limit is not None and limit > available:
        raise DataError(f"limit must be at most the number of rows; got {limit} > {available} rows in {where}")
    return available if limit is None else limit


def read_lines(path: Path, remedy: str) -> list[str]:
    """The lines of a UTF-8 text file that are not blank.

    Raises:
        DataError: the file is missing or is not text; the message ends with `remedy`.
    """
    try:
        return [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {path} as text: {one_line(error)}; {remedy}") from error


def one_line(error: BaseException) -> str:
    """The reason an error gives, on one line and without the path that our own message names already."""
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(reason.split()) or type(error).__name__


def shown(items: Iterable[object], most: int = 5) -> str:
    """The first few items, and how many more there are."""
    texts = [str(item) for item in items]
    more = f" and {len(texts) - most} more" if len(texts) > most else ""
    return ", ".join(texts[:most]) + more
