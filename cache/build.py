"""The offline stage: craft perturbations, ask every teacher, and store both, unit by unit.

The main path is `build`: resolve the spec, claim the folder, then for every shard compute each array that is not done.
"""

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from darht.attacks.exact import encode
from darht.cache.commit import Commit, State, environment, unit_state, write_commit
from darht.cache.layout import ArrayLayout, check_chunks, layouts
from darht.cache.source import Source, load_source
from darht.cache.spec import CacheSpec, PrecisionSpec, load_config, resolve
from darht.cache.store import Store
from darht.cache.teachers import Teacher, load_teacher
from darht.cache.views import apply_views, view_table
from darht.core.config import canonical_json, spec_diff, to_plain
from darht.core.errors import CacheError, CorruptError, ModelError, SpecMismatchError
from darht.core.places import LocalPlace, Location, Place, place
from darht.core.rng import RowRng

SPEC, ORIGIN = "spec.json", "origin.json"
OnUnit = Callable[[ArrayLayout, int, float], None]


@dataclass
class BuildReport:
    """What a build did: units computed and reused, and seconds by array."""

    computed: int = 0
    reused: int = 0
    seconds: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Plan:
    """Everything a build needs, loaded and checked before the first unit is computed."""

    spec: CacheSpec
    source: Source
    offsets: Tensor
    teachers: dict[str, Teacher]
    arrays: dict[str, ArrayLayout]
    origin: dict[str, object]

    @property
    def units(self) -> list[tuple[ArrayLayout, int]]:
        """All units in the order of work: shard by shard, inputs before what is made from them."""
        shards = max(array.shards for array in self.arrays.values())
        return [(array, k) for k in range(shards) for array in self.arrays.values() if k < array.shards]


def plan_build(config_path: Path, *, device: torch.device, download: bool = False) -> Plan:
    """Load data and teachers and resolve the spec.

    Raises:
        ConfigError, DataError, ModelError: whatever is wrong with the config, the images or the teachers.
    """
    config, base = load_config(config_path), config_path.parent
    data = config.data
    root = None if data.root is None else base / Path(data.root).expanduser()
    folders = {name: base / Path(teacher.path).expanduser() for name, teacher in config.teachers.items()}
    source = load_source(data.source, root, data.split, limit=data.limit, image_size=data.image_size, download=download)
    loaded = {name: load_teacher(folder, device) for name, folder in folders.items()}
    offsets = view_table(**vars(config.views), seed=config.seed)
    spec = resolve(config, source, {name: card for name, (_, card) in loaded.items()}, len(offsets))
    arrays = layouts(spec)
    check_chunks(arrays)
    for name, (teacher, card) in loaded.items():
        _try_teacher(name, teacher, card.num_classes, torch.from_numpy(source.images[:1]).to(device))
    return Plan(
        spec=spec,
        source=source,
        offsets=torch.from_numpy(offsets),
        teachers={name: teacher for name, (teacher, _) in loaded.items()},
        arrays=arrays,
        origin={
            "data_root": None if root is None else str(root.resolve()),
            "image_size": data.image_size,
            "teachers": {name: str(folder.resolve()) for name, folder in folders.items()},
        },
    )


def _try_teacher(name: str, teacher: Teacher, num_classes: int, images: Tensor) -> None:
    """One forward pass before the first unit: a teacher made for other images would else fail after hours of work."""
    size = "x".join(map(str, images.shape[1:]))
    try:
        with torch.no_grad():
            shape = tuple(teacher(images.float() / 255).shape)
    except Exception as error:  # timm asserts, torch and user code refuse sizes in their own ways
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ModelError(
            f"teacher '{name}' does not take images of {size} ({reason}); give its card the resize that it needs"
        ) from error
    if shape != (len(images), num_classes):
        raise ModelError(
            f"teacher '{name}' must give logits of shape {(len(images), num_classes)}, as its card says; "
            f"got {shape} for images of {size}"
        )


def build(plan: Plan, out: Location, *, device: torch.device, batch_size: int = 256, on_unit: OnUnit) -> BuildReport:
    """Compute every unit of `plan` that `out` does not hold yet, or holds damaged.

    Args:
        plan: from `plan_build`.
        out: the cache's folder or URL; made when absent, continued when it holds the same spec.
        device: where teachers and attacks run.
        batch_size: images in one forward pass; batches are cut inside a shard, so the bytes do not depend on
            which worker computes it.
        on_unit: called after every unit with its array, shard and seconds (0 when it was there already).

    Raises:
        SpecMismatchError: the folder holds another spec; the message lists the differing fields.
        CacheError: the folder holds something that is not a cache.
    """
    folder = place(out)
    claim_folder(folder, plan)
    store, report = Store(folder), BuildReport()
    facts = environment(device, batch_size)
    worker = Worker(plan, store, device, batch_size)
    with _precision(plan.spec.precision):
        for array, shard in plan.units:
            if unit_state(folder, array, shard, check_bytes=True)[0] is State.DONE:
                report.reused += 1
                on_unit(array, shard, 0.0)
                continue
            start = time.perf_counter()
            size, sha256 = store.write(array, shard, worker.compute(array, shard))
            seconds, rows = time.perf_counter() - start, array.rows(shard)
            commit = Commit(array.name, shard, (rows.start, rows.stop), array.fingerprint, size, sha256, seconds, facts)
            write_commit(folder, array, commit)
            report.computed += 1
            report.seconds[array.name] = report.seconds.get(array.name, 0.0) + seconds
            on_unit(array, shard, seconds)
    return report


