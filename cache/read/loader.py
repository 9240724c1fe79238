"""The arrays a trainer needs, as tensors: of a whole cache, or of some of its rows."""

import dataclasses
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from darht.cache.format.layout import BOXES, CLEAN_FROM, JACOBIAN_PARTS
from darht.cache.read.more_views import MoreViews, further_views, look_up
from darht.cache.read.reader import Cache
from darht.core.device import send
from darht.core.errors import ConfigError
from darht.core.storage_remote import IN_FLIGHT, RemoteStorage

GIB = 2**30
_BYTES_OBJECT = 40  # of Python, around the bytes of an image
THREADS = min(8, os.cpu_count() or 1)  # reading, hashing and decompressing release the interpreter's lock


def reading_threads(cache: Cache) -> int:
    """Threads that read a cache: a core's work each, or a request's where nothing is copied from a URL."""
    return IN_FLIGHT if isinstance(cache.folder, RemoteStorage) else THREADS


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
            `[n, k, T, C]` on the views of `held`.
        deltas: by attack, int8 `[n, Va, 3, H, W]`.
        scales: by attack, pixel levels for each integer of `deltas`.
        adversarial: by attack, float `[n, Va, T, C]`, every teacher's logits on the stored adversarial images.
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
        order: positions that are needed in parts, on the CPU and again where the rows are; None on the CPU.
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
    order: tuple[Tensor, Tensor] | None = None

    def to(self, device: torch.device) -> "TrainingSet":
        """The same on another device."""
        moved = self._each(lambda tensor: tensor.to(device))
        return dataclasses.replace(moved, offsets=self.offsets.to(device))

    def send(self, device: torch.device) -> "TrainingSet":
        """The same on another device, from pinned memory and without waiting for it: for the rows of a step."""
        moved = self._each(lambda tensor: send(tensor, device))
        return dataclasses.replace(moved, offsets=send(self.offsets, device))

    def ordered(self, order: Tensor) -> "TrainingSet":
        """The same with positions `[m]` sent ahead to where its rows are."""
        device = self.images.device
        return self if device.type == "cpu" else dataclasses.replace(self, order=(order, send(order, device)))

    def sent(self, at: Tensor) -> Tensor:
        """Positions where the rows are; a part of those that were sent ahead is a view and no copy."""
        if self.order is None or at.device.type != "cpu" or not _same_storage(at, self.order[0]):
            return send(at, self.images.device)
        return self.order[1].as_strided(at.shape, at.stride(), at.storage_offset())

    def take(self, at: Tensor) -> "TrainingSet":
        """Only the rows at positions `at`, int64 `[B]`, in that order."""
        taken = dataclasses.replace(self, more=())._each(lambda tensor: tensor.index_select(0, at))
        more = tuple(views.take(at) for views in self.more)
        encoded = None if self.encoded is None else self.encoded[at.numpy()]
        return dataclasses.replace(taken, keys=self.keys[at], more=more, order=None, encoded=encoded)

    def take_views(self, at: Tensor, held: Tensor) -> "TrainingSet":
        """As `take`, with the logits of some views of each row alone, int64 `[B, k]`."""
        few = dataclasses.replace(self, clean=self.clean[:, :0], more=()).take(at)
        return dataclasses.replace(few, clean=self.logits(at[:, None], held), held=held)

    def logits(self, at: Tensor, views: Tensor) -> Tensor:
        """The teachers' logits on views of the rows at positions `at`, of one shape (or one that becomes so)."""
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
        boxes = [] if self.boxes is None else [self.boxes]
        return [self.rows, self.images, self.labels, self.clean, *self.deltas, *self.adversarial, *slopes, *boxes]

    def _each(self, change: Callable[[Tensor], Tensor]) -> "TrainingSet":
        return dataclasses.replace(
            self,
            rows=change(self.rows),
            images=change(self.images),
            labels=change(self.labels),
            clean=change(self.clean),
            held=None if self.held is None else change(self.held),
            deltas=tuple(map(change, self.deltas)),
            adversarial=tuple(map(change, self.adversarial)),
            jacobians=tuple(jacobian.each(change) for jacobian in self.jacobians),
            boxes=None if self.boxes is None else change(self.boxes),
            more=tuple(views.each(change) for views in self.more),
        )


def _same_storage(one: Tensor, other: Tensor) -> bool:
    return one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()


