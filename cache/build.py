"""The offline stage: craft perturbations, ask every teacher, and store both, unit by unit.

The main path is `build`: claim the folder, then for every row block (shard number k of all arrays) compute each unit
that is not done. `cache/distribute.py` shares the row blocks among workers and jobs.
"""

import contextlib
import functools
import json
import os
import time
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from darht.attacks.exact import encode
from darht.cache.commit import Commit, State, environment, unit_state, write_commit
from darht.cache.history import History, growth_problems, read_history
from darht.cache.jacobian import as_arrays, jacobian_rows
from darht.cache.layout import JACOBIAN_PARTS, ArrayLayout, check_chunks, layouts
from darht.cache.source import Source
from darht.cache.spec import CacheSpec, PrecisionSpec, data_root, load_config, load_images, resolve
from darht.cache.store import Store
from darht.cache.teachers import Card, Teacher, is_teacher_folder, load_teacher
from darht.cache.views import apply_views, view_table
from darht.core.config import canonical_json, parse_canonical, spec_diff, to_plain
from darht.core.errors import CacheError, ConfigError, CorruptError, ModelError, SpecMismatchError
from darht.core.nets import check_pixels
from darht.core.places import LocalPlace, Location, Place, place
from darht.core.rng import RowRng

SPEC, ORIGIN = "spec.json", "origin.json"
OnUnit = Callable[[ArrayLayout, int, float], None]
_GONE = "but its folder is gone: give the path where its card and weights lie now"
_NOTHING: Mapping[int, np.ndarray] = types.MappingProxyType({})


@dataclass
class BuildReport:
    """What a build did: units computed and reused, and seconds by array."""

    computed: int = 0
    reused: int = 0
    seconds: dict[str, float] = field(default_factory=dict)

    def add(self, array: str, seconds: float) -> None:
        """Count one unit; 0 seconds say that it was there."""
        self.reused += seconds == 0
        self.computed += seconds > 0
        if seconds > 0:
            self.seconds[array] = self.seconds.get(array, 0.0) + seconds


@dataclass(frozen=True)
class Plan:
    """Everything a build needs, loaded and checked before the first unit is computed.

    `teachers` lacks those of the spec whose folders are gone: what they said may all be stored already.
    """

    spec: CacheSpec
    source: Source
    offsets: Tensor
    teachers: dict[str, Teacher]
    arrays: dict[str, ArrayLayout]
    origin: dict[str, object]

    @property
    def shards(self) -> int:
        """How many row blocks there are."""
        return max(array.shards for array in self.arrays.values())

    def block(self, shard: int) -> list[ArrayLayout]:
        """The arrays of one row block in the order of work: inputs before what is made from them."""
        return [array for array in self.arrays.values() if shard < array.shards]

    @property
    def units(self) -> list[tuple[ArrayLayout, int]]:
        """All units in the order of work."""
        return [(array, shard) for shard in range(self.shards) for array in self.block(shard)]


def plan_build(
    config_path: Path, *, device: torch.device, download: bool = False, known: CacheSpec | None = None
) -> Plan:
    """Load data and teachers and resolve the spec.

    Args:
        config_path: the YAML file.
        device: where the teachers go.
        download: fetch CIFAR when its files are not there.
        known: what the cache to be continued was made from; it stands in for teachers whose folders are gone.

    Raises:
        ConfigError, DataError, ModelError: whatever is wrong with the config, the images or the teachers.
    """
    config, base = load_config(config_path), config_path.parent
    root, source = data_root(config.data, base), load_images(config.data, base, download=download)
    folders = {name: base / Path(teacher.path).expanduser() for name, teacher in config.teachers.items()}
    loaded = {name: _load_or_recall(name, folder, device, known) for name, folder in folders.items()}
    views = len(view_table(**vars(config.views), seed=config.seed))
    spec = resolve(config, source, {name: card for name, (_, card) in loaded.items()}, views)
    offsets = view_table(**vars(spec.views), seed=spec.seed)  # "all" and their number are one spec: one order too
    arrays = layouts(spec)
    check_chunks(arrays)
    for name, (teacher, card) in loaded.items():
        if teacher is not None:
            image, fix = torch.from_numpy(source.images[:1]).to(device), "give its card the resize that it needs"
            check_pixels(teacher, image, f"teacher '{name}'", fix=fix, num_classes=card.num_classes)
    return Plan(
        spec=spec,
        source=source,
        offsets=torch.from_numpy(offsets),
        teachers={name: teacher for name, (teacher, _) in loaded.items() if teacher is not None},
        arrays=arrays,
        origin={
            "data_root": None if root is None else str(root.resolve()),
            "image_size": config.data.image_size,
            "teachers": {name: str(folder.resolve()) for name, folder in folders.items()},
        },
    )


def spec_in(out: Location) -> CacheSpec | None:
    """The spec that lies in a folder or behind a URL, or None where there is none that can be read."""
    data = place(out).read(SPEC)
    try:
        return None if data is None else parse_canonical(CacheSpec, data, SPEC)
    except ConfigError:
        return None  # whoever claims the folder says what is wrong with it


