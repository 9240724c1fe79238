"""Compute a sample of a cache again, with its images, its teachers and its attacks, and compare.

What is sampled are whole batches, cut as the build cut them: a row's last bits depend on the batch that it is computed
in, so on the same machine and engine nothing at all differs.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from darht.cache.admin.compare import ValueDiff, compare
from darht.cache.builder.compute import Worker, arithmetic
from darht.cache.builder.known_teachers import load_known_teacher, teacher_folders
from darht.cache.builder.plan import Plan
from darht.cache.format.commit import Commit, read_commit
from darht.cache.format.layout import ANSWERS, JACOBIAN_PARTS, ArrayLayout, Kind
from darht.cache.format.mixture import SourceSpec
from darht.cache.format.spec import DataSpec
from darht.cache.format.store import Store
from darht.cache.format.views import view_table
from darht.cache.read.reader import Cache
from darht.cache.sources.encoded import index_key, read_index
from darht.cache.sources.load import OF_ANY_SIZE, FileSource, Source
from darht.cache.sources.mixture import mix
from darht.cache.sources.open import open_source
from darht.core.errors import ConfigError, DataError, ModelError
from darht.core.keys import derive_seed

_BATCH = 256  # of units whose record does not tell

LOGITS = 0.05
"""The default for the largest difference of a logit: several steps of float16 at 8..16 (each 1/128), so that another
device's rounding passes and another teacher, preprocessing or view does not. Other kernels gave 0.002."""

VALUES = 0.1
"""The default for the share of a perturbation's values that differ. A gradient's sign turns where it is nearly 0, and
later steps follow, so another engine gives perturbations that are as good: measured were 0.0001, another seed gives
more than 0.5 (docs/cache-format.md)."""


@dataclass(frozen=True)
class Recomputed:
    """What came of it.

    Attributes:
        rows: how many rows were sampled.
        arrays: by name, how what was computed again differs from what is stored.
        made_on: device and torch release of the teachers' and attacks' units among them, as their records tell.
        kinds: of the arrays.
    """

    rows: int
    arrays: dict[str, ValueDiff]
    made_on: tuple[str, ...]
    kinds: dict[str, Kind]

    def beyond(self, logits: float = LOGITS, values: float = VALUES) -> list[str]:
        """The arrays that differ by more than may be, in words.

        Args:
            logits: the largest difference of a logit.
            values: the largest share of the values of a perturbation, a Jacobian, or integers that logits are coded in.
        """
        found = []
        for name, diff in self.arrays.items():
            kind = self.kinds[name]
            if kind in ("logits", "logits-top"):
                if diff.largest > logits:
                    found.append(f"{name}: logits differ by up to {diff.largest:g}, tolerance {logits:g}")
            elif kind == "delta" or kind in JACOBIAN_PARTS or kind in ANSWERS:
                if diff.values > values:
                    found.append(
                        f"{name}: {100 * diff.values:.3g} % of the values differ, tolerance {100 * values:g} %"
                    )
            elif diff.largest:
                found.append(f"{name}: {100 * diff.rows:.3g} % of the rows are not those of the data set")
        return found


def sample_size(text: str, rows: int) -> int:
    """How many of `rows` a text such as `2%` or `500` asks for.

    Raises:
        ConfigError: it is neither a share nor a count.
    """
    try:
        count = math.ceil(rows * float(text[:-1]) / 100) if text.endswith("%") else int(text)
    except (ValueError, OverflowError):
        count = 0
    if not 1 <= count <= rows:
        raise ConfigError(f"--recompute reads a share such as 2% or a count in 1..{rows}; got '{text}'")
    return count


def recompute(
    cache: Cache,
    count: int,
    *,
    device: torch.device,
    seed: int = 0,
    data_root: Path | None = None,
    teachers: Mapping[str, Path] | None = None,
    on_array: Callable[[str], None] = lambda name: None,
) -> Recomputed:
    """Compute at least `count` rows of every array again and compare them with what is stored.

    Args:
        cache: sealed, and not an export.
        count: of rows; rounded up to whole batches.
        device: where teachers and attacks run.
        seed: of the sample.
        data_root: where the data set lies, when not where the cache was built from.
        teachers: folders by name, for those that are not where the cache was built from.
        on_array: told the name of each array before it is computed.

    Raises:
        DataError, ModelError: images or teachers are not at hand, or are not those of the cache.
    """
    plan = plan_again(cache, device=device, data_root=data_root, teachers=teachers or {})
    blocks = sample_batches(plan, count, _batch_size(_record(cache, plan, 0)), seed)
    arrays, made_on = {}, set()
    with arithmetic(plan.spec.precision):
        for name, array in plan.arrays.items():
            on_array(name)
            pairs = _pairs(cache, plan, array, blocks, device)
            arrays[name] = compare(array.kind, pairs, scale=float(array.attributes.get("scale", 1.0)))
            if array.teacher is not None:
                shards = {k for block in blocks for k in array.shards_of(block) if k < array.shards}
                made_on |= {_maker(read_commit(cache.folder, array, k)) for k in shards}
    kinds = {name: array.kind for name, array in plan.arrays.items()}
    return Recomputed(sum(block.stop - block.start for block in blocks), arrays, tuple(sorted(made_on)), kinds)


