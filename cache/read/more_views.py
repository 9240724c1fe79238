"""Clean logits of views that only the first rows of a cache have, in memory."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from darht.cache.format.layout import CLEAN_FROM
from darht.cache.format.spec import CacheSpec
from darht.cache.read.reader import Cache


@dataclass(frozen=True)
class MoreViews:
    """Clean logits of views that only the first rows of a cache have; v of them, for m rows.

    Attributes:
        first: the first of these views.
        rows: rows of the cache below this number have them.
        slots: int64 `[n]`, where in `values` those of each row held are; 0 of a row that has none.
        values: float `[m, v, T, C]`.
    """

    first: int
    rows: int
    slots: Tensor
    values: Tensor

    @property
    def stop(self) -> int:
        """One past the last of these views."""
        return self.first + self.values.shape[1]

    def each(self, change: Callable[[Tensor], Tensor]) -> "MoreViews":
        """The same after a change of every tensor."""
        return dataclasses.replace(self, slots=change(self.slots), values=change(self.values))

    def take(self, at: Tensor) -> "MoreViews":
        """Only those of the rows at positions `at`."""
        slots = torch.arange(len(at), device=self.slots.device)
        return dataclasses.replace(self, slots=slots, values=self.values.index_select(0, self.slots[at]))

    def place(self, rows: np.ndarray) -> np.ndarray:
        """Give each of `rows` that has these views a slot, in their order; gives the slots, int64 `[len(rows)]`."""
        there = rows < self.rows
        slots: np.ndarray = np.where(there, np.cumsum(there) - 1, 0)
        self.slots[: len(rows)] = torch.from_numpy(slots)
        return slots

    def fill(self, cache: Cache, teachers: Sequence[str], slot: int, rows: slice) -> None:
        """Read what those of `rows` have that have these views, to `slot` and after it.

        Raises:
            CorruptError: a checksum fails.
        """
        having = slice(rows.start, min(rows.stop, self.rows))
        if having.start < having.stop:
            values = self.values[slot : slot + having.stop - having.start]
            names = [f"logits/{name}/{CLEAN_FROM}{self.first}" for name in teachers]
            cache.read_into({name: values[:, :, t].numpy() for t, name in enumerate(names)}, having)

    def copy_from(self, other: "MoreViews", rows: Tensor, at: Tensor) -> None:
        """Take over what the rows at positions `at` of another set have, whose source indices are `rows`; on a CPU."""
        kept = at[rows[at] < self.rows]
        self.values[: len(kept)] = other.values[other.slots[kept]]


def further_views(spec: CacheSpec, rows: int, teachers: int, having: Sequence[int] | None) -> tuple[MoreViews, ...]:
    """Room for the further views of `rows` rows, of which so many have those of each band; None for all that may."""
    found, C = [], len(spec.data.classes)
    for band, held in zip(spec.bands[1:], having or [min(rows, band.rows) for band in spec.bands[1:]], strict=True):
        values = np.empty((held, band.stop - band.first, teachers, C), dtype=spec.store.logits)
        slots = torch.zeros(rows, dtype=torch.int64)
        found.append(MoreViews(band.first, band.rows, slots, torch.from_numpy(values)))
    return tuple(found)


def look_up(clean: Tensor, further: Sequence[MoreViews], at: Tensor, views: Tensor) -> Tensor:
    """Logits on views of the rows at positions `at`, which are in `clean` or further; a GPU is not waited for."""
    found = clean[at, views.clamp(max=clean.shape[1] - 1)]
    for more in further:
        theirs = more.values[more.slots[at], (views - more.first).clamp(0, more.values.shape[1] - 1)]
        found = torch.where(((views >= more.first) & (views < more.stop))[..., None, None], theirs, found)
    return found
