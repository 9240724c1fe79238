"""How far a build is, from the commit records alone; of a sealed copy without records, from its manifest."""

import calendar
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from darht.cache.builder.history import former_of
from darht.cache.format.commit import Commit, Former, State, inspect_unit
from darht.cache.format.layout import ArrayLayout, layouts
from darht.cache.format.manifest import Manifest, ShardRecord, read_manifest, read_spec
from darht.cache.format.spec import CacheSpec
from darht.core.errors import CacheError
from darht.core.storage import Location, Storage, open_storage, sizes

_LOOKUPS = 16  # questions to an object store at a time


@dataclass(frozen=True)
class ArrayStatus:
    """One array.

    Attributes:
        name: of the array.
        units: how many it has.
        missing: numbers of the shards without a commit record of this spec.
        corrupt: numbers of the shards that do not fit theirs.
        size: bytes of the shards that are done.
        seconds: of work that the done ones took.
        seconds_left: of work for the others, at the mean pace of the done ones; None before the first.
    """

    name: str
    units: int
    missing: tuple[int, ...]
    corrupt: tuple[int, ...]
    size: int
    seconds: float
    seconds_left: float | None

    @property
    def done(self) -> int:
        """How many units are done."""
        return self.units - len(self.missing) - len(self.corrupt)


@dataclass(frozen=True)
class Status:
    """A cache.

    Attributes:
        arrays: each of them.
        sealed: whether there is a manifest of this spec.
        recorded: false of a sealed cache without any commit record, as copies are that were pulled or pushed; done is
            then what has the size that the manifest names.
        shards: numbers of the shards of rows that still need work, the index list for a job array.
        workers: how many workers computed at the same time, on average over the time in which any did; at least 1.
        seconds_left: until everything is done, by the clock, when as many workers go on; None while an array that has
            no unit done gives nothing to reckon with.
    """

    arrays: tuple[ArrayStatus, ...]
    sealed: bool
    recorded: bool
    shards: tuple[int, ...]
    workers: float
    seconds_left: float | None

    @property
    def left(self) -> int:
        """How many units are not done: without a record, with that of a former spec, or not as theirs says."""
        return sum(len(array.missing) + len(array.corrupt) for array in self.arrays)

    @property
    def state(self) -> State:
        """CORRUPT before MISSING before DONE."""
        if any(array.corrupt for array in self.arrays):
            return State.CORRUPT
        return State.MISSING if any(array.missing for array in self.arrays) or not self.sealed else State.DONE


def read_status(location: Location) -> Status:
    """Look at every commit record, or a copy's manifest, and every shard's size; no shard is read.

    Raises:
        CacheError: the folder is not a cache.
        CorruptError: its spec does not parse.
    """
    folder = open_storage(location)
    spec = read_spec(folder)
    former, commits, arrays = former_of(folder), [], []
    with ThreadPoolExecutor(_LOOKUPS) as pool:  # behind a URL the times of so many small questions would add up
        for array in layouts(spec).values():
            status, done = _array_status(folder, array, former, pool)
            arrays.append(status)
            commits += done
    manifest = _manifest_of(folder, spec)
    recorded = manifest is None or any(len(array.missing) < array.units for array in arrays)
    if manifest is not None and not recorded:
        arrays = _copy_status(folder, manifest)
    shards = sorted({shard for array in arrays for shard in (*array.missing, *array.corrupt)})
    workers, left = parallel_workers(commits), [array.seconds_left for array in arrays]
    seconds = None if None in left else sum(value for value in left if value is not None) / workers
    return Status(tuple(arrays), manifest is not None, recorded, tuple(shards), workers, seconds)


def _manifest_of(folder: Storage, spec: CacheSpec) -> Manifest | None:
    """What the cache was sealed with; None where it is not sealed as this spec's."""
    try:
        return read_manifest(folder, spec)
    except CacheError:
        return None


def _copy_status(folder: Storage, manifest: Manifest) -> list[ArrayStatus]:
    """Which shards of a copy are there in the sizes that its manifest names."""
    found: dict[str, list[tuple[ShardRecord, int | None]]] = {}
    for shard, size in zip(manifest.shards, sizes(folder, [shard.path for shard in manifest.shards]), strict=True):
        found.setdefault(shard.array, []).append((shard, size))
    arrays = []
    for name, shards in found.items():
        missing = tuple(shard.shard for shard, size in shards if size is None)
        corrupt = tuple(shard.shard for shard, size in shards if size not in (None, shard.size))
        there = sum(shard.size for shard, size in shards if size == shard.size)
        left = None if missing or corrupt else 0.0  # only the records said how long units take
        arrays.append(ArrayStatus(name, len(shards), missing, corrupt, there, 0.0, left))
    return arrays


def _array_status(
    folder: Storage, array: ArrayLayout, former: Former, pool: ThreadPoolExecutor
) -> tuple[ArrayStatus, list[Commit]]:
    found = list(pool.map(lambda shard: inspect_unit(folder, array, shard, former=former), range(array.shards)))
    done = [commit for _, _, commit in found if commit is not None]
    seconds = sum(commit.seconds for commit in done)
    status = ArrayStatus(
        name=array.name,
        units=array.shards,
        missing=tuple(shard for shard, (state, _, _) in enumerate(found) if state is State.MISSING),
        corrupt=tuple(shard for shard, (state, _, _) in enumerate(found) if state is State.CORRUPT),
        size=sum(commit.size for commit in done),
        seconds=seconds,
        seconds_left=seconds / len(done) * (array.shards - len(done)) if done else None,
    )
    return status, done


def parallel_workers(commits: Iterable[Commit]) -> float:
    """How many units were computed at the same time, on average over the time in which any was.

    That is the seconds of all units over the length of the union of their spans, which end where the record was
    written. Records tell time in whole seconds, so units much shorter than that seem to overlap; there are never more
    workers than processes.
    """
    spans, processes, spent = [], set(), 0.0
    for commit in commits:
        end = _written(commit)
        if end is not None:
            spans.append((end - commit.seconds, end))
            processes.add(
                tuple(commit.environment.get(key) for key in ("process", "host", "pid"))
            )  # once they named hosts
            spent += commit.seconds
    covered, until = 0.0, float("-inf")
    for start, end in sorted(spans):
        covered += max(0.0, end - max(start, until))
        until = max(until, end)
    return max(1.0, min(float(len(processes)), spent / covered if covered else 1.0))


def _written(commit: Commit) -> float | None:
    """When a record was written, in seconds; None when it does not say so."""
    try:
        return float(calendar.timegm(time.strptime(str(commit.environment["time"]), "%Y-%m-%dT%H:%M:%SZ")))
    except (KeyError, ValueError):
        return None
