"""What computes the values of a unit: from the images, the teachers, and units that are done."""

import contextlib
import dataclasses
import functools
import types
from collections.abc import Callable, Iterable, Iterator, Mapping

import numpy as np
import torch
from torch import Tensor

from darht.attacks.encoding import encode
from darht.attacks.engine.batch_sizes import SMALLEST
from darht.attacks.engine.engine import FULL, Engine
from darht.cache.builder.fit import CPU_BATCH, CudaMemory, fitting_batch, measures
from darht.cache.builder.history import History, read_history
from darht.cache.builder.jacobian import as_arrays, jacobian_rows
from darht.cache.builder.pixels import ShardImages, stored_images
from darht.cache.builder.plan import Plan
from darht.cache.format.apply_views import apply_views
from darht.cache.format.layout import JACOBIAN_PARTS, ArrayLayout, label_dtype
from darht.cache.format.logit_codes import encode_int8, encode_top
from darht.cache.format.resample import resample_batch
from darht.cache.format.spec import PrecisionSpec
from darht.cache.format.store import Store
from darht.core.device import send
from darht.core.errors import CacheError, ModelError
from darht.core.rng import RowRng

GONE = "but its folder is gone: give the path where its card and weights lie now"
_NOTHING: Mapping[int, np.ndarray] = types.MappingProxyType({})


