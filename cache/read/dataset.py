"""Batches of a cache for one's own training loop: the rows, views and stored attacks that the trainer would draw."""

import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from darht.attacks.threat import LEVELS
from darht.cache.read.dataset_options import Options, whole_number
from darht.cache.read.draw import adversarial_levels, choose_views, view_logits, view_pixels
from darht.cache.read.feed_plan import Needed, plan_feed
from darht.cache.read.mixture import feed_groups, steps_of
from darht.cache.read.sampler import share
from darht.cache.read.stream import Feed
from darht.cache.read.training_set import TrainingSet
from darht.core.errors import ConfigError, SpecMismatchError


class Batch(NamedTuple):
    """One process's part of a batch, and what was drawn for it.

    Attributes:
        x: the images in the drawn views `[B, 3, H, W]`: uint8, or float32 in [0, 1].
        y: labels, int64 `[B]`.
        teacher_logits: raw logits (temperature 1) of every teacher on exactly `x`, float32 `[B, T, C]`.
        rows: the rows' indices in the source, int64 `[B]`.
        views: which view of each row, int64 `[B]`; `cache.views` says what it is.
        x_adv: stored adversarial images of the same views, as `x`; None unless `adversarial`.
        teacher_logits_adv: as `teacher_logits`, on exactly `x_adv`.
        attack: whose images they are, a position in `CacheDataset.attacks`.
        epoch: keys the draws.
        step: of the epoch, from 0.
    """

    x: Tensor
    y: Tensor
    teacher_logits: Tensor | None
    rows: Tensor
    views: Tensor
    x_adv: Tensor | None
    teacher_logits_adv: Tensor | None
    attack: int | None
    epoch: int
    step: int

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Self:
        """The same on another device; `non_blocking` does not wait for copies from pinned memory."""
        moved: dict[str, Any] = {
            name: value.to(device, non_blocking=non_blocking)
            for name, value in self._asdict().items()
            if isinstance(value, Tensor)
        }
        return self._replace(**moved)


