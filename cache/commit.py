"""Completion records: one small JSON per unit, written last.

A unit is done when its record says so and its shard fits the record.
"""

import os
import platform
import time
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import torch

import darht
from darht.cache.layout import ArrayLayout
from darht.cache.store import shard_key
from darht.core.config import canonical_json, parse_canonical
from darht.core.errors import ConfigError, CorruptError
from darht.core.files import sha256_bytes
from darht.core.places import Place

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
        environment: device, versions, threads, batch size, host; facts that are not part of the spec.
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


def environment(device: torch.device, batch_size: int) -> dict[str, Any]:
    """The facts of this machine that a spec does not hold."""
    return {
        "darht": darht.__version__,
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        "threads": torch.get_num_threads(),
        "batch_size": batch_size,
        "host": platform.node(),
        "pid": os.getpid(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def commit_key(array: ArrayLayout, shard: int) -> str:
    """Where the record of a unit lies in a cache."""
    return f"{COMMITS}/{array.name}/{shard:05d}.json"


def write_commit(place: Place, array: ArrayLayout, commit: Commit) -> None:
    """Declare a unit done."""
    place.write(commit_key(array, commit.shard), canonical_json(commit).encode())


def read_commit(place: Place, array: ArrayLayout, shard: int) -> Commit | None:
    """The record of a unit, or None while there is none.

    Raises:
        CorruptError: a record that is there but does not parse.
    """
    key = commit_key(array, shard)
    data = place.read(key)
    if data is None:
        return None
    try:
        return parse_canonical(Commit, data, key.rsplit("/", 1)[-1])
    except ConfigError as error:
        raise CorruptError(
            f"{place.name(key)} is not a commit record: {error}; run darht-cache build again, which replaces it"
        ) from error


class State(Enum):
    """Whether a unit counts."""

    DONE = "done"
    MISSING = "missing"
    CORRUPT = "corrupt"


def unit_state(place: Place, array: ArrayLayout, shard: int, *, check_bytes: bool = False) -> tuple[State, str]:
    """Whether a unit is done, and the reason when it is not.

    Done means: the record exists, names this unit and its array's fingerprint, and the shard has the recorded size and,
    with `check_bytes`, the recorded sha256. A unit without a record is missing, whatever else is there.
    """
    try:
        commit = read_commit(place, array, shard)
    except CorruptError as error:
        return State.CORRUPT, str(error)
    if commit is None:
        return State.MISSING, f"{array.name} shard {shard} has no commit record"
    key, record = shard_key(array, shard), place.name(commit_key(array, shard))
    if (commit.array, commit.shard, commit.fingerprint) != (array.name, shard, array.fingerprint):
        return State.CORRUPT, f"{record} belongs to another unit or another spec"
    data = place.read(key) if check_bytes else None
    size = place.size(key) if data is None else len(data)
    if size is None:
        return State.CORRUPT, f"{place.name(key)} is missing although its record {record} exists"
    if size != commit.size:
        return State.CORRUPT, f"{place.name(key)} has {size} bytes, its record says {commit.size}"
    if data is not None and sha256_bytes(data) != commit.sha256:
        return State.CORRUPT, f"{place.name(key)} does not have the sha256 of its record"
    return State.DONE, ""
