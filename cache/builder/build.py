"""The offline stage: craft perturbations, ask every teacher, and store both, unit by unit.

The main path is `build`: claim the folder, then for every row block (shard number k of all arrays) compute each unit
that is not done. `cache/builder/jobs.py` shares the row blocks among workers and jobs.
"""

import dataclasses
import os
import platform
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import PIL
import torch

from darht.cache.builder.compute import GONE, Worker, arithmetic
from darht.cache.builder.config import CacheConfig, data_root, load_config, load_images
from darht.cache.builder.history import growth_problems
from darht.cache.builder.pixels import first_views
from darht.cache.builder.plan import Plan
from darht.cache.builder.resolve import resolve
from darht.cache.builder.students import student_folder
from darht.cache.builder.teachers import Card, is_teacher_folder, load_teacher
from darht.cache.builder.writer import OnUnit, UnitWriter
from darht.cache.format.commit import State, unit_state
from darht.cache.format.layout import ArrayLayout, check_chunks, layouts
from darht.cache.format.manifest import ORIGIN, SPEC, relative_origin, write_remote_origin
from darht.cache.format.spec import RULES, CacheSpec
from darht.cache.format.store import Store
from darht.cache.format.views import view_table
from darht.cache.sources.encoded import EncodedImages, index_key, read_index, write_index
from darht.cache.sources.mixture import MixedSource
from darht.core.bounded import read_json
from darht.core.config import canonical_json, parse_canonical, spec_diff, to_plain
from darht.core.errors import CacheError, ConfigError, CorruptError, ModelError, SpecMismatchError
from darht.core.memory import give_back
from darht.core.nets import check_pixels
from darht.core.nets.classifier import Classifier
from darht.core.sealed import seal_json
from darht.core.storage import LocalStorage, Location, Storage, open_storage
from darht.core.trust import trusting
from darht.core.version import VERSION
from darht.core.zoo import absolute, in_zoo, teacher_at

_PROCESS = secrets.token_hex(6)  # tells processes of several machines apart, and names none of these


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


def plan_build(
    wanted: Path | CacheConfig,
    *,
    device: torch.device,
    download: bool = False,
    skip_broken: bool = False,
    known: CacheSpec | None = None,
    trust_code: bool = False,
    out: Location | None = None,
) -> Plan:
    """Load data and teachers and resolve the spec.

    Args:
        wanted: the YAML file, to which its paths are relative; or a config, whose paths are relative to the current
            folder.
        device: where the teachers go.
        download: fetch CIFAR when its files are not there.
        skip_broken: leave image files out that cannot be decoded, as `skip_broken: true` under `data` says.
        known: what the cache to be continued was made from; it stands in for teachers whose folders are gone, and
            its images are read by the rules of that time.
        trust_code: call what `python:` names in the teachers' cards name, also where they were not made here.
        out: the cache, whose index of images spares reading again what did not change since.

    Raises:
        ConfigError, DataError, ModelError: whatever is wrong with the config, the images or the teachers.
    """
    config, base = (load_config(wanted), wanted.parent) if isinstance(wanted, Path) else (wanted, Path.cwd())
    rules = RULES if known is None else known.data.rules
    sources = [dataclasses.replace(one, skip_broken=one.skip_broken or skip_broken) for one in config.sources]
    roots = [data_root(one, base) for one in sources]
    indexes = [None if out is None else read_index(open_storage(out).read(index_key(k)), roots[k])
               for k in range(len(roots))]  # fmt: skip
    source = load_images(sources, base, mixed=config.mixed, download=download, rules=rules, indexes=indexes)
    folders = {name: teacher_at(teacher.path, base) for name, teacher in config.teachers.items()}
    with trusting(trust_code):
        loaded = {name: _load_or_recall(name, folder, device, known) for name, folder in folders.items()}
    views = len(view_table(**vars(config.views), seed=config.seed))
    spec = resolve(config, source, {name: card for name, (_, card) in loaded.items()}, views, rules)
    offsets = view_table(**vars(spec.views), seed=spec.seed)  # "all" and their number are one spec: one order too
    arrays = layouts(spec)
    check_chunks(arrays)
    for name, (teacher, card) in loaded.items():
        if teacher is not None:
            shown = first_views(source, np.zeros(1, dtype=np.int64), spec.views.size)
            image, fix = torch.from_numpy(shown).to(device), "give its card the resize that it needs"
            check_pixels(teacher, image, f"teacher '{name}'", fix=fix, num_classes=card.num_classes)
    return Plan(
        spec=spec,
        source=source,
        offsets=torch.from_numpy(offsets),
        teachers={name: teacher for name, (teacher, _) in loaded.items() if teacher is not None},
        arrays=arrays,
        origin={
            **_origin_of_data(roots),
            "image_size": sources[0].image_size,
            **({"skipped": source.skipped} if source.skipped else {}),
            "teachers": {name: absolute(folder) for name, folder in folders.items()},
        },
    )


def _origin_of_data(roots: Sequence[Path | None]) -> dict[str, object]:
    """Where the images lie: of the first source, and of the others by number."""
    paths = [None if root is None else str(root.resolve()) for root in roots]
    others = {str(number): path for number, path in enumerate(paths[1:], start=1)}
    return {"data_root": paths[0], **({"data_roots": others} if others else {})}


def spec_in(out: Location) -> CacheSpec | None:
    """The spec that lies in a folder or behind a URL, or None where there is none that can be read."""
    data = open_storage(out).read(SPEC)
    try:
        return None if data is None else parse_canonical(CacheSpec, data, SPEC)
    except ConfigError:
        return None  # whoever claims the folder says what is wrong with it


