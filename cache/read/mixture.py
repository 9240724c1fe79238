"""Batches of several sources: so many rows of each in every batch, and an epoch as long as the rows without a share."""

import bisect
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from darht.cache.format.layout import block_rows, row_blocks
from darht.cache.format.mixture import spans
from darht.cache.read.loader import training_rows
from darht.cache.read.reader import Cache
from darht.cache.read.sampler import Window, epoch_order, steps_in_epoch
from darht.core.errors import ConfigError
from darht.core.keys import derive_seed

_NONE = np.empty(0, dtype=np.int64)


@dataclass(frozen=True)
class Group:
    """Rows that have the same part of every batch.

    Attributes:
        rows: int64, to train on, in order.
        per_batch: how many of them a batch has.
    """

    rows: np.ndarray
    per_batch: int


def training_groups(cache: Cache, batch: int) -> tuple[Group, ...]:
    """The rows to train on: first those of sources without a share, then those of each source with one.

    Raises:
        ConfigError: a batch of `batch` rows is too small for the shares, or no row of a source is left to train on.
    """
    training, data = training_rows(cache), cache.spec.data
    if not data.sources:
        return (Group(training, batch),)
    own = [training[(training >= span.start) & (training < span.stop)] for span in spans(data.sources, data.rows)]
    pairs = list(zip(data.sources, own, strict=True))
    shared = [(source.share, rows) for source, rows in pairs if source.share is not None]
    counts = [max(1, int(share * batch + 0.5)) for share, _ in shared]
    if sum(counts) >= batch:
        raise ConfigError(
            f"batches of {batch} rows do not hold the {len(pairs)} sources of {cache.folder} in their shares, which "
            f"take {sum(counts)}: raise optim.batch_size (batch_size)"
        )
    first = np.concatenate([rows for source, rows in pairs if source.share is None])
    groups = [Group(first, batch - sum(counts)), *map(Group, [rows for _, rows in shared], counts)]
    if not all(len(group.rows) for group in groups):
        raise ConfigError(f"no row of one of the sources of {cache.folder} is left to train on: leave fewer out")
    return tuple(groups)


def feed_groups(cache: Cache, batch: int, rows: np.ndarray | None) -> tuple[Group, ...]:
    """What batches are made of: `rows`, or without them those to train on, of each source its share."""
    return training_groups(cache, batch) if rows is None else (Group(rows, batch),)


def steps_of(groups: Sequence[Group], *, drop_last: bool = True) -> int:
    """Batches of an epoch."""
    return max(1, steps_in_epoch(len(groups[0].rows), groups[0].per_batch, drop_last=drop_last))


def interleave(counts: Sequence[int]) -> np.ndarray:
    """An order of a batch's rows that spreads each group evenly: whoever has a part of it has a part of each.

    Args:
        counts: rows of each group, which lie one group behind the other.

    Returns:
        int64, as many positions as there are rows.
    """
    at = [(np.arange(count) + 0.5) / max(1, count) for count in counts]
    return np.argsort(np.concatenate(at), kind="stable")


def _batches(groups: Sequence[Group], orders: Sequence[np.ndarray], steps: int) -> np.ndarray:
    """The rows of `steps` batches, one after the other; of the first group the last batch may have fewer."""
    found = []
    for step in range(steps):
        cuts = [slice(step * group.per_batch, (step + 1) * group.per_batch) for group in groups]
        parts = [order[cut] for order, cut in zip(orders, cuts, strict=True)]
        found.append(np.concatenate(parts)[interleave([len(part) for part in parts])])
    return np.concatenate(found) if found else _NONE


