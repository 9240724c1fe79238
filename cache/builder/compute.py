"""What computes the values of a unit: from the images, the teachers, and units that are done."""

import contextlib
import functools
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from darht.attacks.encoding import encode
from darht.cache.builder.history import History, read_history
from darht.cache.builder.jacobian import as_arrays, jacobian_rows
from darht.cache.builder.plan import Plan
from darht.cache.format.apply_views import apply_views
from darht.cache.format.layout import JACOBIAN_PARTS, ArrayLayout
from darht.cache.format.spec import PrecisionSpec
from darht.cache.format.store import Store
from darht.core.errors import ModelError
from darht.core.rng import RowRng

GONE = "but its folder is gone: give the path where its card and weights lie now"
_NOTHING: Mapping[int, np.ndarray] = types.MappingProxyType({})


class Worker:
    """Computes the values of any unit, from the images, the teachers, and units that are done."""

    def __init__(self, plan: Plan, store: Store, device: torch.device, batch_size: int) -> None:
        self.plan, self.store, self.device, self.batch_size = plan, store, device, batch_size
        self._slopes: tuple[tuple[str | None, int, int], tuple[np.ndarray, ...]] | None = None
        self._decoded: tuple[slice, np.ndarray] = slice(0, 0), np.empty(0, dtype=np.uint8)

    @functools.cached_property
    def history(self) -> History:
        """What the cache was before it was extended."""
        return read_history(self.store.storage)

    def compute(self, array: ArrayLayout, shard: int) -> np.ndarray:
        """The values of one unit, `[rows, ...]`, in the array's type; answers that a former spec's unit holds stay."""
        return self.values(
            array, array.rows(shard), self.history.answers(self.store, array, shard, self.plan.offsets.numpy())
        )

    def values(self, array: ArrayLayout, rows: slice, known: Mapping[int, np.ndarray] = _NOTHING) -> np.ndarray:
        """The values of any rows; `known` are clean logits `[rows, C]` by view.

        They have the bits of the whole unit's when `rows` is made of the batches that the unit was cut into.
        """
        match array.kind:
            case "source_index":
                return np.arange(rows.start, rows.stop, dtype=np.int64)
            case "label":
                return self.plan.source.labels[rows].astype(array.dtype)
            case "image":
                return self._pixels(rows)
            case "views":
                return self.plan.offsets.numpy()[rows]
            case "delta":
                return self._perturb(array, rows)
            case "logits":
                return self._ask(array, rows, known if array.attack is None else _NOTHING)
            case part:
                return self._jacobian(array, rows)[JACOBIAN_PARTS.index(part)]

    def _perturb(self, array: ArrayLayout, rows: slice) -> np.ndarray:
        assert array.attack is not None
        name, spec = array.attack, self.plan.spec.attacks[array.attack]
        attack, model = spec.attack(), self._model(spec.teacher)
        labels = torch.from_numpy(self.plan.source.labels)
        deltas = torch.empty((rows.stop - rows.start, spec.views, *self.plan.spec.data.image_shape), dtype=torch.int8)
        for row, view in self._batches(rows, range(spec.views)):
            x = self._views(row, view).to(self.device).float() / 255
            generator = RowRng.create(
                self.plan.spec.seed, "attack", name, rows=row.to(self.device), views=view.to(self.device)
            )
            x_adv = attack(model, x, labels_or_answers(model, x, labels[row]), generator=generator)
            deltas[row - rows.start, view] = encode(x_adv, x, attack.threat, spec.scale).cpu()
        return deltas.numpy()

    @torch.no_grad()
    def _ask(self, array: ArrayLayout, rows: slice, known: Mapping[int, np.ndarray]) -> np.ndarray:
        """What a teacher says about the stored pixels: clean views, or views plus stored perturbation.

        Views in `known` are not asked about again.
        """
        values, first = np.empty((rows.stop - rows.start, *array.shape[1:]), dtype=array.dtype), array.first_view
        for number, answers in known.items():
            values[:, number - first] = answers
        todo = [view for view in range(first, first + array.shape[1]) if view not in known]
        model, attack = self._model(array.teacher) if todo else None, array.attack
        scale = 1.0 if attack is None else self.plan.spec.attacks[attack].scale
        delta = None if attack is None else self.store.read(self.plan.arrays[f"delta/{attack}"], rows)
        for row, view in self._batches(rows, todo):
            x, at = self._views(row, view), ((row - rows.start).numpy(), (view - first).numpy())
            if delta is not None:
                x = x + scale * torch.from_numpy(delta[at])
            assert model is not None
            with np.errstate(over="ignore"):  # the next lines say it better
                values[at] = model(x.to(self.device).float() / 255).cpu().numpy()
        if not np.isfinite(values).all():
            where = f"rows {rows.start}..{rows.stop - 1}"
            raise ModelError(
                f"teacher '{array.teacher}' gave logits that are not finite in {array.dtype} on {where}; "
                f"use store.logits: float32, or another teacher"
            )
        return values

    def _jacobian(self, array: ArrayLayout, rows: slice) -> tuple[np.ndarray, ...]:
        """Values, scales and classes: three arrays from one computation, which is kept for the other two."""
        teacher, key = array.teacher, (array.teacher, rows.start, rows.stop)
        if self._slopes is None or self._slopes[0] != key:
            labels, model, parts = torch.from_numpy(self.plan.source.labels), self._model(teacher), []
            for row, view in self._batches(rows, range(1)):
                x = self._views(row, view).to(self.device).float() / 255
                try:
                    parts.append(jacobian_rows(model, x, labels_or_answers(model, x, labels[row]), array.shape[1]))
                except ModelError as error:
                    where = f"rows {int(row[0])}..{int(row[-1])}"
                    raise ModelError(f"teacher '{teacher}' on {where}: {error}; leave it out of 'jacobians'") from error
            self._slopes = (key, as_arrays(parts))
        return self._slopes[1]

    def _model(self, name: str | None) -> Callable[[Tensor], Tensor]:
        if name is None or name not in self.plan.teachers:
            raise ModelError(f"teacher '{name}' must answer, {GONE}")
        teacher = self.plan.teachers[name]
        if not self.plan.spec.precision.amp:
            return teacher

        def answer(x: Tensor) -> Tensor:
            with torch.autocast(self.device.type, torch.bfloat16):
                logits: Tensor = teacher(x)
            return logits.float()

        return answer

    def _batches(self, rows: slice, views: Iterable[int]) -> Iterator[tuple[Tensor, Tensor]]:
        """Rows and their view, one view after the other: the batch that a view's answer is computed in, and so its
        last bits, do not depend on which other views there are. So views can be added later.
        """
        for view in views:
            for row in torch.arange(rows.start, rows.stop).split(self.batch_size):
                yield row, torch.full_like(row, view)

    def _views(self, row: Tensor, view: Tensor) -> Tensor:
        pixels = self._pixels(slice(int(row[0]), int(row[-1]) + 1))
        return apply_views(torch.from_numpy(pixels), self.plan.offsets[view])

    def _pixels(self, rows: slice) -> np.ndarray:
        """Images of some rows; those of a whole shard are decoded at once, and kept until another is wanted."""
        images = self.plan.source.images
        if isinstance(images, np.ndarray):
            return images[rows]
        first, last = self._decoded[0].start, self._decoded[0].stop
        if not first <= rows.start <= rows.stop <= last:
            size = self.plan.spec.store.rows_per_shard
            start = rows.start // size * size
            wanted = slice(start, min(max(start + size, rows.stop), len(images)))
            self._decoded = wanted, images[wanted]
            first = start
        return self._decoded[1][rows.start - first : rows.stop - first]


@torch.no_grad()
def labels_or_answers(model: Callable[[Tensor], Tensor], x: Tensor, labels: Tensor) -> Tensor:
    """Labels `[B]` on the device of `x`; where there is none (-1), what the model itself says about these pixels."""
    y = labels.to(x.device)
    return torch.where(y < 0, model(x).argmax(1), y) if bool((labels < 0).any()) else y


@contextlib.contextmanager
def arithmetic(precision: PrecisionSpec) -> Iterator[None]:
    """The precision flags of a spec, until the block ends."""
    backends: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [backend.allow_tf32 for backend in backends]
    try:
        for backend in backends:
            backend.allow_tf32 = precision.tf32
        yield
    finally:
        for backend, value in zip(backends, before, strict=True):
            backend.allow_tf32 = value
