"""Batches of a run, from a cache that lies in memory or is streamed through it.

An epoch is a sequence of windows (`sampler.epoch_windows`): rows that are held together. A cache that fits the budget
is one window, read once. Of another, random blocks are read by threads into one window while the batches of the window
before are used, so two windows are in memory, and nothing else that grows with the cache. Which rows meet in a window
depends on its size and so on the budget, and on nothing else of the machine.
"""

import functools
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Literal, Self, TypeVar

import numpy as np
import torch
from torch import Tensor

from darht.cache.format.layout import OFFSETS, row_blocks
from darht.cache.read.draw import choose_attack, draw_views, view_pixels
from darht.cache.read.feed_plan import FeedPlan
from darht.cache.read.loader import GIB, allocate, array_names, fill, load_training_set
from darht.cache.read.mixture import feed_groups, mixed_windows, steps_of
from darht.cache.read.reader import Cache
from darht.cache.read.sampler import Window, epoch_windows
from darht.cache.read.sizes import held_arrays
from darht.cache.read.training_set import TrainingSet

_AHEAD = 2  # batches that are on their way to the device while one is used there
Perturbations = Literal["all", "drawn", "first"]
T = TypeVar("T")


class Feed:
    """The batches of a run, epoch by epoch; a context manager, which ends its threads.

    With `views`, numbers of views among which a batch's own are drawn (`draw_choices`), rows that are sent to the
    device take the logits of these alone along. Of the `perturbations` they take all, or those of the one attack that
    the batch shows in the view that is drawn, with the answers to them, or those of the first view, without answers.

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
        views: Sequence[int] = (),
        perturbations: Perturbations = "all",
    ) -> None:
        self.cache, self.plan, self._views, self._perturbations = cache, plan, tuple(views), perturbations
        self._seed, self._epochs, self._drop_last = seed, epochs, drop_last
        self._blocks = row_blocks(cache.spec)
        self._readers, self._ahead = ThreadPoolExecutor(plan.threads), ThreadPoolExecutor(1)
        self._sender = ThreadPoolExecutor(1)
        self._next: tuple[int, Future[TrainingSet]] | None = None
        wanted = {"adversarial": plan.adversarial, "jacobians": plan.jacobians, "logits": plan.logits != "none"}
        self.groups = feed_groups(cache, plan.batch, rows)
        self.training = self.groups[0].rows
        if plan.kind == "streamed":
            cache.prefetch([OFFSETS] if OFFSETS in cache.arrays else [], [0])  # what `allocate` waits for
            names = [array.name for array in held_arrays(cache, **wanted)]
            cache.prefetch(names, self._shards(next(self._epoch_windows(0))))  # those of a resumed run are there
            wanted["one_view"] = plan.logits == "drawn" and cache.spec.store.by_view
            self._windows = [allocate(cache, plan.room[0], having=plan.room[1:], **wanted) for _ in range(2)]
        else:
            where = plan.device if plan.kind == "device" else torch.device("cpu")
            budget = plan.budget / GIB
            self._windows = [load_training_set(cache, device=where, budget_gib=budget, **wanted)]
        self.holdout = self._windows[0].holdout
        self.steps = steps_of(self.groups, drop_last=drop_last)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._sender.shutdown(cancel_futures=True)
        self._ahead.shutdown(cancel_futures=True)
        self._readers.shutdown(cancel_futures=True)
        self.cache.stop_prefetch()

    def batches(self, epoch: int) -> Iterator[tuple[TrainingSet, Tensor]]:
        """The batches of an epoch: a set of rows on the device, and the positions `[B]` in it that make a batch.

        The positions are on the CPU, where the shapes of what follows are decided. The set may be read until the next
        batch is asked for. Epochs are asked for one at a time; the next one is read ahead.

        Raises:
            IncompleteError, CorruptError: what is read is not what was sealed.
        """
        windows, first = _with_next(self._epoch_windows(epoch)), epoch * self.steps
        (window, soon), filled = next(windows), self._first(epoch)
        while True:
            data, after = filled.result(), soon
            if after is not None:
                _, soon = next(windows)
                filled = self._fill_later(after, soon, data, epoch)
            elif epoch + 1 < self._epochs:
                self._next = (epoch + 1, self._start(epoch + 1, data))
            yield from self._delivered(data, torch.from_numpy(window.order), epoch, first)
            first += -(-len(window.order) // self.plan.batch)
            if after is None:
                return
            window = after

    def fetch(self, rows: np.ndarray) -> tuple[Tensor, Tensor]:
        """Images in view 0 uint8 `[n, 3, H, W]` and labels int64 `[n]` of any rows, in the machine's memory."""
        if self.plan.kind != "streamed":
            data, at = self._windows[0], torch.from_numpy(rows).to(self._windows[0].images.device)
            return view_pixels(data, at, torch.zeros_like(at)).cpu(), data.labels[at].cpu()
        images = torch.empty(len(rows), *self.cache.spec.view_shape, dtype=torch.uint8)
        labels = torch.empty(len(rows), dtype=torch.int64)
        order = np.argsort(rows)

        def take(block: slice) -> None:
            wanted = order[slice(*np.searchsorted(rows, (block.start, block.stop), sorter=order))]
            if len(wanted):
                at, inside = torch.from_numpy(wanted), rows[wanted] - block.start
                images[at] = torch.from_numpy(self.cache.clean(block)[inside])
                labels[at] = torch.from_numpy(self.cache.read("label", block)[inside]).long()

        self._by_blocks(take)
        return images, labels

    def pixel_counts(self) -> Tensor:
        """How often each level occurs in each channel of the images to train on, int64 `[3, 256]`.

        Of resized crops it is view 0 that is looked at.
        """
        trained = np.zeros(self.cache.rows, dtype=bool)
        trained[self.training] = True

        def count(block: slice) -> Tensor:
            if self.plan.kind == "streamed" or self.cache.spec.views.resized or self.cache.spec.store.encoded:
                images = torch.from_numpy(self.cache.clean(block)[trained[block]])
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
        window, soon = next(_with_next(self._epoch_windows(epoch)))
        return self._fill_later(window, soon, before, epoch)

    def _fill_later(
        self, window: Window, soon: Window | None, before: TrainingSet | None, epoch: int
    ) -> "Future[TrainingSet]":
        """Fill the set that is not `before`, while shards of the window after are on their way into a local copy."""
        into = self._windows[1] if before is self._windows[0] else self._windows[0]
        if before is not None:
            into.copy_from(before, torch.from_numpy(window.carried))
        return self._ahead.submit(self._fill, window, soon, into, epoch)

    def _shards(self, window: Window) -> list[int]:
        """The shards of rows that hold a window's blocks."""
        firsts = self._blocks[window.blocks, 0]
        return [int(shard) for shard in np.unique(firsts // self.cache.spec.store.rows_per_shard)]

    def _ask_for(self, names: list[str], window: Window, soon: Window | None) -> list[int]:
        """Have the shards of a window on their way, then those of the one after; gives the first."""
        shards = self._shards(window)
        self.cache.prefetch(names, shards)
        if soon is not None:
            self.cache.prefetch(names, self._shards(soon))
        return shards

    def _fill(self, window: Window, soon: Window | None, into: TrainingSet, epoch: int) -> TrainingSet:
        names, arrays = array_names(self.cache, into), self.cache.arrays
        shards = self._ask_for(names, window, soon)
        apart = {name for name in names if into.held is not None and arrays[name].is_clean_answer}  # checked by view
        units = [(name, shard) for name in names for shard in shards if shard < arrays[name].shards]
        self.cache.look_up(units)
        list(self._readers.map(lambda unit: self.cache.check(*unit), [unit for unit in units if unit[0] not in apart]))
        blocks = self._blocks[window.blocks]
        sizes = blocks[:, 1] - blocks[:, 0]
        choose = functools.partial(draw_views, into, count=len(into.offsets), seed=self._seed, epoch=epoch)
        starts = len(window.carried) + np.cumsum(sizes) - sizes
        slots = [more.place(window.rows)[starts].tolist() for more in into.more]
        for job in [
            self._readers.submit(
                fill, self.cache, into, int(at), slice(int(first), int(last)), choose=choose, slots=own
            )
            for at, (first, last), *own in zip(starts, blocks, *slots, strict=True)
        ]:
            job.result()
        return into

    def _delivered(
        self, data: TrainingSet, order: Tensor, epoch: int, first: int
    ) -> Iterator[tuple[TrainingSet, Tensor]]:
        """The batches of a window, which a thread gathers and sends ahead where the rows are not on the device.

        `first` is the number of its first batch in the whole run.
        """
        batches = order.split(self.plan.batch) if len(order) else ()
        if data.images.device.type == self.plan.device.type:
            data = data.ordered(order)
            yield from ((data, at) for at in batches)
            return
        coming: deque[Future[TrainingSet]] = deque()
        for number, at in enumerate(batches, start=first):
            coming.append(self._sender.submit(self._gathered, data, at, epoch, number))
            if len(coming) > _AHEAD:
                yield _all_of(coming.popleft().result())
        while coming:
            yield _all_of(coming.popleft().result())

    def _gathered(self, data: TrainingSet, at: Tensor, epoch: int, number: int) -> TrainingSet:
        """Rows on their way to the device, with the views that this batch's draws show of them, or with all."""
        keys, how = data.keys[at], {"seed": self._seed, "epoch": epoch}
        all_of_them = self._perturbations == "all" or not data.attacks
        few = data if all_of_them else data.without_attacks(views=int(self._perturbations == "first"))
        if self._views and data.held is None:
            drawn = [draw_views(data, keys, count, **how) for count in self._views]
            taken = few.take_views(at, torch.stack(drawn, dim=1))
        else:
            taken = few.take(at)
        if self._perturbations == "drawn" and data.attacks:
            attack = choose_attack(len(data.attacks), seed=self._seed, number=number)
            views = draw_views(data, keys, data.attack_count(attack), **how)
            taken = taken.with_attack(data, at, attack, views)
        return taken.send(self.plan.device)


def _with_next(windows: Iterator[Window]) -> Iterator[tuple[Window, Window | None]]:
    """Each window with the one after it."""
    window = next(windows)
    for after in windows:
        yield window, after
        window = after
    yield window, None


def _all_of(data: TrainingSet) -> tuple[TrainingSet, Tensor]:
    at = torch.arange(len(data.keys))
    return data.ordered(at, torch.arange(len(at), device=data.images.device)), at


def level_counts(images: Tensor) -> Tensor:
    """How often each of the 256 levels occurs in each channel of uint8 `[n, 3, H, W]`, int64 `[3, 256]`.

    Images as floats would take eight times the memory of the cache.
    """
    return torch.stack([torch.bincount(channel.flatten(), minlength=256) for channel in images.unbind(1)]).cpu()