def plan_again(cache: Cache, *, device: torch.device, data_root: Path | None, teachers: Mapping[str, Path]) -> Plan:
    """What the cache was built from, found again and checked against its spec.

    Raises:
        ConfigError: a teacher that the cache does not have.
        DataError, ModelError: images or teachers are not at hand, or are not those of the cache.
    """
    spec, origin = cache.spec, cache.origin()
    folders = teacher_folders(spec, origin, teachers)
    missing = [name for name in spec.teachers if name not in folders]
    if missing:
        raise ModelError(f"{cache.folder} does not tell where teacher '{missing[0]}' lies: give --teacher NAME=FOLDER")
    return Plan(
        spec=spec,
        source=_images(cache, data_root),
        offsets=torch.from_numpy(cache.views),
        teachers={name: load_known_teacher(name, folder, spec, device) for name, folder in folders.items()},
        arrays=cache.arrays,
        origin=origin,
    )


def _images(cache: Cache, data_root: Path | None) -> Source | FileSource:
    """The images of the cache; `data_root` is where its first source lies."""
    data, origin = cache.spec.data, cache.origin()
    roots = origin.get("data_roots", {}) | {"0": data_root or origin.get("data_root")}
    if not data.sources:
        return _opened(cache, data, 0, roots, labelled=True, classes=None)
    opened: list[Source | FileSource] = []
    for number, source in enumerate(data.sources):
        classes = data.classes if number else None
        opened.append(_opened(cache, source, number, roots, labelled=source.labelled, classes=classes))
    return mix(opened)


def _opened(
    cache: Cache, data: DataSpec | SourceSpec, number: int, roots: Mapping[str, Any], **options: Any
) -> Source | FileSource:
    """One source, which is that of the cache."""
    where = roots.get(str(number))
    root = Path(where) if where else None
    size = None if number else cache.origin().get("image_size")
    if size is None and data.source in OF_ANY_SIZE and not (cache.spec.store.encoded and isinstance(data, DataSpec)):
        size = cache.spec.data.image_shape[1]
    fix = "give --data-root" if number == 0 else "build it again from where they lie"
    if root is None and data.source != "digits":
        raise DataError(f"{cache.folder} does not tell where its images of {data.source} lie: {fix}")
    how: dict[str, Any] = {"image_size": size, "skip_broken": data.skipped > 0, "rules": cache.spec.data.rules}
    how |= {"mixed": cache.spec.data.mixed, "limit": data.rows}
    how["index"] = read_index(cache.folder.read(index_key(number)), root)
    source = open_source(data.source, root, data.split, **how, **options)
    if source.sha256 != data.sha256:
        found, named = source.sha256[:12], data.sha256[:12]
        raise DataError(
            f"{root or data.source} holds other images than those of {cache.folder}: sha256 {found}, not {named}; {fix}"
        )
    return source


def sample_batches(plan: Plan, count: int, batch_size: int, seed: int) -> list[slice]:
    """Seeded batches of rows, in order, that hold at least `count` rows; cut as a build cuts its shards."""
    shard, rows = plan.spec.store.rows_per_shard, plan.spec.data.rows
    batches = [
        slice(first, min(first + batch_size, start + shard, rows))
        for start in range(0, rows, shard)
        for first in range(start, min(start + shard, rows), batch_size)
    ]
    order = np.random.Generator(np.random.Philox(derive_seed(seed, "recompute"))).permutation(len(batches))
    chosen: list[slice] = []
    for number in order:
        if sum(batch.stop - batch.start for batch in chosen) >= count:
            break
        chosen.append(batches[number])
    return sorted(chosen, key=lambda batch: batch.start)


def _pairs(
    cache: Cache, plan: Plan, array: ArrayLayout, blocks: list[slice], device: torch.device
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """What is stored beside what is computed again, one block after the other."""
    if array.kind == "views":
        yield cache.read(array.name), view_table(**vars(plan.spec.views), seed=plan.spec.seed)
        return
    for block in (slice(one.start, min(one.stop, array.shape[0])) for one in blocks if one.start < array.shape[0]):
        shard = array.shards_of(block).start
        size = _batch_size(read_commit(cache.folder, array, shard))
        rows = _whole_batches(block, array.rows(shard), size)
        yield cache.read(array.name, rows), Worker(plan, Store(cache.folder), device, size).values(array, rows)


def _whole_batches(rows: slice, shard: slice, size: int) -> slice:
    """The batches of `size` rows that a shard was cut into, as far as they touch `rows`."""
    first, last = rows.start - shard.start, rows.stop - shard.start
    return slice(shard.start + first // size * size, min(shard.start + -(-last // size) * size, shard.stop))


def _record(cache: Cache, plan: Plan, shard: int) -> Commit | None:
    """Any record of a unit that a teacher computed."""
    array = max(plan.arrays.values(), key=lambda array: array.teacher is not None)
    return read_commit(cache.folder, array, shard)


def _batch_size(commit: Commit | None) -> int:
    return _BATCH if commit is None else int(commit.environment.get("batch_size", _BATCH))


def _maker(commit: Commit | None) -> str:
    facts = {} if commit is None else commit.environment
    return f"{facts.get('device', 'an unknown device')}, torch {facts.get('torch', 'unknown')}"