def _load_or_recall(
    name: str, folder: Path, device: torch.device, known: CacheSpec | None
) -> tuple[Classifier | None, Card]:
    there = in_zoo(folder) or is_teacher_folder(folder) or student_folder(folder) is not None
    if known is None or name not in known.teachers or there:
        return load_teacher(folder, device)
    return None, Card(**{key: value for key, value in vars(known.teachers[name]).items() if key != "role"})


def build(
    plan: Plan,
    out: Location,
    *,
    device: torch.device,
    batch_size: int | None = None,
    shards: Sequence[int] | None = None,
    on_unit: OnUnit,
) -> BuildReport:
    """Compute every unit of `plan` that `out` does not hold yet, or holds damaged.

    Args:
        plan: from `plan_build`.
        out: the cache's folder or URL; made when absent, continued when it holds the same spec.
        device: where teachers and attacks run.
        batch_size: images in one forward pass; None for 256, or what fits on a GPU. Batches are cut inside a shard,
            so the bytes do not depend on which worker computes it.
        shards: the row blocks to build; None for all of them.
        on_unit: called after every unit with its array, shard and seconds (0 when it was there already).

    Raises:
        SpecMismatchError: the folder holds another spec; the message lists the differing fields.
        CacheError: the folder holds something that is not a cache.
        ModelError: a teacher that must answer is not at hand.
    """
    folder = open_storage(out)
    claim_folder(folder, plan)
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
    folder = worker.store.storage
    facts = environment(worker.device, worker.batch_size, engine=engine, worker=number)
    with arithmetic(worker.plan.spec.precision), UnitWriter(worker.store, facts, on_unit) as writer:
        for array in worker.plan.block(shard):
            if unit_state(folder, array, shard, check_bytes=True)[0] is State.DONE:
                writer.wait()
                on_unit(array, shard, 0.0)
                continue
            if array.is_answer and array.attack is not None:
                writer.wait(f"delta/{array.attack}")  # which the teacher is asked about
            start = time.perf_counter()
            values = worker.compute(array, shard)
            writer.put(array, shard, values, time.perf_counter() - start)
            give_back()  # or else a build grows with its first blocks, by what decoding left


def claim_folder(out: Storage, plan: Plan) -> None:
    """Make `out` the folder of this spec, or check that it is already.

    Raises:
        SpecMismatchError: it holds another spec.
        CacheError: it is not empty and not a cache, or it is a file.
        CorruptError: its spec does not parse.
        ModelError: a teacher that must answer is not at hand.
    """
    text, found = canonical_json(plan.spec).encode(), out.read(SPEC)
    if found is None and not out.is_free():
        found = out.read(SPEC)  # another builder may have begun between the two looks; it writes the spec first
        if found is None:
            raise CacheError(f"{out} is not empty and holds no {SPEC}: choose a new or empty --out folder")
    if found is None:
        out.write(SPEC, text)
        found = out.read(SPEC)  # of two builders that begin at once, the one with the other spec stops here
    if found is not None and found != text and not _same_but_rules(out, plan.spec):
        _refuse_other_spec(out, found, plan.spec)
    Store(out).create(plan.arrays)
    if isinstance(out, LocalStorage):
        out.write(ORIGIN, seal_json(relative_origin(plan.origin, out.folder)))
    else:
        write_remote_origin(out, plan.origin)
    for number, part in enumerate(plan.source.parts if isinstance(plan.source, MixedSource) else (plan.source,)):
        if isinstance(part.images, EncodedImages):
            _write_index(out, index_key(number), part.images)
    _check_teachers(out, plan)


def _write_index(out: Storage, key: str, images: EncodedImages) -> None:
    data = write_index(images)
    if out.read(key) != data:
        out.write(key, data)


def _same_but_rules(out: Storage, spec: CacheSpec) -> bool:
    """Whether the folder's cache was begun under earlier rules that give the same rows; it keeps them."""
    old = spec_in(out)
    return old is not None and old == dataclasses.replace(
        spec, data=dataclasses.replace(spec.data, rules=old.data.rules)
    )


def _refuse_other_spec(out: Storage, data: bytes, spec: CacheSpec) -> NoReturn:
    try:
        found = read_json(data, out.name(SPEC))
    except ConfigError as error:
        raise CorruptError(f"{out.name(SPEC)} is not a cache spec: {error}; choose another --out folder") from error
    differences, old = spec_diff(found, to_plain(spec)) or ["only the way it is written"], spec_in(out)
    grows = old is not None and not growth_problems(old, spec)
    fix = f"darht-cache extend {out} SPEC.yaml adds that and keeps the rest, or " if grows else ""
    raise SpecMismatchError(f"{out} holds another spec: {'; '.join(differences)}; {fix}choose another --out folder")


def _check_teachers(out: Storage, plan: Plan) -> None:
    """A teacher whose folder is gone is missed only where a unit needs it, and then before the first is computed."""
    absent = plan.spec.teachers.keys() - plan.teachers.keys()
    for array, shard in plan.units if absent else ():
        if array.teacher in absent and unit_state(out, array, shard)[0] is not State.DONE:
            raise ModelError(f"teacher '{array.teacher}' must compute {array.name} shard {shard}, {GONE}")


def environment(device: torch.device, batch_size: int, *, engine: str = "local", worker: int = 0) -> dict[str, Any]:
    """The facts of this machine, and of who works on it, that a spec does not hold."""
    return {
        "darht": VERSION,
        "torch": torch.__version__,
        "pillow": PIL.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        "threads": torch.get_num_threads(),
        "batch_size": batch_size,
        "pid": os.getpid(),
        "process": _PROCESS,
        "engine": engine,
        "worker": worker,
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