def row_bytes(cache: Cache, *, adversarial: bool, jacobians: bool = False, logits: bool = True, band: int = 0) -> int:
    """What a row takes in memory, on average: its arrays, an int64 label and an int64 source index.

    Of several sources only the views that all rows have; of the views of a `band` (see `CacheSpec.bands`) after those,
    what a row that has them takes more.
    """
    first_view = cache.spec.bands[band].first
    held = [
        array
        for array in cache.arrays.values()
        if (array.kind == "image" or array.has_views or (array.is_jacobian and jacobians))
        and (array.attack is None or adversarial)
        and (array.kind != "logits" or logits)
        and (not array.of_some_rows if not band else array.of_some_rows and array.first_view == first_view)
    ]
    if band:
        return sum(array.row_bytes for array in held)
    encoded = sum(cache.size(array.name) // cache.rows + _BYTES_OBJECT for array in held if array.encoded)
    slots = 8 * (len(cache.spec.bands) - 1)
    return 16 + slots + sum(array.row_bytes for array in held) + encoded


def needed_bytes(cache: Cache, *, adversarial: bool, jacobians: bool = False, logits: bool = True) -> int:
    """What `load_training_set` will hold in memory."""
    wanted = {"adversarial": adversarial, "jacobians": jacobians, "logits": logits}
    return sum(band.rows * row_bytes(cache, **wanted, band=number) for number, band in enumerate(cache.spec.bands))


def training_rows(cache: Cache) -> np.ndarray:
    """The rows to train on, int64, in order: those that are neither held out nor excluded."""
    return np.setdiff1d(np.arange(cache.rows), [*cache.manifest.holdout, *cache.excluded])


def allocate(
    cache: Cache,
    rows: int,
    *,
    adversarial: bool,
    jacobians: bool = False,
    logits: bool = True,
    having: Sequence[int] | None = None,
) -> TrainingSet:
    """A set with room for `rows` rows, whose contents `fill` brings.

    `having` says how many of them may have the views of each band but the first; None for as many as there are.

    Raises:
        ConfigError: a Jacobian is needed that the cache does not hold.
    """
    spec = cache.spec
    teachers, attacks = tuple(spec.teachers) if logits else (), tuple(spec.attacks) if adversarial else ()
    T, image = len(teachers), spec.view_shape

    def answers(kind: str) -> Tensor:
        views = spec.bands[0].stop if kind == "clean" else spec.attacks[kind].views
        return _room(rows, views, T, len(spec.data.classes), dtype=spec.store.logits)

    def slopes(teacher: str) -> Jacobian:
        if teacher not in spec.jacobians:
            raise ConfigError(f"teacher '{teacher}' has no Jacobian in {cache.folder}; list it under 'jacobians'")
        K = cache.arrays[f"logits/{teacher}/{JACOBIAN_PARTS[0]}"].shape[1]
        values = torch.empty(rows, K, *image, dtype=torch.int8)
        return Jacobian(values, torch.empty(rows, K), torch.empty(rows, K, dtype=torch.int16))

    cache.check_decoder()
    held, V, coded = _room(rows, dtype="int64"), spec.views.count, spec.store.encoded
    return TrainingSet(
        rows=held,
        keys=held,
        images=_room(rows, *((0,) if coded else spec.data.image_shape), dtype="uint8"),
        labels=_room(rows, dtype="int64"),
        offsets=torch.zeros(V, 3, dtype=torch.int8) if spec.views.resized else torch.from_numpy(cache.views),
        teachers=teachers,
        attacks=attacks,
        clean=answers("clean"),
        deltas=tuple(_room(rows, spec.attacks[name].views, *image, dtype="int8") for name in attacks),
        scales=tuple(spec.attacks[name].scale for name in attacks),
        adversarial=tuple(answers(name) for name in attacks),
        jacobians=tuple(slopes(name) for name in teachers) if jacobians else (),
        robust=torch.tensor([spec.teachers[name].role == "robust" for name in teachers], dtype=torch.bool),
        training=training_rows(cache),
        holdout=np.array(cache.manifest.holdout, dtype=np.int64),
        boxes=_room(rows, V, 5, dtype="int32") if spec.views.resized else None,
        size=spec.views.size,
        encoded=np.empty(rows, dtype=object) if coded else None,
        more=further_views(spec, rows, T, having),
        limits=tuple((band.rows, band.stop) for band in spec.bands) if len(spec.bands) > 1 else (),
        labelled=spec.data.labelled if spec.data.labelled < spec.data.rows else None,
    )


def _room(*shape: int, dtype: str) -> Tensor:
    """Memory from numpy, which asks for huge pages, and torch does not: random rows are then read a quarter faster."""
    return torch.from_numpy(np.empty(shape, dtype=dtype))


def array_names(data: TrainingSet) -> list[str]:
    """The arrays of a cache that a set holds."""
    kinds = ["clean", *data.attacks]
    logits = [f"logits/{teacher}/{kind}" for kind in kinds for teacher in data.teachers]
    logits += [f"logits/{teacher}/{CLEAN_FROM}{more.first}" for more in data.more for teacher in data.teachers]
    slopes = [f"logits/{teacher}/{part}" for teacher in data.teachers for part in JACOBIAN_PARTS if data.jacobians]
    boxes = [] if data.boxes is None else [BOXES]
    return ["label", "image", *boxes, *(f"delta/{name}" for name in data.attacks), *logits, *slopes]


def fill(cache: Cache, data: TrainingSet, at: int, rows: slice, slots: Sequence[int] | None = None) -> None:
    """Read rows of a cache into a set, from position `at` on, and their further views into each `more` from `slots` on.

    Without `slots` the set holds all rows, each at its own number.

    Raises:
        CorruptError: a checksum fails.
    """
    here = slice(at, at + rows.stop - rows.start)
    labels = np.empty(rows.stop - rows.start, dtype=cache.arrays["label"].dtype)
    out = {"label": labels, "image": data.images[here].numpy() if data.encoded is None else data.encoded[here]}
    if data.boxes is not None:
        out[BOXES] = data.boxes[here].numpy()
    out |= {f"delta/{name}": deltas[here].numpy() for name, deltas in zip(data.attacks, data.deltas, strict=True)}
    for logits, kind in zip((data.clean, *data.adversarial), ("clean", *data.attacks), strict=True):
        out |= {f"logits/{name}/{kind}": logits[here, :, t].numpy() for t, name in enumerate(data.teachers)}
    for name, jacobian in zip(data.teachers, data.jacobians, strict=False):
        parts = (jacobian.values, jacobian.scales, jacobian.classes)
        out |= {f"logits/{name}/{part}": t[here].numpy() for part, t in zip(JACOBIAN_PARTS, parts, strict=True)}
    cache.read_into(out, rows)
    for number, more in enumerate(data.more):
        more.fill(cache, data.teachers, rows.start if slots is None else slots[number], rows)
    data.labels[here] = torch.from_numpy(labels).long()
    data.rows[here] = torch.arange(rows.start, rows.stop)


def load_training_set(
    cache: Cache,
    *,
    device: torch.device,
    adversarial: bool,
    budget_gib: float,
    jacobians: bool = False,
    logits: bool = True,
) -> TrainingSet:
    """Read a sealed cache into tensors on `device`.

    Args:
        cache: opened by `open_cache`.
        device: where the tensors go.
        adversarial: whether the stored perturbations and the teachers' answers to them are needed.
        budget_gib: the most that may be held.
        jacobians: whether the teachers' Jacobians are needed.
        logits: whether the teachers' logits are needed.

    Raises:
        ConfigError: it does not fit the budget.
        CorruptError: a checksum fails.
    """
    needed = needed_bytes(cache, adversarial=adversarial, jacobians=jacobians, logits=logits)
    if needed > budget_gib * GIB:
        raise ConfigError(
            f"{cache.folder} needs {needed / GIB:.1f} GiB in memory, the budget is {budget_gib:g} GiB: "
            f"raise --memory, or build with fewer views ({cache.spec.views.count} now)"
        )
    data = allocate(cache, cache.rows, adversarial=adversarial, jacobians=jacobians, logits=logits)
    label = cache.arrays["label"]
    for more in data.more:
        more.place(np.arange(cache.rows))
    cache.prefetch(array_names(data), range(label.shards))
    with ThreadPoolExecutor(reading_threads(cache)) as pool:
        shards = [label.rows(shard) for shard in range(label.shards)]
        list(pool.map(lambda rows: fill(cache, data, rows.start, rows), shards))
    return data.to(device)
