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
from darht.cache.format.layout import JACOBIAN_PARTS, ArrayLayout, label_dtype
from darht.cache.format.logit_codes import encode_int8, encode_top
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
        self._said: tuple[tuple[object, ...], tuple[np.ndarray, ...]] | None = None
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
        """The values of any rows; `known` are an array of clean answers `[rows, ...]` by view.

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
            case "jacobian" | "jacobian-scale" | "jacobian-class" as part:
                return self._jacobian(array, rows)[JACOBIAN_PARTS.index(part)]
            case _:
                return self._answer(array, rows, known if array.attack is None else _NOTHING)

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
            x_adv = attack(model, x, labels[row].to(self.device), generator=generator)
            deltas[row - rows.start, view] = encode(x_adv, x, attack.threat, spec.scale).cpu()
        return deltas.numpy()

    def _answer(self, array: ArrayLayout, rows: slice, known: Mapping[int, np.ndarray]) -> np.ndarray:
        """A teacher's logits as the array holds them; views in `known` are not asked about again."""
        values = np.empty((rows.stop - rows.start, *array.shape[1:]), dtype=array.dtype)
        for number, answers in known.items():
            values[:, number] = answers
        todo = [view for view in range(array.shape[1]) if view not in known]
        if todo:
            values[:, todo] = self._coded(array, rows, todo)
        if values.dtype.kind == "f" and not np.isfinite(values).all():
            where = f"rows {rows.start}..{rows.stop - 1}"
            raise ModelError(
                f"teacher '{array.teacher}' gave logits that are not finite in {array.dtype} on {where}; "
                f"use store.logits: float32, or another teacher"
            )
        return values

    def _coded(self, array: ArrayLayout, rows: slice, todo: list[int]) -> np.ndarray:
        """Answers about some views, in the code of the store; one question gives both arrays of a code."""
        if array.kind == "logits":
            return self._ask(array, rows, todo)
        key = (array.teacher, array.attack, rows.start, rows.stop, *todo)
        if self._said is None or self._said[0] != key:
            store, logits = self.plan.spec.store, self._ask(array, rows, todo)
            classes = label_dtype(logits.shape[-1])
            self._said = (
                key,
                encode_int8(logits) if store.logits == "int8" else encode_top(logits, store.top_k, classes),
            )
        return self._said[1][int(array.kind in ("logits-class", "logits-scale"))]

    @torch.no_grad()
    def _ask(self, array: ArrayLayout, rows: slice, todo: list[int]) -> np.ndarray:
        """What a teacher says about the stored pixels, clean or plus stored perturbation, `[rows, V, C]`."""
        model, attack, teacher = self._model(array.teacher), array.attack, self.plan.spec.teachers[array.teacher or ""]
        dtype = array.dtype if array.kind == "logits" else "float32"
        values = np.empty((rows.stop - rows.start, len(todo), teacher.num_classes), dtype=dtype)
        scale = 1.0 if attack is None else self.plan.spec.attacks[attack].scale
        delta = None if attack is None else self.store.read(self.plan.arrays[f"delta/{attack}"], rows)
        for row, view in self._batches(rows, todo):
            x, at = self._views(row, view), (row - rows.start).numpy()
            if delta is not None:
                x = x + scale * torch.from_numpy(delta[at, view.numpy()])
            with np.errstate(over="ignore"):  # who called says it better
                values[at, todo.index(int(view[0]))] = model(x.to(self.device).float() / 255).cpu().numpy()
        return values

    def _jacobian(self, array: ArrayLayout, rows: slice) -> tuple[np.ndarray, ...]:
        """Values, scales and classes: three arrays from one computation, which is kept for the other two."""
        teacher, key = array.teacher, (array.teacher, rows.start, rows.stop)
        if self._slopes is None or self._slopes[0] != key:
            labels, model, parts = torch.from_numpy(self.plan.source.labels), self._model(teacher), []
            for row, view in self._batches(rows, range(1)):
                x = self._views(row, view).to(self.device).float() / 255
                try:
                    parts.append(jacobian_rows(model, x, labels[row].to(self.device), array.shape[1]))
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
