"""Several sources as one: the rows of each follow those of the one before."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from darht.cache.sources.load import FileSource, Source
from darht.cache.sources.rows import LazyImages
from darht.core.config import fingerprint
from darht.core.errors import DataError

_PIECE = 256  # images of an array that are given out together


class MixedImages(LazyImages):
    """The images of several sources, one behind the other."""

    def __init__(self, parts: Sequence[NDArray[np.uint8] | LazyImages]) -> None:
        self._parts = tuple(parts)
        self._starts = np.cumsum([0, *(len(part) for part in parts)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """`[N, 3, H, W]`."""
        channels, height, width = self._parts[0].shape[1:]
        return len(self), channels, height, width

    def __getitem__(self, rows: slice | NDArray[np.int64]) -> NDArray[np.uint8]:
        """Pixels of some rows, uint8 `[n, 3, H, W]`; each source is asked once for its own."""
        numbers = np.arange(len(self))[rows]
        images = np.empty((len(numbers), *self.shape[1:]), dtype=np.uint8)
        for part, start, stop in zip(self._parts, self._starts[:-1], self._starts[1:], strict=True):
            mine = np.flatnonzero((numbers >= start) & (numbers < stop))
            if len(mine):
                images[mine] = part[numbers[mine] - start]
        return images

    def pieces(self) -> Iterator[NDArray[np.uint8]]:
        """All rows in order, some hundred at a time."""
        for part in self._parts:
            if isinstance(part, LazyImages):
                yield from part.pieces()
            else:
                yield from (part[start : start + _PIECE] for start in range(0, len(part), _PIECE))


@dataclass(frozen=True, eq=False)
class MixedSource(FileSource):
    """Several sources; name and split are those of the first, which also has the class names."""

    parts: tuple[Source | FileSource, ...] = ()


def mix(parts: Sequence[Source | FileSource]) -> MixedSource:
    """Put sources together.

    Raises:
        DataError: their images differ in size.
    """
    first = parts[0]
    if any(len(part.images.shape) == 2 for part in parts):
        raise DataError("images of several sources have one size; give image_size, which resizes those of image files")
    for part in parts:
        if part.images.shape[1:] != first.images.shape[1:]:
            sizes = [f"{one.images.shape[3]}x{one.images.shape[2]}" for one in (part, first)]
            raise DataError(
                f"images of one cache have one size; those of {part.name} have {sizes[0]} pixels, those of "
                f"{first.name} {sizes[1]}"
            )
    return MixedSource(
        name=first.name,
        split=first.split,
        images=MixedImages([part.images for part in parts]),
        labels=np.concatenate([part.labels for part in parts]),
        classes=first.classes,
        sha256=fingerprint([[part.sha256, len(part.labels), bool(part.classes)] for part in parts]),
        notes=tuple(note for part in parts for note in part.notes),
        skipped=tuple(name for part in parts for name in part.skipped),
        parts=tuple(parts),
    )
