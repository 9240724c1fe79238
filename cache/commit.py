"""Completion records: one small JSON per unit, written last.

A unit is done when its record says so and its shard fits the record.
"""

import json
import os
import platform
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import darht
from darht.cache.layout import ArrayLayout
from darht.cache.store import Store
from darht.core.config import canonical_json, parse
from darht.core.errors import ConfigError, CorruptError
from darht.core.files import sha256_file, write_atomic

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


def commit_path(folder: Path, array: ArrayLayout, shard: int) -> Path:
    """Where the record of a unit lies."""
    return folder / COMMITS / array.name / f"{shard:05d}.json"


def write_commit(folder: Path, array: ArrayLayout, commit: Commit) -> None:
    """Declare a unit done."""
    write_atomic(commit_path(folder, array, commit.shard), canonical_json(commit).encode())


def read_commit(folder: Path, array: ArrayLayout, shard: int) -> Commit | None:
    """The record of a unit, or None while there is none.

    Raises:
        CorruptError: a record that is there but does not parse.
    """
    path = commit_path(folder, array, shard)
    if not path.is_file():
        return None
    try:
        return parse(Commit, json.loads(path.read_bytes()), path.name)
    except (json.JSONDecodeError, UnicodeDecodeError, ConfigError) as error:
        raise CorruptError(
            f"{path} is not a commit record: {error}; remove it and run darht-cache build again"
        ) from error


def is_done(folder: Path, array: ArrayLayout, shard: int) -> bool:
    """The record exists, names this array's fingerprint, and the shard has the recorded size."""
    commit = read_commit(folder, array, shard)
    path = Store(folder).path(array, shard)
    return (
        commit is not None
        and commit.fingerprint == array.fingerprint
        and path.is_file()
        and path.stat().st_size == commit.size
    )


def check_unit(folder: Path, array: ArrayLayout, shard: int) -> Commit:
    """The record of a unit whose shard has the recorded sha256.

    Raises:
        CorruptError: no valid record, or other bytes.
    """
    commit = read_commit(folder, array, shard) if is_done(folder, array, shard) else None
    path = Store(folder).path(array, shard)
    if commit is None:
        raise CorruptError(f"{path} has no commit record that fits it; run darht-cache build again")
    if sha256_file(path) != commit.sha256:
        raise CorruptError(f"{path} does not have the sha256 of its commit record; remove it and build again")
    return commit
