"""Completion records."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from darht.cache.commit import Commit, check_unit, commit_path, environment, is_done, read_commit, write_commit
from darht.cache.layout import ArrayLayout, layouts
from darht.cache.seal import read_spec
from darht.cache.store import Store
from darht.core.config import canonical_json
from darht.core.errors import CorruptError


@pytest.fixture
def unit(copied: Path) -> tuple[Path, ArrayLayout, int]:
    return copied, layouts(read_spec(copied))["logits/cnn/clean"], 1


def rewrite(unit, **fields) -> None:
    folder, array, shard = unit
    commit = read_commit(folder, array, shard)
    assert commit is not None
    commit_path(folder, array, shard).write_text(canonical_json(dataclasses.replace(commit, **fields)))


def test_a_record_reads_back(unit, tmp_path):
    folder, array, _ = unit
    commit = Commit(array.name, 2, (64, 96), array.fingerprint, 7, "ab", 0.5, {"host": "x"})
    write_commit(folder, array, commit)
    assert read_commit(folder, array, 2) == commit


def test_the_record_of_a_unit(unit):
    folder, array, shard = unit
    record = json.loads((folder / "commits" / "logits/cnn/clean" / "00001.json").read_text())
    assert (record["array"], record["shard"], record["rows"]) == ("logits/cnn/clean", 1, [32, 64])
    assert record["fingerprint"] == array.fingerprint
    assert record["size"] == Store(folder).path(array, shard).stat().st_size
    assert record["seconds"] > 0 and record["format_version"] == 1
    assert {"darht", "torch", "device", "threads", "batch_size", "host", "pid", "time"} == set(record["environment"])


def test_the_environment_is_plain():
    assert canonical_json(environment(torch.device("cpu"), 64))


def test_done(unit):
    assert is_done(*unit)
    assert check_unit(*unit) == read_commit(*unit)


def test_without_a_record_it_is_not_done(unit):
    commit_path(*unit).unlink()
    assert read_commit(*unit) is None and not is_done(*unit)
    with pytest.raises(CorruptError, match="has no commit record that fits it; run darht-cache build again"):
        check_unit(*unit)


@pytest.mark.parametrize(
    "fields", [{"fingerprint": "0" * 64}, {"size": 1}, {"shard": 0}, {"array": "logits/vit/clean"}]
)
def test_a_record_of_something_else_is_not_done(unit, fields):
    rewrite(unit, **fields)
    assert not is_done(*unit)


def test_without_the_shard_it_is_not_done(unit):
    folder, array, shard = unit
    Store(folder).path(array, shard).unlink()
    assert not is_done(*unit)


def test_other_bytes_of_the_same_size_are_found_by_their_hash(unit):
    folder, array, shard = unit
    path = Store(folder).path(array, shard)
    data = bytearray(path.read_bytes())
    data[10] ^= 1
    path.write_bytes(bytes(data))
    assert is_done(*unit)
    with pytest.raises(CorruptError, match="does not have the sha256 of its commit record; remove it and build again"):
        check_unit(*unit)


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b"{}", b"\xff", b'{"array": 3}'])
def test_a_damaged_record(unit, damage):
    commit_path(*unit).write_bytes(damage)
    with pytest.raises(CorruptError, match=r"00001\.json is not a commit record: .*; remove it and run"):
        is_done(*unit)