def _turns(values: np.ndarray, seed: int, start: int) -> Iterator[int]:
    """All values in a random order, then again in another, and so on for ever; from place `start` of that on."""
    for turn in itertools.count(start // len(values)):
        yield from epoch_order(values, seed, turn)[
            start % len(values) if turn == start // len(values) else 0 :
        ].tolist()


def mixed_windows(
    blocks: np.ndarray,
    groups: Sequence[Group],
    *,
    per_window: int,
    seed: int,
    epoch: int,
    drop_last: bool = True,
) -> Iterator[Window]:
    """As `sampler.epoch_windows`, for batches that have rows of several groups.

    Every row of the first group is used at most once in an epoch. Rows of the others come in turn: none comes again,
    over all epochs, before all have come once; where a cache is streamed that holds for the blocks that are read.

    Args:
        blocks: first row and one past the last of every block, int64 `[K, 2]`; each with rows of one group.
        groups: what a batch is made of.
        per_window: blocks of the first group that are read together.
        seed: keys the order.
        epoch: keys it too.
        drop_last: whether only whole batches are used; a last one that is not whole lacks rows of the first group.
    """
    steps = steps_of(groups, drop_last=drop_last)
    seeds = [derive_seed(seed, "share", number) for number in range(len(groups))]
    if per_window >= len(blocks):
        orders = [epoch_order(groups[0].rows, seed, epoch)]
        for group, own in zip(groups[1:], seeds[1:], strict=True):
            count = steps * group.per_batch
            orders.append(np.fromiter(_turns(group.rows, own, epoch * count), np.int64, count))
        order = _batches(groups, orders, steps)
        yield Window(np.arange(len(blocks)), _NONE, np.arange(blocks[-1, 1]), order)
        return
    usable = usable_rows(blocks, groups)
    own_blocks = [np.flatnonzero(counts) for counts in usable]
    turns: list[Iterator[int]] = [iter(())]
    for group, mine, counts, own in zip(groups[1:], own_blocks[1:], usable[1:], seeds[1:], strict=True):
        an_epoch = -(-steps * group.per_batch * len(mine) // int(counts.sum()))  # blocks, on average
        turns.append(_turns(mine, own, epoch * an_epoch))
    shuffled = epoch_order(own_blocks[0], derive_seed(seed, "blocks"), epoch)
    firsts = np.array_split(shuffled, -(-len(shuffled) // per_window))
    yield from _read_windows(blocks, groups, firsts, turns, steps=steps, seed=seed, epoch=epoch)


def _read_windows(
    blocks: np.ndarray,
    groups: Sequence[Group],
    firsts: list[np.ndarray],
    turns: list[Iterator[int]],
    *,
    steps: int,
    seed: int,
    epoch: int,
) -> Iterator[Window]:
    """Windows of the blocks `firsts` of the first group, with as many of the others as their batches need."""
    usable, member = usable_rows(blocks, groups), np.full(blocks[-1, 1], -1)
    for number, group in enumerate(groups):
        member[group.rows] = number
    carried, left = [_NONE for _ in groups], [_NONE for _ in groups]  # positions before, and the rows there
    for number, first in enumerate(firsts):
        whole = (len(left[0]) + int(usable[0][first].sum())) // groups[0].per_batch
        whole = steps if number == len(firsts) - 1 else whole
        steps -= whole
        chosen = first.tolist()
        for k, group in list(enumerate(groups))[1:]:
            there = len(left[k])
            while there < whole * group.per_batch:
                chosen.append(next(turns[k]))
                there += int(usable[k][chosen[-1]])
        rows = np.concatenate([*left, *(np.arange(*blocks[block]) for block in chosen)])
        orders = []
        for k in range(len(groups)):
            at = np.flatnonzero(member[rows] == k)
            orders.append(epoch_order(at, derive_seed(seed, "window", number, k), epoch))
        yield Window(np.array(chosen), np.concatenate(carried), rows, _batches(groups, orders, whole))
        carried = [order[whole * group.per_batch :] for order, group in zip(orders, groups, strict=True)]
        left = [rows[at] for at in carried]


def usable_rows(blocks: np.ndarray, groups: Sequence[Group]) -> list[np.ndarray]:
    """For each group how many of its rows each block has, int64 `[K]`."""
    found = []
    for group in groups:
        before = np.searchsorted(group.rows, blocks)
        found.append(before[:, 1] - before[:, 0])
    return found


def window_room(blocks: np.ndarray, groups: Sequence[Group], per_window: int) -> list[int]:
    """The most rows of each group that a window may hold, whatever is drawn."""
    size = int((blocks[:, 1] - blocks[:, 0]).max())
    room = [per_window * size + groups[0].per_batch - 1]
    batches = room[0] // groups[0].per_batch + 1
    for group, usable in zip(groups[1:], usable_rows(blocks, groups)[1:], strict=True):
        mine, needed = usable > 0, batches * group.per_batch
        counts, others = np.sort(usable[mine]), np.sort(((blocks[:, 1] - blocks[:, 0]) - usable)[mine])[::-1]
        turns, rest = divmod(needed, int(counts.sum()))
        # At worst those blocks come that hold the fewest rows, the same ones at the end of a turn and in the next.
        read = int(np.searchsorted(np.cumsum(np.repeat(counts, 2)), rest)) + 1
        room.append(needed - 1 + size + turns * int(others.sum()) + int(np.repeat(others, 2)[:read].sum()))
    return room


class Room(NamedTuple):
    """What a window may hold.

    Attributes:
        per_window: blocks of the first group that are read together.
        read: the rows that these hold.
        rows: in all, and how many of them may have the views of each further band.
        bytes: of them.
    """

    per_window: int
    read: int
    rows: tuple[int, ...]
    bytes: int


def choose_room(cache: Cache, groups: Sequence[Group], row_bytes: Sequence[int], free: int) -> Room:
    """The largest window of at most `free` bytes, or one of a single block of the first group where none is so small.

    Args:
        cache: opened.
        groups: what a batch is made of.
        row_bytes: of a row, and what the views of each further band add.
        free: bytes.
    """
    size = block_rows(cache.spec.store)
    blocks, batch = row_blocks(cache.spec), sum(group.per_batch for group in groups)
    most = np.count_nonzero(usable_rows(blocks, groups)[0])

    def of(per_window: int) -> Room:
        held = [per_window * size + batch - 1] if len(groups) == 1 else window_room(blocks, groups, per_window)
        having = [
            sum(rows for rows, group in zip(held, groups, strict=True) if int(group.rows[0]) < band.rows)
            for band in cache.spec.bands[1:]
        ]
        rows = (sum(held), *having)
        return Room(per_window, per_window * size, rows, sum(map(math.prod, zip(rows, row_bytes, strict=True))))

    fitting = bisect.bisect_right(range(1, most + 1), free, key=lambda count: of(count).bytes)
    return of(max(1, fitting))