def _load_or_recall(
    name: str, folder: Path, device: torch.device, known: CacheSpec | None
) -> tuple[Teacher | None, Card]:
    if known is None or name not in known.teachers or is_teacher_folder(folder):
        return load_teacher(folder, device)
    return None, Card(**{key: value for key, value in vars(known.teachers[name]).items() if key != "role"})


def build(
    plan: Plan,
    out: Location,
    *,
    device: torch.device,
    batch_size: int = 256,
    shards: Sequence[int] | None = None,
    on_unit: OnUnit,
) -> BuildReport:
    """Compute every unit of `plan` that `out` does not hold yet, or holds damaged.

    Args:
        plan: from `plan_build`.
        out: the cache's folder or URL; made when absent, continued when it holds the same spec.
        device: where teachers and attacks run.
        batch_size: images in one forward pass; batches are cut inside a shard, so the bytes do not depend on
            which worker computes it.
        shards: the row blocks to build; None for all of them.
        on_unit: called after every unit with its array, shard and seconds (0 when it was there already).

    Raises:
        SpecMismatchError: the folder holds another spec; the message lists the differing fields.
        CacheError: the folder holds something that is not a cache.
        ModelError: a teacher that must answer is not at hand.
    """
    folder = place(out)
    claim_folder(folder, plan)
    check_teachers(folder, plan)
    worker, report = Worker(plan, Store(folder), device, batch_size), BuildReport()

    def count(array: ArrayLayout, shard: int, seconds: float) -> None:
        report.add(array.name, seconds)
        on_unit(array, shard, seconds)

    for shard in range(plan.shards) if shards is None else shards:
        build_block(worker, shard, on_unit=count)
    return report


def build_block(worker: "Worker", shard: int, *, on_unit: OnUnit, engine: str = "local", number: int = 0) -> None:
    """Compute what is not done of one row block: shard number `shard` of every array.

    Args:
        worker: what computes.
        shard: number of the row block.
        on_unit: called after every unit, as in `build`.
        engine: of the build, for the commit records.
        number: of the worker, likewise.
    """
    folder = worker.store.place
    facts = environment(worker.device, worker.batch_size, engine=engine, worker=number)
    with arithmetic(worker.plan.spec.precision):
        for array in worker.plan.block(shard):
            if unit_state(folder, array, shard, check_bytes=True)[0] is State.DONE:
                on_unit(array, shard, 0.0)
                continue
            start = time.perf_counter()
            size, sha256 = worker.store.write(array, shard, worker.compute(array, shard))
            seconds, rows = time.perf_counter() - start, array.rows(shard)
            commit = Commit(array.name, shard, (rows.start, rows.stop), array.fingerprint, size, sha256, seconds, facts)
            write_commit(folder, array, commit)
            on_unit(array, shard, seconds)


def claim_folder(out: Place, plan: Plan) -> None:
    """Make `out` the folder of this spec, or check that it is already.

    Raises:
        SpecMismatchError: it holds another spec.
        CacheError: it is not empty and not a cache, or it is a file.
        CorruptError: its spec does not parse.
    """
    text, found = canonical_json(plan.spec).encode(), out.read(SPEC)
    if found is None and not out.is_free():
        found = out.read(SPEC)  # another builder may have begun between the two looks; it writes the spec first
        if found is None:
            raise CacheError(f"{out} is not empty and holds no {SPEC}: choose a new or empty --out folder")
    if found is None:
        out.write(SPEC, text)
        found = out.read(SPEC)  # of two builders that begin at once, the one with the other spec stops here
    if found is not None and found != text:
        _refuse_other_spec(out, found, plan.spec)
    Store(out).create(plan.arrays)
    origin = _relative_origin(plan.origin, out.folder) if isinstance(out, LocalPlace) else plan.origin
    out.write(ORIGIN, (json.dumps(origin, indent=2) + "\n").encode())


def _refuse_other_spec(out: Place, data: bytes, spec: CacheSpec) -> NoReturn:
    try:
        found = json.loads(data)
    except ValueError as error:
        raise CorruptError(f"{out.name(SPEC)} is not a cache spec: {error}; choose another --out folder") from error
    differences, old = spec_diff(found, to_plain(spec)) or ["only the way it is written"], spec_in(out)
    grows = old is not None and not growth_problems(old, spec)
    fix = f"darht-cache extend {out} SPEC.yaml adds that and keeps the rest, or " if grows else ""
    raise SpecMismatchError(f"{out} holds another spec: {'; '.join(differences)}; {fix}choose another --out folder")


def check_teachers(out: Place, plan: Plan) -> None:
    """A teacher whose folder is gone is missed only where a unit needs it, and then before the first is computed.

    Raises:
        ModelError: a teacher that must answer is not at hand.
    """
    absent = plan.spec.teachers.keys() - plan.teachers.keys()
    for array, shard in plan.units if absent else ():
        name = array.teacher(plan.spec)
        if name in absent and unit_state(out, array, shard)[0] is not State.DONE:
            raise ModelError(f"teacher '{name}' must compute {array.name} shard {shard}, {_GONE}")


