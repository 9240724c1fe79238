"""Rows of a cache in memory, as tensors."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from darht.cache.read.more_views import MoreViews, look_up
from darht.core.device import send
from darht.core.fused import fused


@dataclass(frozen=True)
class Jacobian:
    """Rows of a teacher's Jacobian on view 0, as they are stored.

    Attributes:
        values: int8 `[n, K, 3, H, W]`.
        scales: float32 `[n, K]`: `values * scales` is the change of a logit per pixel level.
        classes: int16 `[n, K]`, of which logits.
    """

    values: Tensor
    scales: Tensor
    classes: Tensor

    def each(self, change: Callable[[Tensor], Tensor]) -> "Jacobian":
        """The same rows after a change of every tensor."""
        return Jacobian(change(self.values), change(self.scales), change(self.classes))


@dataclass(frozen=True)
class TrainingSet:
    """Rows of a cache in memory: n of them, all N or a part.

    Attributes:
        rows: int64 `[n]`, the source index of each row that is held; random draws are keyed by it.
        keys: the same on the CPU wherever the rest is: what decides shapes is drawn there, and no GPU is waited for.
        images: uint8 `[n, 3, H, W]`; `[n, 0]` where they are encoded.
        labels: int64 `[n]`; -1 where a row has none.
        offsets: int8 `[V, 3]`; zeros where views are boxes.
        teachers: the names on axis T; none when their logits are not needed.
        attacks: the names of `deltas` and `adversarial`, in order.
        clean: float `[n, V, T, C]`, every teacher's logits on every view, or on those that all rows have; or
            `[n, k, T, C]` on the views of `held`; where they are coded the main array of the code, `[n, V, T, ...]`.
            `draw.view_logits` tells what was said.
        deltas: by attack, int8 `[n, Va, 3, H, W]`.
        scales: by attack, pixel levels for each integer of `deltas`.
        adversarial: by attack, every teacher's logits on the stored adversarial images, `[n, Va, T, C]`; as `clean`.
        jacobians: by teacher; empty when they are not needed.
        robust: bool `[T]` on the CPU, false for teachers whose role is `vanilla`.
        training: int64, rows of the cache to train on.
        holdout: int64, rows of the cache kept for selection.
        boxes: int32 `[n, V, 5]`, what each view shows, of resized crops; None of other views.
        size: side of resized crops.
        encoded: the bytes of each image, `[n]`, on the CPU wherever the rest is; None where pixels are stored.
        more: the teachers' logits on views that only some rows have.
        limits: pairs (rows, views), rows falling and views rising: rows of the cache below the one have the other;
            empty where all rows have all views.
        labelled: rows of the cache below this number have labels; None for all of them.
        held: int64 `[n, k]`, the views of which `clean` holds the logits; None for all of them.
        shown: int64 `[n, 1]`, the view of which the one attack that is held has perturbations and answers; None where
            all attacks are held in all views that they ran on.
        attack_views: by attack, the views that it ran on, where fewer are held; empty where all are.
        order: positions that are needed in parts, on the CPU and again where the rows are; None on the CPU.
        companions: of `clean` and then of each of `adversarial`, `[n, V, T, ...]`; empty where logits are not coded.
        classes: C.
        same_view: rows whose source indices have one quotient by this number show the same view in an epoch.
    """

    rows: Tensor
    keys: Tensor
    images: Tensor
    labels: Tensor
    offsets: Tensor
    teachers: tuple[str, ...]
    attacks: tuple[str, ...]
    clean: Tensor
    deltas: tuple[Tensor, ...]
    scales: tuple[float, ...]
    adversarial: tuple[Tensor, ...]
    jacobians: tuple[Jacobian, ...]
    robust: Tensor
    training: np.ndarray
    holdout: np.ndarray
    boxes: Tensor | None = None
    size: int = 0
    encoded: NDArray[np.object_] | None = None
    more: tuple[MoreViews, ...] = ()
    limits: tuple[tuple[int, int], ...] = ()
    labelled: int | None = None
    held: Tensor | None = None
    shown: Tensor | None = None
    attack_views: tuple[int, ...] = ()
    order: tuple[Tensor, Tensor] | None = None
    companions: tuple[Tensor, ...] = ()
    classes: int = 0
    same_view: int = 1

    def to(self, device: torch.device) -> "TrainingSet":
        """The same on another device."""
        moved = self._each(lambda tensor: tensor.to(device))
        return dataclasses.replace(moved, offsets=self.offsets.to(device))

    def send(self, device: torch.device) -> "TrainingSet":
        """The same on another device, from pinned memory and without waiting for it: for the rows of a step."""
        moved = self._each(lambda tensor: send(tensor, device))
        return dataclasses.replace(moved, offsets=send(self.offsets, device))

    def ordered(self, order: Tensor, here: Tensor | None = None) -> "TrainingSet":
        """The same with positions `[m]` sent ahead to where its rows are, unless they are `here` already."""
        device = self.images.device
        if device.type == "cpu":
            return self
        return dataclasses.replace(self, order=(order, send(order, device) if here is None else here))

    def sent(self, at: Tensor) -> Tensor:
        """Positions where the rows are; a part of those that were sent ahead is a view and no copy."""
        if self.order is None or at.device.type != "cpu" or not _same_storage(at, self.order[0]):
            return send(at, self.images.device)
        return self.order[1].as_strided(at.shape, at.stride(), at.storage_offset())

    def reordered(self, at: Tensor, first: Tensor, here: Tensor, first_here: Tensor) -> tuple["TrainingSet", Tensor]:
        """Positions with those that come `first` before the others, each part in the order that it has.

        Args:
            at: int64 `[B]` on the CPU.
            first: bool `[B]` on the CPU.
            here: what `sent` gives of `at`; nothing more is sent.
            first_here: the same flags where the rows are.

        Returns:
            The set, whose `sent` knows them and parts of them, and the positions on the CPU.
        """
        order = torch.cat([at[first], at[~first]])
        return self.ordered(order, _first(here, first_here)), order

    def take(self, at: Tensor) -> "TrainingSet":
        """Only the rows at positions `at`, int64 `[B]`, in that order."""
        taken = dataclasses.replace(self, more=())._each(lambda tensor: tensor.index_select(0, at))
        more = tuple(views.take(at) for views in self.more)
        encoded = None if self.encoded is None else self.encoded[at.numpy()]
        return dataclasses.replace(taken, keys=self.keys[at], more=more, order=None, encoded=encoded)

    def take_views(self, at: Tensor, held: Tensor) -> "TrainingSet":
        """As `take`, with the logits of some views of each row alone, int64 `[B, k]`."""
        others = [part if number else part[:, :0] for number, part in enumerate(self.companions)]
        few = dataclasses.replace(self, clean=self.clean[:, :0], more=(), companions=tuple(others)).take(at)
        companions = (*(part[at[:, None], held] for part in self.companions[:1]), *few.companions[1:])
        return dataclasses.replace(few, clean=self.logits(at[:, None], held), companions=companions, held=held)

    def without_attacks(self, *, views: int = 0) -> "TrainingSet":
        """The same with no answers to adversarial images, and perturbations in the first `views` views alone."""
        nothing = [part[:, :0] if number else part for number, part in enumerate(self.companions)]
        return dataclasses.replace(
            self,
            deltas=tuple(part[:, :views] for part in self.deltas),
            adversarial=tuple(part[:, :0] for part in self.adversarial),
            companions=tuple(nothing),
            attack_views=tuple(map(self.attack_count, range(len(self.deltas)))),
        )

    def with_attack(self, whole: "TrainingSet", at: Tensor, attack: int, views: Tensor) -> "TrainingSet":
        """Rows taken `without_attacks`, with one attack in one view of each, int64 `[B]`, from the set they are of."""

        def put(into: tuple[Tensor, ...], parts: tuple[Tensor, ...], place: int) -> tuple[Tensor, ...]:
            drawn = [parts[place][at, views][:, None]] if place < len(parts) else []
            return (*into[:place], *drawn, *into[place + 1 :])

        return dataclasses.replace(
            self,
            deltas=put(self.deltas, whole.deltas, attack),
            adversarial=put(self.adversarial, whole.adversarial, attack),
            companions=put(self.companions, whole.companions, 1 + attack),
            shown=views[:, None],
        )

    def attack_count(self, attack: int) -> int:
        """How many views an attack ran on."""
        return self.attack_views[attack] if self.attack_views else self.deltas[attack].shape[1]

    def logits(self, at: Tensor, views: Tensor) -> Tensor:
        """`clean` on views of the rows at positions `at`, of one shape (or one that becomes so)."""
        return look_up(self.clean, self.more, at, views) if self.more else self.clean[at, views]

    def copy_from(self, other: "TrainingSet", at: Tensor) -> None:
        """Replace the first rows by those at positions `at` of another set of the same cache."""
        for mine, theirs in zip(self.tensors(), other.tensors(), strict=True):
            mine[: len(at)] = theirs.index_select(0, at)
        if self.encoded is not None and other.encoded is not None:
            self.encoded[: len(at)] = other.encoded[at.numpy()]
        for my_views, their_views in zip(self.more, other.more, strict=True):
            my_views.copy_from(their_views, other.rows, at)

    def tensors(self) -> list[Tensor]:
        """Everything that has a row for each row held, but for `more`."""
        slopes = [tensor for jacobian in self.jacobians for tensor in vars(jacobian).values()]
        optional = [tensor for tensor in (self.boxes, self.held) if tensor is not None]
        said = [self.clean, *self.adversarial, *self.companions]
        return [self.rows, self.images, self.labels, *said, *self.deltas, *slopes, *optional]

    def _each(self, change: Callable[[Tensor], Tensor]) -> "TrainingSet":
        return dataclasses.replace(
            self,
            rows=change(self.rows),
            images=change(self.images),
            labels=change(self.labels),
            clean=change(self.clean),
            held=None if self.held is None else change(self.held),
            shown=None if self.shown is None else change(self.shown),
            deltas=tuple(map(change, self.deltas)),
            adversarial=tuple(map(change, self.adversarial)),
            companions=tuple(map(change, self.companions)),
            jacobians=tuple(jacobian.each(change) for jacobian in self.jacobians),
            boxes=None if self.boxes is None else change(self.boxes),
            more=tuple(views.each(change) for views in self.more),
        )


@fused
def _first(at: Tensor, first: Tensor) -> Tensor:
    return at[torch.argsort(first.logical_not().to(torch.int8), stable=True)]


def _same_storage(one: Tensor, other: Tensor) -> bool:
    return one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()