@dataclass(eq=False, repr=False)
class CacheDataset(Options, IterableDataset[Batch]):
    """Batches of a cache, epoch by epoch: those that `darht-train` draws for the same seed, epoch and batch size.

    ::

        dataset = CacheDataset(open_cache("cache"), batch_size=128, pixels="float")
        for epoch in range(10):
            dataset.set_epoch(epoch)
            for batch in dataset:
                loss = my_loss(student(batch.x), batch.teacher_logits, batch.y)

    It also works under `DataLoader(dataset, batch_size=None)`: workers share the batches, and these come in the same
    order. Threads read, so workers pay only where one's own transforms are slow. A cache that fits `memory_gib` is
    read by the constructor: forked workers share it, spawned ones read their own. A larger one is streamed, by every
    worker for itself.

    With `adversarial`, `x` and `x_adv` are pairs as in `inner: cached`: views are drawn among those that the attack ran
    on. The order of rows depends on seed and epoch, and for a streamed cache on the budget.

    Args:
        cache: opened; or its export.
        batch_size: rows of all processes together, as the trainer's `optim.batch_size`.
        seed: keys order, views and attacks.
        epoch: of the first pass; `set_epoch` chooses those after it.
        rows: those to train on, those held out for selection, or both.
        views: whether views are drawn; otherwise every row comes as it is (view 0).
        pixels: uint8, or float32 in [0, 1].
        logits: whether the teachers' logits are read.
        adversarial: the stored attack whose images come too; "all" draws one of them for each batch.
        rank: this process's number.
        world: how many processes share every batch; of one with fewer rows, some have an empty part.
        memory_gib: the most that the rows may take, in each process that reads.
        drop_last: whether rows that do not fill a batch wait for another epoch, as in training.

    Attributes:
        teachers: the names on axis T; none without logits.
        attacks: the names that `Batch.attack` counts.
        plan: where the rows are; as text it says so in a line.

    Raises:
        ConfigError: arguments that break a rule, all of them at once, or a budget that is too small to stream.
        IncompleteError, CorruptError: what is read is not what was sealed.
    """

    def __post_init__(self) -> None:
        self._check(self.cache)
        found = self._source_rows()
        self._rows = None if self.rows == "training" else found
        self._groups = feed_groups(self.cache, self.batch_size, self._rows)
        self.teachers = tuple(self.cache.spec.teachers) if self.logits else ()
        self.attacks = tuple(self.cache.spec.attacks)
        self.plan = plan_feed(
            self.cache,
            device=torch.device("cpu"),
            adversarial=self.adversarial is not None,
            batch=self.batch_size,
            budget_gib=self.memory_gib,
            logits=self._needed_logits(),
            rows=self._rows,
        )
        # Where the next pass begins, and whether workers draw: workers that stay between epochs see what is set here.
        self._shared = torch.tensor([self.epoch, 0, False]).share_memory_()
        self._passes, self._reached = 0, (self.epoch, 0)
        self._feed: Feed | None = None
        self._process = os.getpid()
        if self.plan.kind != "streamed":
            self._own_feed()

    def __len__(self) -> int:
        """Batches of a whole epoch, the same in every process."""
        return steps_of(self._groups, drop_last=self.drop_last)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next pass; one that was loaded goes on where its state was taken.

        Raises:
            ConfigError: not a whole number of at least 0.
        """
        if problems := whole_number("epoch", epoch, 0):
            raise ConfigError(problems[0])
        self._go_to(epoch, int(self._shared[1]) if epoch == self.epoch else 0)

    def __iter__(self) -> Iterator[Batch]:
        """One pass: what is left of the epoch; it ends when another begins, for both use the same memory."""
        worker = get_worker_info()
        self.epoch, first, stride = int(self._shared[0]), int(self._shared[1]), 1
        if worker is not None:
            first, stride = first + worker.id, worker.num_workers
        self._shared[2] = worker is not None
        self._passes += 1
        self._reached = (self.epoch, first)
        return self._batches(self._own_feed(), self.epoch, range(first, len(self), stride), self._passes)

    def state_dict(self, batch: Batch | None = None) -> dict[str, Any]:
        """Where to go on: after `batch`, or without one after the last that was drawn; numbers and strings alone.

        It fits a dataset with other ranks and workers too.

        Raises:
            ConfigError: workers draw ahead, so that only the batch says how far its training is.
        """
        if batch is None and self._shared[2]:
            raise ConfigError("workers draw batches ahead: give the last one that was used, state_dict(batch)")
        epoch, step = self._reached if batch is None else (batch.epoch, batch.step + 1)
        return {"epoch": epoch, "step": step, "dataset": self._order()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Begin the next pass where the state was taken, with the bits of an uninterrupted one.

        Raises:
            SpecMismatchError: it is the state of other batches.
        """
        if not {"epoch", "step", "dataset"} <= state.keys():
            raise SpecMismatchError(f"a state has epoch, step and dataset; this has {', '.join(state) or 'nothing'}")
        there, here = state["dataset"], self._order()
        changed = [f"{key} was {there.get(key)} and is {here[key]}" for key in here if there.get(key) != here[key]]
        if changed:
            raise SpecMismatchError(f"the state is that of other batches: {'; '.join(changed)}")
        self._go_to(state["epoch"], state["step"])

    def __getstate__(self) -> dict[str, Any]:
        """Without the rows, which another process reads for itself."""
        return vars(self) | {"_feed": None}

    def _go_to(self, epoch: int, step: int) -> None:
        self._shared[:2] = torch.tensor([epoch, step])
        self.epoch, self._reached = epoch, (epoch, step)

    def _own_feed(self) -> Feed:
        """This process's; a streamed one has threads, which a fork does not copy."""
        forked = self._process != os.getpid()
        if self._feed is None or (forked and self.plan.kind == "streamed"):
            ahead = get_worker_info() is None and self.rows == "training"
            self._feed = Feed(
                self.cache,
                self.plan,
                seed=self.seed,
                epochs=sys.maxsize if ahead else 0,
                rows=self._rows,
                drop_last=self.drop_last,
            )
        self._process = os.getpid()
        return self._feed

    def _batches(self, feed: Feed, epoch: int, steps: range, number: int) -> Iterator[Batch]:
        for step, (data, at) in enumerate(feed.batches(epoch)):
            if step not in steps:
                continue
            batch = self._draw(data, share(at, self.rank, self.world), epoch, step)
            self._reached = (epoch, step + 1)
            yield batch
            if number != self._passes:
                raise ConfigError("another pass over this dataset has begun: make a second dataset for a second loop")
        self._reached = (epoch + 1, 0)

    def _draw(self, data: TrainingSet, at: Tensor, epoch: int, step: int) -> Batch:
        attack = self._attack(self.attacks, epoch * len(self) + step)
        if self.views:
            views = choose_views(data, at, seed=self.seed, epoch=epoch, attack=attack)
        else:
            views = torch.zeros_like(at)
        pixels = view_pixels(data, at, views)
        adversarial = None if attack is None else adversarial_levels(data, at, views, attack, pixels)
        return Batch(
            x=self._as_asked(pixels),
            y=data.labels[at],
            teacher_logits=view_logits(data, at, views) if self.logits else None,
            rows=data.rows[at],
            views=views,
            x_adv=None if adversarial is None else self._as_asked(adversarial),
            teacher_logits_adv=view_logits(data, at, views, attack) if self.logits and attack is not None else None,
            attack=attack,
            epoch=epoch,
            step=step,
        )

    def _as_asked(self, levels: Tensor) -> Tensor:
        return levels.to(torch.uint8) if self.pixels == "uint8" else levels.float() / LEVELS

    def _needed_logits(self) -> Needed:
        if not self.logits:
            return "none"
        return "drawn" if self.views and self.adversarial is None else "all"

    def _order(self) -> dict[str, Any]:
        streamed = self.plan.kind == "streamed"
        return self._depends_on() | {"window_rows": self.plan.window_rows if streamed else None}
