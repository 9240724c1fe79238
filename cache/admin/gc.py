"""Leftovers in a cache's folder: found, told, and removed on demand.

Nothing that the spec names and that is done is ever a leftover, nor is a file that darht does not know, nor, where
there is a manifest, a shard: copies that were pulled or pushed have no records. And nothing younger than an hour is,
unless everything is asked for: a build that is under way writes a temporary file and renames it, and a shard and then
its record, within seconds to minutes.
"""

import contextlib
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from darht.cache.builder.history import is_history
from darht.cache.format.commit import COMMITS, commit_key
from darht.cache.format.layout import DATA, layouts, shard_key
from darht.cache.format.manifest import MANIFEST, SPEC, read_manifest, read_spec
from darht.cache.format.spec import CacheSpec
from darht.cache.format.store import Store
from darht.core.errors import CacheError
from darht.core.storage import LocalStorage, Location, Storage, open_storage

YOUNG = 3600.0  # seconds: far more than lies between the steps of one unit


@dataclass(frozen=True)
class Leftover:
    """A file that nothing needs.

    Attributes:
        key: its path inside the cache.
        size: in bytes.
        why: what it is left over from.
    """

    key: str
    size: int
    why: str


def find_leftovers(location: Location, *, young: bool = False, now: float | None = None) -> list[Leftover]:
    """What can be removed from a cache.

    Args:
        location: of the cache.
        young: also what is younger than an hour; only when nobody builds, extends or exports into it.
        now: seconds since the epoch; by default the clock's.

    Raises:
        CacheError: it is not a cache.
        CorruptError: its spec does not parse, so that nobody can say what belongs to it.
    """
    folder, clock = open_storage(location), time.time() if now is None else now
    spec = read_spec(folder)
    return [
        Leftover(key, folder.size(key) or 0, why)
        for key, why in _candidates(folder, spec)
        if young or _age(folder, key, clock) > YOUNG
    ]


def _age(folder: Storage, key: str, now: float) -> float:
    """Seconds since a file was written; none where its system does not tell, so that it stays."""
    written = folder.modified(key)
    return 0.0 if written is None else now - written


def _candidates(folder: Storage, spec: CacheSpec) -> Iterator[tuple[str, str]]:
    arrays, keys = layouts(spec), folder.keys()
    present = set(keys)
    units = [(array, shard) for array in arrays.values() for shard in range(array.shards)]
    records = {shard_key(array, shard): commit_key(array, shard) for array, shard in units}
    described, committed = Store(folder).describe(arrays).keys(), set(records.values())
    whole, manifest_there = _is_sealed(folder, spec), MANIFEST in present  # a damaged one may be pulled again
    for key in keys:
        if _is_temporary(key):
            yield key, "a write that was killed"
        elif key.startswith(f"{DATA}/") and key not in described and key not in records:
            yield key, "an array that the spec does not have"
        elif key in records and records[key] not in present and not manifest_there:
            yield key, "a shard without a record"
        elif key.startswith(f"{COMMITS}/") and key not in committed:
            yield key, "a record of a unit that the spec does not have"
        elif whole and is_history(key):
            yield key, "a former spec of a cache that is extended and sealed"


def _is_temporary(key: str) -> bool:
    name = key.rsplit("/", 1)[-1]
    return name.endswith(".tmp") and (name.startswith(".") or key.startswith((f"{DATA}/", f"{COMMITS}/")))


def _is_sealed(folder: Storage, spec: CacheSpec) -> bool:
    """Only then is no unit of a former spec waited for."""
    try:
        return bool(read_manifest(folder, spec))
    except CacheError:
        return False


def remove_leftovers(location: Location, leftovers: Iterable[Leftover]) -> None:
    """Remove what `find_leftovers` found.

    Raises:
        CacheError: the cache is another by now.
    """
    folder = open_storage(location)
    if folder.size(SPEC) is None:
        raise CacheError(f"{folder} is not a cache any more: nothing was removed")
    removed = [leftover.key for leftover in leftovers]
    for key in removed:
        folder.remove(key)
    if isinstance(folder, LocalStorage):
        _prune(folder.folder, removed)


def _prune(root: Path, removed: list[str]) -> None:
    """Remove the folders that removing these files has emptied, the deepest first."""
    parents = {parent for key in removed for parent in (root / key).parents if root in parent.parents}
    for parent in sorted(parents, key=lambda path: len(path.parts), reverse=True):
        with contextlib.suppress(OSError):  # not empty: something else lies there, or has just been written
            parent.rmdir()
