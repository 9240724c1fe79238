"""Read the arrays a trainer needs: of a whole cache, or of some of its rows."""

import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from darht.cache.format.layout import BOXES, CLEAN_FROM, JACOBIAN_PARTS
from darht.cache.format.logit_codes import companion_suffix
from darht.cache.read.more_views import further_views
from darht.cache.read.reader import Cache
from darht.cache.read.sizes import needed_bytes
from darht.cache.read.training_set import Jacobian, TrainingSet
from darht.core.errors import ConfigError
from darht.core.storage_remote import IN_FLIGHT, RemoteStorage

GIB = 2**30
THREADS = min(8, os.cpu_count() or 1)  # reading, hashing and decompressing release the interpreter's lock


def reading_threads(cache: Cache) -> int:
    """Threads that read a cache: a core's work each, or a request's where nothing is copied from a URL."""
    return IN_FLIGHT if isinstance(cache.folder, RemoteStorage) else THREADS


def training_rows(cache: Cache) -> np.ndarray:
    """The rows to train on, int64, in order: those that are neither held out nor excluded."""
    trained = np.ones(cache.rows, dtype=bool)
    trained[np.array([*cache.manifest.holdout, *cache.excluded], dtype=np.int64)] = False
    return np.flatnonzero(trained)


def allocate(
    cache: Cache,
    rows: int,
    *,
    adversarial: bool,
    jacobians: bool = False,
    logits: bool = True,
    one_view: bool = False,
    having: Sequence[int] | None = None,
) -> TrainingSet:
    """A set with room for `rows` rows, whose contents `fill` brings; of clean answers in one view where asked.

    `having` says how many of them may have the views of each band but the first; None for as many as there are.

    Raises:
        ConfigError: a Jacobian is needed that the cache does not hold.
    """
    spec = cache.spec
    teachers, attacks = tuple(spec.teachers) if logits else (), tuple(spec.attacks) if adversarial else ()
    T, image, part = len(teachers), spec.view_shape, companion_suffix(spec.store)

    def answers(about: str, part: str = "") -> Tensor:
        if not teachers:
            views = spec.bands[0].stop if about == "clean" else spec.attacks[about].views
            return _room(rows, views, 0, len(spec.data.classes), dtype="float16")
        array = cache.arrays[f"logits/{teachers[0]}/{about}{part}"]
        views = 1 if one_view and about == "clean" else array.shape[1]
        return _room(rows, views, T, array.shape[2], dtype=array.dtype)

    def slopes(teacher: str) -> Jacobian:
        if teacher not in spec.jacobians:
            raise ConfigError(f"teacher '{teacher}' has no Jacobian in {cache.folder}; list it under 'jacobians'")
        K = cache.arrays[f"logits/{teacher}/{JACOBIAN_PARTS[0]}"].shape[1]
        values = torch.empty(rows, K, *image, dtype=torch.int8)
        return Jacobian(values, torch.empty(rows, K), torch.empty(rows, K, dtype=torch.int16))

    cache.check_decoder()
    numbers, V, coded = _room(rows, dtype="int64"), spec.views.count, spec.store.encoded
    return TrainingSet(
        rows=numbers,
        keys=numbers,
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
        companions=tuple(answers(about, part) for about in ("clean", *attacks)) if part and teachers else (),
        classes=len(spec.data.classes),
        same_view=spec.store.rows_per_chunk if spec.store.by_view else 1,
        held=_room(rows, 1, dtype="int64") if one_view else None,
    )


def _room(*shape: int, dtype: str) -> Tensor:
    """Memory from numpy, which asks for huge pages, and torch does not: random rows are then read a quarter faster."""
    return torch.from_numpy(np.empty(shape, dtype=dtype))


