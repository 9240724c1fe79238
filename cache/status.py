"""How far a build is, from the commit records alone."""

from dataclasses import dataclass

from darht.cache.commit import State, read_commit, unit_state
from darht.cache.layout import ArrayLayout, layouts
from darht.cache.seal import MANIFEST, read_spec
from darht.core.places import Location, Place, place


@dataclass(frozen=True)
class ArrayStatus:
    """One array.

    Attributes:
        name: of the array.
        units: how many it has.
        missing: numbers of the shards without a commit record.
        corrupt: numbers of the shards that do not fit theirs.
        size: bytes of the shards that are done.
        seconds: that the done ones took.
        seconds_left: for the others, at the mean pace of the done ones; None before the first.
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
    """A whole cache.

    Attributes:
        arrays: each of them.
        sealed: whether there is a manifest.
        shards: numbers of the shards of rows that still need work, the index list for a job array.
    """

    arrays: tuple[ArrayStatus, ...]
    sealed: bool
    shards: tuple[int, ...]

    @property
    def state(self) -> State:
        """CORRUPT before MISSING before DONE."""
        if any(array.corrupt for array in self.arrays):
            return State.CORRUPT
        return State.MISSING if any(array.missing for array in self.arrays) or not self.sealed else State.DONE


def read_status(location: Location) -> Status:
    """Look at every commit record and every shard's size; no shard is read.

    Raises:
        CacheError: the folder is not a cache.
        CorruptError: its spec does not parse.
    """
    folder = place(location)
    arrays = tuple(_array_status(folder, array) for array in layouts(read_spec(folder)).values())
    shards = sorted({shard for array in arrays for shard in (*array.missing, *array.corrupt)})
    return Status(arrays, folder.size(MANIFEST) is not None, tuple(shards))


def _array_status(folder: Place, array: ArrayLayout) -> ArrayStatus:
    states = [unit_state(folder, array, shard)[0] for shard in range(array.shards)]
    done = [read_commit(folder, array, shard) for shard, state in enumerate(states) if state is State.DONE]
    seconds = sum(commit.seconds for commit in done if commit is not None)
    return ArrayStatus(
        name=array.name,
        units=array.shards,
        missing=tuple(shard for shard, state in enumerate(states) if state is State.MISSING),
        corrupt=tuple(shard for shard, state in enumerate(states) if state is State.CORRUPT),
        size=sum(commit.size for commit in done if commit is not None),
        seconds=seconds,
        seconds_left=seconds / len(done) * (array.shards - len(done)) if done else None,
    )