def _relative_origin(origin: dict[str, object], out: Path) -> dict[str, object]:
    """Paths relative to the cache, so that a folder that holds data, teachers and cache can be moved as a whole."""

    def relative(value: object) -> object:
        if isinstance(value, dict):
            return {key: relative(item) for key, item in value.items()}
        return os.path.relpath(value, out.resolve()) if isinstance(value, str) else value

    return {key: relative(value) for key, value in origin.items()}


class Worker:
    """Computes the values of any unit, from the images, the teachers, and units that are done."""

    def __init__(self, plan: Plan, store: Store, device: torch.device, batch_size: int) -> None:
        self.plan, self.store, self.device, self.batch_size = plan, store, device, batch_size
        self._slopes: tuple[tuple[str, int], tuple[np.ndarray, ...]] | None = None

    @functools.cached_property
    def history(self) -> History:
        """What the cache was before it was extended."""
        return read_history(self.store.place)

    def compute(self, array: ArrayLayout, shard: int) -> np.ndarray:
        """The values of one unit, `[rows, ...]`, in the array's type; answers that a former spec's unit holds stay."""
        return self.values(
            array, array.rows(shard), self.history.answers(self.store, array, shard, self.plan.offsets.numpy())
        )

    def values(self, array: ArrayLayout, rows: slice, known: Mapping[int, np.ndarray] = _NOTHING) -> np.ndarray:
        """The values of any rows; `known` are clean logits `[rows, C]` by view.

        They have the bits of the whole unit's when `rows` is made of the batches that the unit was cut into.
        """
        match array.name.split("/"):
            case ["source_index"]:
                return np.arange(rows.start, rows.stop, dtype=np.int64)
            case ["label"]:
                return self.plan.source.labels[rows].astype(array.dtype)
            case ["image"]:
                return self.plan.source.images[rows]
            case ["views", "offset"]:
                return self.plan.offsets.numpy()[rows]
            case ["delta", attack]:
                return self._perturb(attack, rows)
            case ["logits", teacher, part] if part in JACOBIAN_PARTS:
                return self._jacobian(teacher, rows, array)[JACOBIAN_PARTS.index(part)]
            case ["logits", teacher, "clean"]:
                return self._ask(teacher, None, rows, array, known)
            case ["logits", teacher, attack]:
                return self._ask(teacher, attack, rows, array, _NOTHING)
        raise AssertionError(f"no rule computes {array.name}")

    def _perturb(self, name: str, rows: slice) -> np.ndarray:
        spec = self.plan.spec.attacks[name]
        attack, model = spec.attack(), self._model(spec.teacher)
        labels = torch.from_numpy(self.plan.source.labels)
        deltas = torch.empty((rows.stop - rows.start, spec.views, *self.plan.spec.data.image_shape), dtype=torch.int8)
        for row, view in self._batches(rows, range(spec.views)):
            x = self._views(row, view).to(self.device).float() / 255
            generator = RowRng.create(
                self.plan.spec.seed, "attack", name, rows=row.to(self.device), views=view.to(self.device)
            )
            x_adv = attack(model, x, labels[row].to(self.device), generator=generator)
            deltas[row - rows.start, view] = encode(x_adv, x, attack.threat, spec.unit).cpu()
        return deltas.numpy()

    @torch.no_grad()
    def _ask(
        self, teacher: str, attack: str | None, rows: slice, array: ArrayLayout, known: Mapping[int, np.ndarray]
    ) -> np.ndarray:
        """What a teacher says about the stored pixels: clean views, or views plus stored perturbation.

        Views in `known` are not asked about again.
        """
        values = np.empty((rows.stop - rows.start, *array.shape[1:]), dtype=array.dtype)
        for number, answers in known.items():
            values[:, number] = answers
        todo = [view for view in range(array.shape[1]) if view not in known]
        model = self._model(teacher) if todo else None
        unit = 1.0 if attack is None else self.plan.spec.attacks[attack].unit
        delta = None if attack is None else self.store.read(self.plan.arrays[f"delta/{attack}"], rows)
        for row, view in self._batches(rows, todo):
            x, at = self._views(row, view), ((row - rows.start).numpy(), view.numpy())
            if delta is not None:
                x = x + unit * torch.from_numpy(delta[at])
            assert model is not None
            with np.errstate(over="ignore"):  # the next lines say it better
                values[at] = model(x.to(self.device).float() / 255).cpu().numpy()
        if not np.isfinite(values).all():
            where = f"rows {rows.start}..{rows.stop - 1}"
            raise ModelError(
                f"teacher '{teacher}' gave logits that are not finite in {array.dtype} on {where}; "
                f"use store.logits: float32, or another teacher"
            )
        return values

    def _jacobian(self, teacher: str, rows: slice, array: ArrayLayout) -> tuple[np.ndarray, ...]:
        """Values, scales and classes: three arrays from one computation, which is kept for the other two."""
        key = (teacher, rows.start)
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

    def _model(self, name: str) -> Callable[[Tensor], Tensor]:
        if name not in self.plan.teachers:
            raise ModelError(f"teacher '{name}' must answer, {_GONE}")
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
        return apply_views(torch.from_numpy(self.plan.source.images)[row], self.plan.offsets[view])


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
