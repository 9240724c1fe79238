"""Batches of a run, from a cache that lies in memory or is streamed through it.

An epoch is a sequence of windows (`sampler.epoch_windows`): rows that are held together. A cache that fits the budget
is one window, read once. Of another, random blocks are read by threads into one window while the batches of the window
before are used, so two windows are in memory, and nothing else that grows with the cache. Which rows meet in a window
depends on its size and so on the budget, and on nothing else of the machine.
"""

import math
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal, Self, TypeVar

import numpy as np
import torch
from torch import Tensor

from darht.cache.format.layout import block_rows, row_blocks
from darht.cache.read.loader import (
    GIB,
    TrainingSet,
    allocate,
    array_names,
    fill,
    load_training_set,
    needed_bytes,
    reading_threads,
    row_bytes,
)
from darht.cache.read.mixture import Group, choose_room, mixed_windows, steps_of, training_groups
from darht.cache.read.reader import Cache
from darht.cache.read.sampler import Window, epoch_windows
from darht.core.errors import ConfigError

_SCRATCH = 8  # a share of the budget, 1/8, for blocks on their way from the file into a window
_COPIES = 3  # of a block, at worst: as in the file, out of its tar, decoded
T = TypeVar("T")


@dataclass(frozen=True)
class FeedPlan:
    """Where the rows of a cache are while a student is trained on them.

    Attributes:
        kind: `device`: all on the device that trains; `memory`: all in the machine's memory, batches go to the device;
            `streamed`: windows of them in memory.
        device: which trains.
        adversarial: whether the stored perturbations and the teachers' answers to them are needed.
        jacobians: whether the teachers' Jacobians are needed.
        batch: rows of a step.
        needed: bytes of all rows.
        budget: bytes that may be held.
        per_window: blocks of rows that are read together.
        window_rows: the rows that these hold.
        threads: that read.
        logits: whether the teachers' logits are needed.
        room: of a window, when streamed: rows, and how many of them may have the views of each further band.
    """

    kind: Literal["device", "memory", "streamed"]
    device: torch.device
    adversarial: bool
    jacobians: bool
    batch: int
    needed: int
    budget: int
    per_window: int
    window_rows: int
    threads: int
    logits: bool = True
    room: tuple[int, ...] = ()

    def __str__(self) -> str:
        needed, budget = f"{self.needed / GIB:.3g} GiB", f"{self.budget / GIB:.3g} GiB"
        if self.kind == "streamed":
            return f"cache: {needed} do not fit {budget}, streamed in windows of {self.window_rows:,} rows"
        where = f"on {self.device}" if self.kind == "device" and self.device.type != "cpu" else "in memory"
        return f"cache: {needed} of {budget}, resident {where}"