def _answers(cache: Cache, data: TrainingSet) -> Iterator[tuple[list[str], Tensor]]:
    """The teachers' arrays of one kind, and the tensor that holds them on axis 2."""
    kinds, part = ("clean", *data.attacks), companion_suffix(cache.spec.store)
    for suffix, tensors in (("", (data.clean, *data.adversarial)), (part, data.companions)):
        for about, tensor in zip(kinds, tensors, strict=False):
            yield [f"logits/{teacher}/{about}{suffix}" for teacher in data.teachers], tensor


def array_names(cache: Cache, data: TrainingSet) -> list[str]:
    """The arrays of a cache that a set holds."""
    logits = [name for names, _ in _answers(cache, data) for name in names]
    logits += [f"logits/{teacher}/{CLEAN_FROM}{more.first}" for more in data.more for teacher in data.teachers]
    slopes = [f"logits/{teacher}/{part}" for teacher in data.teachers for part in JACOBIAN_PARTS if data.jacobians]
    boxes = [] if data.boxes is None else [BOXES]
    return ["label", "image", *boxes, *(f"delta/{name}" for name in data.attacks), *logits, *slopes]


def fill(
    cache: Cache,
    data: TrainingSet,
    at: int,
    rows: slice,
    *,
    choose: Callable[[Tensor], Tensor] | None = None,
    slots: Sequence[int] | None = None,
) -> None:
    """Read rows of a cache into a set, from position `at` on.

    Args:
        cache: which.
        data: from `allocate`.
        at: the first position.
        rows: of the cache.
        choose: gives the view of each of these rows, int64; for a set that holds one view of each.
        slots: where in each of `more` their further views begin; None for a set of all rows, each at its own number.

    Raises:
        CorruptError: a checksum fails.
    """
    here = slice(at, at + rows.stop - rows.start)
    labels = np.empty(rows.stop - rows.start, dtype=cache.arrays["label"].dtype)
    out = {"label": labels, "image": data.images[here].numpy() if data.encoded is None else data.encoded[here]}
    if data.boxes is not None:
        out[BOXES] = data.boxes[here].numpy()
    out |= {f"delta/{name}": deltas[here].numpy() for name, deltas in zip(data.attacks, data.deltas, strict=True)}
    apart: dict[str, np.ndarray] = {}
    for names, tensor in _answers(cache, data):
        alone = data.held is not None and cache.arrays[names[0]].attack is None
        into = apart if alone else out
        into |= {name: tensor[here, 0 if alone else slice(None), t].numpy() for t, name in enumerate(names)}
    for name, jacobian in zip(data.teachers, data.jacobians, strict=False):
        parts = (jacobian.values, jacobian.scales, jacobian.classes)
        out |= {f"logits/{name}/{part}": t[here].numpy() for part, t in zip(JACOBIAN_PARTS, parts, strict=True)}
    cache.read_into(out, rows)
    for number, more in enumerate(data.more):
        more.fill(cache, data.teachers, rows.start if slots is None else slots[number], rows)
    data.labels[here] = torch.from_numpy(labels).long()
    data.rows[here] = torch.arange(rows.start, rows.stop)
    if data.held is not None and choose is not None:
        data.held[here, 0] = choose(data.rows[here])
        _fill_view(cache, apart, rows, data.held[here, 0].tolist())


def _fill_view(cache: Cache, out: dict[str, np.ndarray], rows: slice, views: list[int]) -> None:
    """Read the drawn view of each row; neighbours that drew the same are read together."""
    start = 0
    for view, group in itertools.groupby(views):
        stop = start + len(list(group))
        for name, values in out.items():
            cache.read_view(name, slice(rows.start + start, rows.start + stop), view, values[start:stop])
        start = stop


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
    cache.prefetch(array_names(cache, data), range(label.shards))
    with ThreadPoolExecutor(reading_threads(cache)) as pool:
        shards = [label.rows(shard) for shard in range(label.shards)]
        list(pool.map(lambda rows: fill(cache, data, rows.start, rows), shards))
    return data.to(device)
