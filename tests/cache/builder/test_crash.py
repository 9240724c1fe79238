"""A build that is killed goes on to the same bytes, wherever it was killed; nothing half done counts as done."""

import json
import random
import shutil
import time
from pathlib import Path

import pytest
from crash_server import CrashServer, Fault, contents, kill_and_recover

UNITS = 19
POINTS = [
    # the first files of a cache
    (Fault("spec", "half"), 0),
    (Fault("spec", "before rename"), 0),
    (Fault("spec", "after rename"), 0),
    (Fault("metadata", "half", 3), 0),
    (Fault("metadata", "before rename", 4), 0),
    (Fault("origin", "half"), 0),
    # a unit: its shard, then its record
    (Fault("shard", "half", 1), 0),
    (Fault("shard", "half", 6), 5),
    (Fault("shard", "before rename", 7), 6),
    (Fault("shard", "after rename", 8), 7),
    (Fault("commit", "half", 9), 8),
    (Fault("commit", "before rename", 10), 9),
    (Fault("commit", "after rename", 11), 11),
    # all is done, and sealed
    (Fault("commit", "half", UNITS), UNITS - 1),
    (Fault("commit", "after rename", UNITS), UNITS),
    (Fault("seal", "looks", 1), UNITS),
    (Fault("seal", "looks", UNITS // 2), UNITS),
    (Fault("manifest", "half"), UNITS),
    (Fault("manifest", "before rename"), UNITS),
    (Fault("manifest", "after rename"), UNITS),
]


@pytest.mark.parametrize(("fault", "done"), POINTS, ids=[str(fault) for fault, _ in POINTS])
def test_killed_at_a_point_of_the_protocol(crash_server: CrashServer, reference: Path, tmp_path: Path, fault, done):
    recovery = kill_and_recover(crash_server, tmp_path / "cache", reference, fault=fault)
    assert recovery.killed
    assert recovery.problems == ()
    assert (recovery.done, recovery.ended.computed) == (done, UNITS - done)


def test_killed_at_twenty_random_moments(crash_server: CrashServer, reference: Path, tmp_path: Path):
    spent = crash_server.build(tmp_path / "whole").seconds
    moments = [0.0, *(random.Random(7).uniform(0, spent) for _ in range(19))]
    recoveries = [
        kill_and_recover(crash_server, tmp_path / str(i), reference, kill_after=moment)
        for i, moment in enumerate(moments)
    ]
    assert [recovery.problems for recovery in recoveries] == [()] * 20
    assert recoveries[0].killed  # the later ones may have been quicker than the kill


def test_killed_again_and_again(crash_server: CrashServer, reference: Path, tmp_path: Path):
    """Every restart gets one unit further, so a machine that never lives long still finishes."""
    out = tmp_path / "cache"
    for _ in range(5):
        assert crash_server.build(out, fault=Fault("commit", "after rename", 1)).signal
    assert kill_and_recover(crash_server, out, reference, fault=Fault("commit", "before rename", 2)).done == 6
    assert contents(out) == contents(reference)


def test_a_sealed_cache_killed_while_it_is_repaired(crash_server: CrashServer, reference: Path, tmp_path: Path):
    """The manifest is there all the time: it names the bytes that the repair brings back."""
    out = shutil.copytree(reference, tmp_path / "cache")
    victim = out / "data.zarr/label/c/1"
    victim.write_bytes(b"damaged")
    killed = crash_server.build(out, fault=Fault("shard", "before rename"))
    assert killed.signal and victim.read_bytes() == b"damaged"
    ended = crash_server.build(out)
    assert (ended.computed, ended.reused) == (1, UNITS - 1)
    assert contents(out) == contents(reference)


def test_two_builders_at_once(crash_server: CrashServer, reference: Path, tmp_path: Path):
    out = tmp_path / "cache"
    both = crash_server.together([out, out])
    root = json.loads((reference / "manifest.json").read_text())["root_hash"]
    assert [(ended.error, ended.signal, ended.root_hash) for ended in both] == [("", 0, root)] * 2
    assert contents(out) == contents(reference)


def test_two_builders_at_once_one_of_which_dies(crash_server: CrashServer, reference: Path, tmp_path: Path):
    out = tmp_path / "cache"
    both = crash_server.together([out, out], fault=Fault("commit", "half", 4))
    assert all(ended.signal for ended in both)
    assert crash_server.build(out).error == ""
    assert contents(out) == contents(reference)


def test_a_clock_that_goes_backwards(crash_server: CrashServer, reference: Path, tmp_path: Path):
    out = tmp_path / "cache"
    assert crash_server.build(out, clock="backwards").error == ""
    assert contents(out) == contents(reference)
    records = [json.loads(path.read_text()) for path in (out / "commits").rglob("*.json")]
    assert len(records) == UNITS and all(record["seconds"] >= 0 for record in records)
    times = [time.strptime(record["environment"]["time"], "%Y-%m-%dT%H:%M:%SZ") for record in records]
    assert max(times) > min(times)  # it did go