def plan_feed(
    cache: Cache,
    *,
    device: torch.device,
    adversarial: bool,
    batch: int,
    budget_gib: float,
    jacobians: bool = False,
    logits: bool = True,
    rows: np.ndarray | None = None,
) -> FeedPlan:
    """Decide where the rows will be.

    Args:
        cache: opened by `open_cache` or `open_shards`.
        device: which trains.
        adversarial: whether the stored perturbations and the teachers' answers to them are needed.
        batch: rows of a step.
        budget_gib: the most memory that the cache may take.
        jacobians: whether the teachers' Jacobians are needed.
        logits: whether the teachers' logits are needed.
        rows: as of `Feed`.

    Raises:
        ConfigError: the budget does not hold two windows of one block and a batch.
    """
    if not 0 < budget_gib < math.inf:
        raise ConfigError(
            f"the memory must be a number of GiB above 0; got {budget_gib:g}: raise --memory (memory_gib)"
        )
    threads = reading_threads(cache)
    wanted = {"adversarial": adversarial, "jacobians": jacobians, "logits": logits}
    budget, parts = int(budget_gib * GIB), (adversarial, jacobians)
    blocks, size, needed = row_blocks(cache.spec), block_rows(cache.spec.store), needed_bytes(cache, **wanted)
    if needed <= budget:
        kind: Literal["device", "memory"] = "device" if _fits(device, needed) else "memory"
        return FeedPlan(kind, device, *parts, batch, needed, budget, len(blocks), cache.rows, threads, logits)
    held = len(cache.manifest.holdout) * (int(np.prod(cache.spec.data.image_shape)) + 8)
    free = (budget - budget // _SCRATCH - held) // 2
    row = [row_bytes(cache, **wanted, band=band) for band in range(len(cache.spec.bands))]
    room = choose_room(cache, feed_groups(cache, batch, rows), row, free)
    if room.bytes > free:
        least = (2 * room.bytes + held) * _SCRATCH / (_SCRATCH - 1)
        raise ConfigError(
            f"{cache.folder} needs {needed / GIB:.3g} GiB in memory, or {least / GIB:.3g} GiB to be streamed in "
            f"batches of {batch}; the budget is {budget_gib:g} GiB: raise --memory (memory_gib)"
        )
    threads = max(1, min(threads, budget // _SCRATCH // (_COPIES * size * sum(row))))
    read = room.per_window, min(room.read, cache.rows)
    return FeedPlan("streamed", device, *parts, batch, needed, budget, *read, threads, logits, room.rows)


def _fits(device: torch.device, needed: int) -> bool:
    """Half of what a GPU has free is left to the network and its activations."""
    return device.type != "cuda" or needed <= torch.cuda.mem_get_info(device)[0] // 2


def feed_groups(cache: Cache, batch: int, rows: np.ndarray | None) -> tuple[Group, ...]:
    """What batches are made of: `rows`, or without them those to train on, of each source its share."""
    return training_groups(cache, batch) if rows is None else (Group(rows, batch),)


class Feed:
    """The batches of a run, epoch by epoch; a context manager, which ends its threads.

    Attributes:
        groups: what batches are made of: rows to train on, where no others are given.
        training: int64, the rows of the first group, which an epoch goes through once.
        holdout: int64, rows kept for selection.
        steps: batches in an epoch.
    """

    def __init__(
        self,
        cache: Cache,
        plan: FeedPlan,
        *,
        seed: int,
        epochs: int,
        rows: np.ndarray | None = None,
        drop_last: bool = True,
    ) -> None:
        self.cache, self.plan = cache, plan
        self._seed, self._epochs, self._drop_last = seed, epochs, drop_last
        self._blocks = row_blocks(cache.spec)
        self._readers, self._ahead = ThreadPoolExecutor(plan.threads), ThreadPoolExecutor(1)
        self._next: tuple[int, Future[TrainingSet]] | None = None
        wanted = {"adversarial": plan.adversarial, "jacobians": plan.jacobians, "logits": plan.logits}
        if plan.kind == "streamed":
            self._windows = [allocate(cache, plan.room[0], **wanted, having=plan.room[1:]) for _ in range(2)]
        else:
            where = plan.device if plan.kind == "device" else torch.device("cpu")
            budget = plan.budget / GIB
            self._windows = [load_training_set(cache, device=where, budget_gib=budget, **wanted)]
        self.groups = feed_groups(cache, plan.batch, rows)
        self.training, self.holdout = self.groups[0].rows, self._windows[0].holdout
        self.steps = steps_of(self.groups, drop_last=drop_last)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._ahead.shutdown(cancel_futures=True)
        self._readers.shutdown(cancel_futures=True)

    def batches(self, epoch: int) -> Iterator[tuple[TrainingSet, Tensor]]:
        """The batches of an epoch: a set of rows on the device, and the positions `[B]` in it that make a batch.

        The positions are on the CPU, where the shapes of what follows are decided.

        The set may be read until the next batch is asked for. Epochs are asked for one at a time; the next
        one is read ahead.

        Raises:
            IncompleteError, CorruptError: what is read is not what was sealed.
        """
        windows = self._epoch_windows(epoch)
        window, filled = next(windows), self._first(epoch)
        while True:
            data, after = filled.result(), next(windows, None)
            if after is not None:
                filled = self._fill_later(after, data)
            elif epoch + 1 < self._epochs:
                self._next = (epoch + 1, self._start(epoch + 1, data))
            for start in range(0, len(window.order), self.plan.batch):
                yield self._delivered(data, torch.from_numpy(window.order[start : start + self.plan.batch]))
            if after is None:
                return
            window = after

    def fetch(self, rows: np.ndarray) -> tuple[Tensor, Tensor]:
        """Images uint8 `[n, 3, H, W]` and labels int64 `[n]` of any rows, in the machine's memory."""
        if self.plan.kind != "streamed":
            data, at = self._windows[0], torch.from_numpy(rows).to(self._windows[0].images.device)
            return data.images[at].cpu(), data.labels[at].cpu()
        images = torch.empty(len(rows), *self.cache.spec.data.image_shape, dtype=torch.uint8)
        labels = torch.empty(len(rows), dtype=torch.int64)

        def take(block: slice) -> None:
            wanted = np.flatnonzero((rows >= block.start) & (rows < block.stop))
            if len(wanted):
                at, inside = torch.from_numpy(wanted), rows[wanted] - block.start
                images[at] = torch.from_numpy(self.cache.read("image", block)[inside])
                labels[at] = torch.from_numpy(self.cache.read("label", block)[inside]).long()

        self._by_blocks(take)
        return images, labels

    def pixel_counts(self) -> Tensor:
        """How often each of the 256 levels occurs in each channel of the images to train on, int64 `[3, 256]`."""
        trained = np.zeros(self.cache.rows, dtype=bool)
        trained[self.training] = True

        def count(block: slice) -> Tensor:
            if self.plan.kind == "streamed":
                images = torch.from_numpy(self.cache.read("image", block)[trained[block]])
            else:
                kept = torch.from_numpy(trained[block]).to(self._windows[0].images.device)
                images = self._windows[0].images[block][kept]
            return level_counts(images)

        return torch.stack(self._by_blocks(count)).sum(0)

    def _by_blocks(self, action: Callable[[slice], T]) -> list[T]:
        """An action on the rows of every block, by threads that end with it.

        A thread that has computed with torch keeps OpenMP threads of its own. While there are more of these than
        cores, OpenMP no longer spins between two operations, and small ones on the training thread take three times as
        long: so no thread computes that stays.
        """
        with ThreadPoolExecutor(self.plan.threads) as pool:
            return list(pool.map(action, (slice(first, last) for first, last in self._blocks.tolist())))

    def _epoch_windows(self, epoch: int) -> Iterator[Window]:
        if len(self.groups) > 1:
            return mixed_windows(
                self._blocks,
                self.groups,
                per_window=self.plan.per_window,
                seed=self._seed,
                epoch=epoch,
                drop_last=self._drop_last,
            )
        return epoch_windows(
            self._blocks,
            self.training,
            per_window=self.plan.per_window,
            batch=self.plan.batch,
            seed=self._seed,
            epoch=epoch,
            drop_last=self._drop_last,
        )

    def _first(self, epoch: int) -> "Future[TrainingSet]":
        """The first window of an epoch, which is there, or on its way when the epoch before came to its end.

        A run that goes back to an earlier epoch has no use for the one on its way, but must not write beside it.
        """
        started, self._next = self._next, None
        if started is not None and started[0] == epoch:
            return started[1]
        if started is not None:
            started[1].result()
        return self._start(epoch, None)

    def _start(self, epoch: int, before: TrainingSet | None) -> "Future[TrainingSet]":
        if self.plan.kind != "streamed":
            ready: Future[TrainingSet] = Future()
            ready.set_result(self._windows[0])
            return ready
        window = next(self._epoch_windows(epoch))
        return self._fill_later(window, before)

    def _fill_later(self, window: Window, before: TrainingSet | None) -> "Future[TrainingSet]":
        """Fill the set that is not `before`."""
        into = self._windows[1] if before is self._windows[0] else self._windows[0]
        if before is not None:
            into.copy_from(before, torch.from_numpy(window.carried))
        return self._ahead.submit(self._fill, window, into)

    def _fill(self, window: Window, into: TrainingSet) -> TrainingSet:
        blocks, per_shard = self._blocks[window.blocks], self.cache.spec.store.rows_per_shard
        shards = np.unique(blocks[:, 0] // per_shard).tolist()
        arrays = self.cache.arrays
        units = [(name, shard) for name in array_names(into) for shard in shards if shard < arrays[name].shards]
        self.cache.prefetch(array_names(into), shards)
        list(self._readers.map(lambda unit: self.cache.check(*unit), units))
        sizes = blocks[:, 1] - blocks[:, 0]
        starts = len(window.carried) + np.cumsum(sizes) - sizes
        slots = [more.place(window.rows)[starts].tolist() for more in into.more]
        jobs = [
            self._readers.submit(fill, self.cache, into, int(at), slice(int(first), int(last)), [s[k] for s in slots])
            for k, (at, (first, last)) in enumerate(zip(starts, blocks, strict=True))
        ]
        for job in jobs:
            job.result()
        return into

    def _delivered(self, data: TrainingSet, at: Tensor) -> tuple[TrainingSet, Tensor]:
        device = self.plan.device
        if data.images.device.type == device.type:
            return data, at
        return data.take(at).send(device), torch.arange(len(at))


def level_counts(images: Tensor) -> Tensor:
    """How often each of the 256 levels occurs in each channel of uint8 `[n, 3, H, W]`, int64 `[3, 256]`.

    Images as floats would take eight times the memory of the cache.
    """
    return torch.stack([torch.bincount(channel.flatten(), minlength=256) for channel in images.unbind(1)]).cpu()
