"""Completion records."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from darht.cache.builder.build import environment
from darht.cache.format.commit import Commit, State, commit_key, read_commit, unit_state, write_commit
from darht.cache.format.layout import ArrayLayout, layouts, shard_key
from darht.cache.format.manifest import read_spec
from darht.core.config import canonical_json
from darht.core.errors import CorruptError
from darht.core.storage import open_storage


@pytest.fixture
def unit(copied: Path) -> tuple[Path, ArrayLayout, int]:
    return copied, layouts(read_spec(copied))["logits/cnn/clean"], 1


def record_path(folder: Path, array: ArrayLayout, shard: int) -> Path:
    return folder / commit_key(array, shard)


def record_of(folder: Path, array: ArrayLayout, shard: int) -> Commit | None:
    return read_commit(open_storage(folder), array, shard)


def state_of(folder: Path, array: ArrayLayout, shard: int, **options: bool) -> tuple[State, str]:
    return unit_state(open_storage(folder), array, shard, **options)


def rewrite(unit, **fields) -> None:
    folder, array, shard = unit
    commit = read_commit(open_storage(folder), array, shard)
    assert commit is not None
    (folder / commit_key(array, shard)).write_text(canonical_json(dataclasses.replace(commit, **fields)))


def test_a_record_reads_back(unit, tmp_path):
    folder, array, _ = unit
    commit = Commit(array.name, 2, (64, 96), array.fingerprint, 7, "ab", 0.5, {"host": "x"})
    write_commit(open_storage(folder), array, commit)
    assert read_commit(open_storage(folder), array, 2) == commit


def test_the_record_of_a_unit(unit):
    folder, array, shard = unit
    record = json.loads((folder / "commits" / "logits/cnn/clean" / "00001.json").read_text())
    assert (record["array"], record["shard"], record["rows"]) == ("logits/cnn/clean", 1, [32, 64])
    assert record["fingerprint"] == array.fingerprint
    assert record["size"] == (folder / shard_key(array, shard)).stat().st_size
    assert record["seconds"] > 0 and record["format_version"] == 1
    known = {
        "darht",
        "torch",
        "pillow",
        "device",
        "threads",
        "batch_size",
        "process",
        "pid",
        "time",
        "engine",
        "worker",
    }
    assert set(record["environment"]) == known


def test_the_environment_is_plain():
    assert canonical_json(environment(torch.device("cpu"), 64))


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[10] ^= 1
    path.write_bytes(bytes(data))


def test_done(unit):
    assert state_of(*unit) == (State.DONE, "")
    assert state_of(*unit, check_bytes=True) == (State.DONE, "")


def test_without_a_record_it_is_missing_although_the_shard_is_there(unit):
    record_path(*unit).unlink()
    assert record_of(*unit) is None
    assert state_of(*unit) == (State.MISSING, "logits/cnn/clean shard 1 has no commit record")


@pytest.mark.parametrize("fields", [{"fingerprint": "0" * 64}, {"shard": 0}, {"array": "logits/vit/clean"}])
def test_a_record_of_something_else_is_not_done(unit, fields):
    rewrite(unit, **fields)
    state, reason = state_of(*unit)
    assert state is State.CORRUPT and reason.endswith("belongs to another unit or another spec")


def test_another_size_is_not_done(unit):
    rewrite(unit, size=1)
    state, reason = state_of(*unit)
    assert state is State.CORRUPT and reason.endswith("bytes, its record says 1")


def test_without_the_shard_it_is_not_done(unit):
    folder, array, shard = unit
    (folder / shard_key(array, shard)).unlink()
    state, reason = state_of(*unit)
    assert state is State.CORRUPT and "is missing although its record" in reason


def test_other_bytes_of_the_same_size_are_found_by_their_hash(unit):
    folder, array, shard = unit
    flip(folder / shard_key(array, shard))
    assert state_of(*unit)[0] is State.DONE
    state, reason = state_of(*unit, check_bytes=True)
    assert state is State.CORRUPT and reason.endswith("does not have the sha256 of its record")


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b"{}", b"\xff", b'{"array": 3}'])
def test_a_damaged_record(unit, damage):
    record_path(*unit).write_bytes(damage)
    with pytest.raises(CorruptError, match=r"00001\.json is not a commit record: .*; run darht-cache build again"):
        record_of(*unit)
    assert state_of(*unit)[0] is State.CORRUPT