def claim_folder(out: Place, plan: Plan) -> None:
    """Make `out` the folder of this spec, or check that it is already.

    Raises:
        SpecMismatchError: it holds another spec.
        CacheError: it is not empty and not a cache, or it is a file.
        CorruptError: its spec does not parse.
    """
    text, found = canonical_json(plan.spec).encode(), out.read(SPEC)
    if found is not None and found != text:
        _refuse_other_spec(out, found, plan.spec)
    if found is None and not out.is_free():
        raise CacheError(f"{out} is not empty and holds no {SPEC}: choose a new or empty --out folder")
    if found is None:
        out.write(SPEC, text)
    Store(out).create(plan.arrays)
    origin = _relative_origin(plan.origin, out.folder) if isinstance(out, LocalPlace) else plan.origin
    out.write(ORIGIN, (json.dumps(origin, indent=2) + "\n").encode())


def _refuse_other_spec(out: Place, data: bytes, spec: CacheSpec) -> NoReturn:
    try:
        found = json.loads(data)
    except ValueError as error:
        raise CorruptError(f"{out.name(SPEC)} is not a cache spec: {error}; choose another --out folder") from error
    differences = spec_diff(found, to_plain(spec)) or ["only the way it is written"]
    raise SpecMismatchError(f"{out} holds another spec: {'; '.join(differences)}; choose another --out folder")


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

    def compute(self, array: ArrayLayout, shard: int) -> np.ndarray:
        """The values of one unit, `[rows, ...]`, in the array's type."""
        rows = array.rows(shard)
        match array.name.split("/"):
            case ["source_index"]:
                return np.arange(rows.start, rows.stop, dtype=np.int64)
            case ["label"]:
                return self.plan.source.labels[rows].astype(array.dtype)
            case ["image"]:
                return self.plan.source.images[rows]
            case ["views", "offset"]:
                return self.plan.offsets.numpy()
            case ["delta", attack]:
                return self._perturb(attack, rows)
            case ["logits", teacher, "clean"]:
                return self._ask(teacher, None, rows, array)
            case ["logits", teacher, attack]:
                return self._ask(teacher, attack, rows, array)
        raise AssertionError(f"no rule computes {array.name}")

    def _perturb(self, name: str, rows: slice) -> np.ndarray:
        spec = self.plan.spec.attacks[name]
        attack, model = spec.attack(), self._model(spec.teacher)
        labels = torch.from_numpy(self.plan.source.labels)
        deltas = []
        for row, view in self._batches(rows, spec.views):
            x = self._views(row, view).to(self.device).float() / 255
            generator = RowRng.create(
                self.plan.spec.seed, "attack", name, rows=row.to(self.device), views=view.to(self.device)
            )
            x_adv = attack(model, x, labels[row].to(self.device), generator=generator)
            deltas.append(encode(x_adv, x, attack.threat, spec.unit).cpu())
        return torch.cat(deltas).view(-1, spec.views, *self.plan.spec.data.image_shape).numpy()

    @torch.no_grad()
    def _ask(self, teacher: str, attack: str | None, rows: slice, array: ArrayLayout) -> np.ndarray:
        """What a teacher says about the stored pixels: clean views, or views plus stored perturbation."""
        views, model = array.shape[1], self._model(teacher)
        unit = 1.0 if attack is None else self.plan.spec.attacks[attack].unit
        delta = None if attack is None else self.store.read(self.plan.arrays[f"delta/{attack}"], rows)
        logits = []
        for row, view in self._batches(rows, views):
            x = self._views(row, view)
            if delta is not None:
                x = x + unit * torch.from_numpy(delta[(row - rows.start).numpy(), view.numpy()])
            logits.append(model(x.to(self.device).float() / 255).cpu())
        exact = torch.cat(logits).view(-1, *array.shape[1:]).numpy()
        with np.errstate(over="ignore"):  # the next lines say it better
            values = exact.astype(array.dtype)
        if not np.isfinite(values).all():
            where = f"rows {rows.start}..{rows.stop - 1}"
            raise ModelError(
                f"teacher '{teacher}' gave logits that are not finite in {array.dtype} on {where}; "
                f"use store.logits: float32, or another teacher"
            )
        return values

    def _model(self, name: str) -> Callable[[Tensor], Tensor]:
        teacher = self.plan.teachers[name]
        if not self.plan.spec.precision.amp:
            return teacher

        def answer(x: Tensor) -> Tensor:
            with torch.autocast(self.device.type, torch.bfloat16):
                logits: Tensor = teacher(x)
            return logits.float()

        return answer

    def _batches(self, rows: slice, views: int) -> Iterator[tuple[Tensor, Tensor]]:
        row = torch.arange(rows.start, rows.stop).repeat_interleave(views)
        view = torch.arange(views).repeat(rows.stop - rows.start)
        yield from zip(row.split(self.batch_size), view.split(self.batch_size), strict=True)

    def _views(self, row: Tensor, view: Tensor) -> Tensor:
        return apply_views(torch.from_numpy(self.plan.source.images)[row], self.plan.offsets[view])


@contextlib.contextmanager
def _precision(precision: PrecisionSpec) -> Iterator[None]:
    backends: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [backend.allow_tf32 for backend in backends]
    try:
        for backend in backends:
            backend.allow_tf32 = precision.tf32
        yield
    finally:
        for backend, value in zip(backends, before, strict=True):
            backend.allow_tf32 = value
