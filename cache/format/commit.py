"""Completion records: one small JSON per unit, written last.

A unit is done when its record says so and its shard fits the record.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from darht.cache.format.layout import ArrayLayout, shard_key
from darht.core.config import added, canonical_json, parse_canonical
from darht.core.errors import ConfigError, CorruptError
from darht.core.files import sha256_bytes
from darht.core.storage import Storage

COMMITS = "commits"


@dataclass(frozen=True)
class Commit:
    """What is recorded of a finished unit.

    Attributes:
        array: its name.
        shard: its number.
        rows: first row and one past the last.
        fingerprint: of the array, so that another spec's unit is never taken for this one's.
        size: of the shard in bytes.
        sha256: of the shard.
        seconds: what computing and writing it took.
        environment: device, versions, threads, batch size, process, engine, worker: facts that no spec holds.
        parts: sha256 of each view's bytes, of arrays `by_view`; none of others.
    """

    array: str
    shard: int
    rows: tuple[int, ...]
    fingerprint: str
    size: int
    sha256: str
    seconds: float
    environment: dict[str, Any] = field(default_factory=dict)
    format_version: int = 1
    parts: tuple[str, ...] = added(())


def commit_key(array: ArrayLayout, shard: int) -> str:
    """Where the record of a unit lies in a cache."""
    return f"{COMMITS}/{array.name}/{shard:05d}.json"


def write_commit(storage: Storage, array: ArrayLayout, commit: Commit) -> None:
    """Declare a unit done."""
    storage.write(commit_key(array, commit.shard), canonical_json(commit).encode())


def read_commit(storage: Storage, array: ArrayLayout, shard: int) -> Commit | None:
    """The record of a unit, or None while there is none.

    Raises:
        CorruptError: a record that is there but does not parse.
    """
    key = commit_key(array, shard)
    data = storage.read(key)
    if data is None:
        return None
    try:
        return parse_canonical(Commit, data, key.rsplit("/", 1)[-1])
    except ConfigError as error:
        raise CorruptError(
            f"{storage.name(key)} is not a commit record: {error}; run darht-cache build again, which replaces it"
        ) from error


Former = Callable[[str], Collection[str]]
"""The fingerprints that an array had before the cache was extended; asked only about records of another fingerprint."""


def _none(name: str) -> Collection[str]:
    return ()


class State(Enum):
    """Whether a unit counts."""

    DONE = "done"
    MISSING = "missing"
    CORRUPT = "corrupt"


def unit_state(
    storage: Storage, array: ArrayLayout, shard: int, *, check_bytes: bool = False, former: Former = _none
) -> tuple[State, str]:
    """Whether a unit is done, and the reason when it is not.

    Done means: the record exists, names this unit and its array's fingerprint, and the shard has the recorded size and,
    with `check_bytes`, the recorded sha256. A unit without a record is missing, whatever else is there, and so is one
    whose record has one of the fingerprints that `former` names for the array: those before the cache was extended.
    """
    return inspect_unit(storage, array, shard, check_bytes=check_bytes, former=former)[:2]


def inspect_unit(
    storage: Storage, array: ArrayLayout, shard: int, *, check_bytes: bool = False, former: Former = _none
) -> tuple[State, str, Commit | None]:
    """What `unit_state` tells, and the unit's record where it is done."""
    try:
        commit = read_commit(storage, array, shard)
    except CorruptError as error:
        return State.CORRUPT, str(error), None
    if commit is None:
        return State.MISSING, f"{array.name} shard {shard} has no commit record", None
    record = storage.name(commit_key(array, shard))
    if (commit.array, commit.shard, commit.fingerprint) != (array.name, shard, array.fingerprint):
        if (commit.array, commit.shard) == (array.name, shard) and commit.fingerprint in former(array.name):
            return State.MISSING, f"{array.name} shard {shard} is that of a former spec", None
        return State.CORRUPT, f"{record} belongs to another unit or another spec", None
    fault = _shard_fault(storage, shard_key(array, shard), commit, record, check_bytes)
    return (State.CORRUPT, fault, None) if fault else (State.DONE, "", commit)


def _shard_fault(storage: Storage, key: str, commit: Commit, record: str, check_bytes: bool) -> str:
    """Where a shard does not fit its record; empty when it does."""
    data = storage.read(key) if check_bytes else None
    size = storage.size(key) if data is None else len(data)
    if size is None:
        return f"{storage.name(key)} is missing although its record {record} exists"
    if size != commit.size:
        return f"{storage.name(key)} has {size} bytes, its record says {commit.size}"
    if data is not None and sha256_bytes(data) != commit.sha256:
        return f"{storage.name(key)} does not have the sha256 of its record"
    return ""
