"""What differs between two caches: their specs, the bytes of their arrays, and on demand the numbers."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from darht.cache.admin.compare import ValueDiff, compare
from darht.cache.format.layout import layouts
from darht.cache.format.manifest import read_spec
from darht.cache.format.spec import CacheSpec
from darht.cache.format.views import view_table
from darht.cache.read.reader import Cache
from darht.cache.read.webdataset import open_shards
from darht.core.config import spec_diff, to_plain
from darht.core.storage import Location
from darht.core.zoo import teacher_at

_ROWS = 1024  # compared at a time: a shard's worth, some MB to some 100 MB


@dataclass(frozen=True)
class ArrayDiff:
    """One array in two caches.

    Attributes:
        name: of the array.
        found: in both of them, or in one only.
        equal: whether all its shards have the same sha256; False where it is in one only.
        shards: numbers of the shards that are not the same in both.
        values: how the numbers differ; None when the bytes are equal, nobody asked, or the rows are not the same.
    """

    name: str
    found: Literal["both", "first", "second"]
    equal: bool
    shards: tuple[int, ...] = ()
    values: ValueDiff | None = None


@dataclass(frozen=True)
class CacheDiff:
    """Two caches.

    Attributes:
        spec: the fields in which the specs differ, as lines `path: first -> second`.
        arrays: every array of either.
    """

    spec: tuple[str, ...]
    arrays: tuple[ArrayDiff, ...]

    @property
    def same(self) -> bool:
        """Whether both have the same spec and the same bytes."""
        return not self.spec and all(array.equal for array in self.arrays)


def diff_caches(first: Location, second: Location, *, values: bool = False) -> CacheDiff:
    """Compare two sealed caches, or exports of such, by their manifests.

    Args:
        first: one cache.
        second: the other.
        values: read arrays whose bytes differ, and compare their numbers too.

    Raises:
        CacheError: one is no cache, not sealed, or damaged where it is read.
    """
    a, b = open_shards(first), open_shards(second)
    arrays = tuple(_array_diff(a, b, name, values) for name in {**a.arrays, **b.arrays})
    return CacheDiff(_fields(a.spec, b.spec), arrays)


def diff_spec(location: Location, config: Path, *, download: bool = False) -> CacheDiff:
    """Compare a cache, sealed or not, with the one that a YAML file would give.

    An array is equal when nothing that its bytes depend on differs, so that a build would take it as it is.

    Raises:
        CacheError: there is no cache.
        ConfigError, DataError, ModelError: whatever is wrong with the file, its images or its teachers' cards.
    """
    spec = read_spec(location)
    other = spec_of(config, download=download, rules=spec.data.rules)
    a, b = layouts(spec), layouts(other)
    arrays = []
    for name in {**a, **b}:
        equal = name in a and name in b and a[name].fingerprint == b[name].fingerprint
        arrays.append(ArrayDiff(name, _found(name in a, name in b), equal))
    return CacheDiff(_fields(spec, other), tuple(arrays))


def spec_of(config_path: Path, *, download: bool, rules: int) -> CacheSpec:
    """The spec that a YAML file resolves to under the `rules` of a `DataSpec`; no network is loaded."""
    from darht.cache.builder.config import load_config, load_images
    from darht.cache.builder.resolve import resolve
    from darht.cache.builder.teachers import read_card  # the builder needs torch; two caches are compared without

    config, base = load_config(config_path), config_path.parent
    source = load_images(config.sources, base, mixed=config.mixed, download=download, rules=rules)
    cards = {name: read_card(teacher_at(teacher.path, base)) for name, teacher in config.teachers.items()}
    return resolve(config, source, cards, len(view_table(**vars(config.views), seed=config.seed)), rules)


def _fields(first: CacheSpec, second: CacheSpec) -> tuple[str, ...]:
    return tuple(spec_diff(to_plain(first), to_plain(second)))


def _found(first: bool, second: bool) -> Literal["both", "first", "second"]:
    return "both" if first and second else "first" if first else "second"


def _array_diff(a: Cache, b: Cache, name: str, values: bool) -> ArrayDiff:
    if name not in a.arrays or name not in b.arrays:
        return ArrayDiff(name, _found(name in a.arrays, name in b.arrays), equal=False)
    one, other = _hashes(a, name), _hashes(b, name)
    shards = tuple(sorted(k for k in one.keys() | other.keys() if one.get(k) != other.get(k)))
    found = _compare_arrays(a, b, name) if shards and values else None
    return ArrayDiff(name, "both", not shards, shards, found)


def _hashes(cache: Cache, name: str) -> dict[int, str]:
    return {record.shard: record.sha256 for record in cache.manifest.shards if record.array == name}


def _compare_arrays(a: Cache, b: Cache, name: str) -> ValueDiff | None:
    """The numbers of an array on common views; None where rows or shapes are not the same, so that nothing matches."""
    one, other = a.arrays[name], b.arrays[name]
    free = slice(1, 2) if one.has_views else slice(0, 0)  # the axis that may differ
    if _without(one.shape, free) != _without(other.shape, free):
        return None
    left, right = _common_views(a, b, one.shape[1], other.shape[1]) if one.has_views else ([], [])
    scales = [float(array.attributes.get("scale", 1.0)) for array in (one, other)]

    def pairs() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for first in range(0, one.shape[0], _ROWS):
            rows = slice(first, min(first + _ROWS, one.shape[0]))
            x, y = a.read(name, rows), b.read(name, rows)
            if one.has_views:
                x, y = x[:, left], y[:, right]
            yield (x, y) if scales[0] == scales[1] else (x * scales[0], y * scales[1])

    return compare(one.kind, pairs(), scale=scales[0] if scales[0] == scales[1] else 1.0)


def _without(shape: tuple[int, ...], axes: slice) -> tuple[int, ...]:
    return shape[: axes.start] + shape[axes.stop :]


def _common_views(a: Cache, b: Cache, in_a: int, in_b: int) -> tuple[list[int], list[int]]:
    """The numbers of the views that both have among their first so many, in each."""
    column = {tuple(row): number for number, row in enumerate(b.views[:in_b].tolist())}
    pairs = [(number, column[tuple(row)]) for number, row in enumerate(a.views[:in_a].tolist()) if tuple(row) in column]
    return [left for left, _ in pairs], [right for _, right in pairs]