class Worker:
    """Computes the values of any unit, from the images, the teachers, and units that are done."""

    def __init__(self, plan: Plan, store: Store, device: torch.device, batch_size: int | None = None) -> None:
        """With batches of so many images; None for 256 on a CPU and for what fits on a GPU."""
        self.plan, self.store, self.device, self._batch_size = plan, store, device, batch_size
        self._slopes: tuple[tuple[str | None, int, int], tuple[np.ndarray, ...]] | None = None
        self._said: tuple[tuple[object, ...], tuple[np.ndarray, ...]] | None = None
        self._images = ShardImages(plan.source.images, plan.spec)
        self._block: tuple[slice, Tensor | None, Tensor] | None = None
        self._stored: dict[str, Tensor] = {}  # perturbations of the block's rows, by attack

    @functools.cached_property
    def batch_size(self) -> int:
        """Images in one forward pass."""
        if self._batch_size is not None:
            return self._batch_size
        if not measures(self.device):
            return CPU_BATCH
        spec, memory = self.plan.spec, CudaMemory(self.device)
        rows = min(spec.store.rows_per_shard, spec.data.rows)
        return fitting_batch(self.plan.teachers.values(), spec.view_shape, rows, self.device, memory)

    @functools.cached_property
    def engine(self) -> Engine:
        """How attacks run: on a CPU in the slots that leave a row's bits alone, on a GPU in whole batches."""
        if not measures(self.device):
            return FULL
        return dataclasses.replace(FULL, slots=-(-self.batch_size // SMALLEST) * SMALLEST)

    @functools.cached_property
    def history(self) -> History:
        """What the cache was before it was extended."""
        return read_history(self.store.storage)

    def compute(self, array: ArrayLayout, shard: int) -> np.ndarray:
        """The values of one unit, `[rows, ...]`, in the array's type; answers that a former spec's unit holds stay."""
        known = self.history.answers(self.store, array, shard, self.plan.offsets.numpy())
        try:
            return self.values(array, array.rows(shard), known)
        except torch.OutOfMemoryError as error:
            raise CacheError(
                f"{array.name} shard {shard}: {self.batch_size} images at once are more than {self.device} has room "
                f"for: give --batch-size {max(16, self.batch_size // 2)}"
            ) from error

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
                store, images = self.plan.spec.store, self.plan.source.images
                return stored_images(images, rows, store) if store.encoded else np.asarray(self._images.pixels(rows))
            case "views":
                return self.plan.offsets.numpy()[rows]
            case "boxes":
                return self._images.boxes(rows)
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
        shape = (rows.stop - rows.start, spec.views, *self.plan.spec.view_shape)
        deltas = torch.empty(shape, dtype=torch.int8, device=self.device)
        numbers = torch.arange(rows.start, rows.stop, device=self.device)
        for at, view in self._batches(rows, range(spec.views)):
            x, row = self._views(rows, at, view).float() / 255, numbers[at]
            generator = RowRng.create(self.plan.spec.seed, "attack", name, rows=row, views=torch.full_like(row, view))
            y = self._labels(model, x, rows, at)
            x_adv = self.engine.craft(attack, model, x, y, generator=generator)
            deltas[at, view] = encode(x_adv, x, attack.threat, spec.scale)
        return deltas.cpu().numpy()

    def _answer(self, array: ArrayLayout, rows: slice, known: Mapping[int, np.ndarray]) -> np.ndarray:
        """A teacher's logits as the array holds them; views in `known` are not asked about again."""
        values, first = np.empty((rows.stop - rows.start, *array.shape[1:]), dtype=array.dtype), array.first_view
        for number, answers in known.items():
            values[:, number - first] = answers
        todo = [view for view in range(first, first + array.shape[1]) if view not in known]
        if todo:
            values[:, [view - first for view in todo]] = self._coded(array, rows, todo)
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
        dtype = getattr(torch, array.dtype) if array.kind == "logits" else torch.float32
        shape = (rows.stop - rows.start, len(todo), teacher.num_classes)
        values = torch.empty(shape, dtype=dtype, device=self.device)
        scale = 1.0 if attack is None else self.plan.spec.attacks[attack].scale
        added = None if attack is None else self._stored_delta(attack, rows)
        for at, view in self._batches(rows, todo):
            x = self._views(rows, at, view)
            if added is not None:
                x = x + scale * added[at, view]
            values[at, todo.index(view)] = model(x.float() / 255).to(dtype)
        return values.cpu().numpy()

    def _jacobian(self, array: ArrayLayout, rows: slice) -> tuple[np.ndarray, ...]:
        """Values, scales and classes: three arrays from one computation, which is kept for the other two."""
        teacher, key = array.teacher, (array.teacher, rows.start, rows.stop)
        if self._slopes is None or self._slopes[0] != key:
            model, parts = self._model(teacher), []
            for at, view in self._batches(rows, range(1)):
                x = self._views(rows, at, view).float() / 255
                try:
                    parts.append(jacobian_rows(model, x, self._labels(model, x, rows, at), array.shape[1]))
                except ModelError as error:
                    where = f"rows {rows.start + at.start}..{rows.start + at.stop - 1}"
                    raise ModelError(f"teacher '{teacher}' on {where}: {error}; leave it out of 'jacobians'") from error
            self._slopes = (key, as_arrays(parts))
        return self._slopes[1]

    @torch.no_grad()
    def _labels(self, model: Callable[[Tensor], Tensor], x: Tensor, rows: slice, at: slice) -> Tensor:
        """Labels of a batch; of a row that has none (-1), what the model itself says about its view `x`."""
        labels = self._resident(rows)[1][at]
        if rows.start + at.stop <= self.plan.spec.data.labelled:
            return labels
        return torch.where(labels < 0, model(x).argmax(1), labels)

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

    def _batches(self, rows: slice, views: Iterable[int]) -> Iterator[tuple[slice, int]]:
        """Rows, counted from the first, and their view, one view after the other: the batch that a view's answer is
        computed in, and so its last bits, do not depend on which other views there are. So views can be added later.
        """
        count = rows.stop - rows.start
        for view in views:
            for start in range(0, count, self.batch_size):
                yield slice(start, min(start + self.batch_size, count)), view

    def _resident(self, rows: slice) -> tuple[Tensor | None, Tensor]:
        """Images (uint8) and labels of some rows on the device, sent once for all views and units of a shard.

        Images that differ in size stay where they are: None.
        """
        if self._block is None or self._block[0] != rows:
            labels, pixels = torch.from_numpy(self.plan.source.labels[rows]), None
            self._block, self._stored = None, {}  # before more is sent
            if not self._images.differ:
                pixels = torch.from_numpy(np.asarray(self._images.pixels(rows)))
            images = None if pixels is None else send(pixels, self.device)
            self._block = rows, images, send(labels, self.device)
        return self._block[1:]

    def _stored_delta(self, attack: str, rows: slice) -> Tensor:
        """Perturbations of some rows as they are stored, read and sent once for all teachers."""
        self._resident(rows)
        if attack not in self._stored:
            delta = self.store.read(self.plan.arrays[f"delta/{attack}"], rows)
            self._stored[attack] = send(torch.from_numpy(delta), self.device)
        return self._stored[attack]

    def _views(self, rows: slice, at: slice, view: int) -> Tensor:
        images, size = self._resident(rows)[0], self.plan.spec.views.size
        if images is None:
            return send(torch.from_numpy(self._images.crops(rows, at, view)), self.device)
        if size:
            return resample_batch(
                images[at], send(torch.from_numpy(self._images.boxes(rows)[at, view]), self.device), size
            )
        return apply_views(images[at], self._offsets[view].expand(len(images[at]), -1))

    @functools.cached_property
    def _offsets(self) -> Tensor:
        return send(self.plan.offsets, self.device)


@contextlib.contextmanager
def arithmetic(precision: PrecisionSpec) -> Iterator[None]:
    """The precision flags of a spec, until the block ends; products in bfloat16 are summed in float32 throughout."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32, matmul.allow_bf16_reduced_precision_reduction
    try:
        matmul.allow_tf32 = cudnn.allow_tf32 = precision.tf32
        matmul.allow_bf16_reduced_precision_reduction = False
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32, matmul.allow_bf16_reduced_precision_reduction = before
