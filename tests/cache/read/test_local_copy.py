"""Copies of shards: each byte crosses the network once, for epochs, readers and runs; damage, room and a full disk."""

import errno
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from servers import FileServer

from darht.cache.export.webdataset import export_webdataset
from darht.cache.format.manifest import read_manifest, read_spec, root_hash
from darht.cache.read import local_copy
from darht.cache.read.dataset import CacheDataset
from darht.cache.read.loader import GIB
from darht.cache.read.local_copy import CopiedStorage, CopySettings, default_copy
from darht.cache.read.reach import Reach
from darht.cache.read.reader import Cache, open_cache
from darht.cache.read.sizes import needed_bytes
from darht.cache.read.webdataset import open_shards
from darht.core import retry, storage_remote
from darht.core.config import canonical_json
from darht.core.errors import CorruptError, IncompleteError
from darht.trainer.cli import train

DELTA = "delta/pgd-vit"


@pytest.fixture
def server(fine_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FileServer]:
    """A copy of a small cache at `/cache`, and an export of it at `/tars`."""
    monkeypatch.setattr(retry, "_FIRST_WAIT", 0.002)
    shutil.copytree(fine_cache, tmp_path / "served" / "cache")
    with FileServer(tmp_path / "served") as server:
        yield server
    storage_remote._without_ranges.clear()


@pytest.fixture
def reach(tmp_path: Path) -> Reach:
    return Reach(CopySettings(tmp_path / "copies", 10**9))


def copies(reach: Reach) -> list[Path]:
    assert reach.copy is not None
    return sorted(reach.copy.folder.glob("??/*"))


def streamed(cache: Cache) -> CacheDataset:
    """All its images, labels and clean logits, in windows."""
    return CacheDataset(cache, batch_size=8, memory_gib=0.8 * needed_bytes(cache, adversarial=False) / GIB)


def test_a_manifest_cannot_name_a_file_of_the_user(server: FileServer, reach: Reach, tmp_path: Path):
    assert reach.copy is not None
    mine = tmp_path / "mine"
    mine.write_bytes(b"x" * 100)
    served = tmp_path / "served" / "cache"
    manifest = read_manifest(served, read_spec(served))
    first, *others = manifest.shards
    forged = replace(manifest, shards=(replace(first, sha256=str(mine), size=100), *others))
    (served / "manifest.json").write_text(canonical_json(replace(forged, root_hash=root_hash(forged))))
    with pytest.raises(CorruptError, match="where a sha256 must be"):
        open_shards(f"{server.url}/cache", reach)
    assert mine.read_bytes() == b"x" * 100


def test_opening_asks_for_three_files(server: FileServer):
    assert open_shards(f"{server.url}/cache").rows == 100
    assert sorted(server.asked) == [f"GET /cache/{key}" for key in ("index.json", "manifest.json", "spec.json")]


def test_epochs_and_runs_fetch_each_shard_once(server: FileServer, fine_cache: Path, reach: Reach):
    local = list(streamed(open_cache(fine_cache)))
    server.clear()
    dataset = streamed(open_shards(f"{server.url}/cache", reach))
    assert dataset.plan.kind == "streamed"
    for epoch in range(2):
        dataset.set_epoch(epoch)
        found = list(dataset)
        if epoch == 0:
            assert all(np.array_equal(a.rows, b.rows) for a, b in zip(found, local, strict=True))
    shards = [path for path in server.asked if "data.zarr" in path]
    assert len(shards) == len(set(shards)) == len(copies(reach))
    assert server.sent < 1.05 * (sum(path.stat().st_size for path in copies(reach)) + 40_000)
    server.clear()
    list(streamed(open_shards(f"{server.url}/cache", reach)))
    assert len(server.asked) == 3


def test_later_epochs_ask_for_nothing(server: FileServer, reach: Reach):
    dataset = streamed(open_shards(f"{server.url}/cache", reach))
    list(dataset)
    server.clear()
    for epoch in (1, 2):
        dataset.set_epoch(epoch)
        list(dataset)
    assert server.asked == []


@pytest.mark.parametrize(("named", "times"), [(True, 1), (False, 2)])
def test_without_a_copy_a_shard_is_fetched_for_its_sha256_unless_the_server_names_that(
    server: FileServer, fine_cache: Path, named: bool, times: int
):
    server.named = named
    local = list(streamed(open_cache(fine_cache)))
    dataset = streamed(open_shards(f"{server.url}/cache"))
    server.clear()
    for found, expected in zip(dataset, local, strict=True):
        assert torch.equal(found.x, expected.x) and torch.equal(found.teacher_logits, expected.teacher_logits)
    arrays = [name for name in dataset.cache.arrays if name in ("label", "image") or name.endswith("/clean")]
    whole = sum(dataset.cache.size(name) for name in arrays)
    assert whole * (times - 0.2) < server.sent < whole * (times + 0.05) + 40_000


def test_shards_of_the_next_window_are_asked_for_before_the_first_is_used(
    server: FileServer, reach: Reach, monkeypatch: pytest.MonkeyPatch
):
    cache = open_shards(f"{server.url}/cache", reach)
    asked: list[list[int]] = []

    def note(names: Iterable[str], shards: Iterable[int]) -> None:
        if len(list(names)) > 1:  # not what reading one array asks for by the way
            asked.append(list(shards))

    monkeypatch.setattr(cache, "prefetch", note)
    dataset = streamed(cache)
    feed = dataset._own_feed()
    windows = [feed._shards(window) for window in feed._epoch_windows(0)]
    next(iter(dataset))
    assert asked[:3] == [windows[0], *windows[:2]] and len(windows) > 2


def test_what_is_no_longer_wanted_is_not_fetched(server: FileServer, reach: Reach):
    server.latency = 0.2
    cache = open_shards(f"{server.url}/cache", reach)
    assert isinstance(cache.folder, CopiedStorage)
    cache.prefetch(cache.arrays, range(20))
    cache.stop_prefetch()
    assert len(cache.folder._coming) <= storage_remote.IN_FLIGHT < len(cache.manifest.shards)
    assert cache.read("label").shape == (100,)
    cache.folder._fetchers.shutdown()


def test_tars_are_copied_too(server: FileServer, fine_cache: Path, reach: Reach):
    export_webdataset(open_cache(fine_cache), server.folder / "tars", "blocks")
    for _ in range(2):
        cache = open_shards(f"{server.url}/tars", reach)
        for rows in (slice(0, 10), slice(40, 50)):
            np.testing.assert_array_equal(cache.read("image", rows), open_cache(fine_cache).read("image", rows))
    tars = [path for path in server.asked if path.endswith(".tar")]
    assert len(tars) == len(set(tars)) == len(copies(reach)) > 1


def test_a_server_without_ranges_sends_each_shard_once(server: FileServer, reach: Reach):
    server.ranges = False
    list(streamed(open_shards(f"{server.url}/cache", reach)))
    shards = [path for path in server.asked if "data.zarr" in path]
    assert len(shards) == len(set(shards))


def test_wrong_bytes_are_not_kept(server: FileServer, reach: Reach):
    cache = open_shards(f"{server.url}/cache", reach)
    server.flip = True
    with pytest.raises(CorruptError, match="does not have the sha256 that was sealed, and was fetched twice"):
        cache.read(DELTA, slice(0, 2))
    server.flip = False
    assert copies(reach) == [] and cache.read(DELTA).shape[0] == 100


def test_a_shard_that_is_gone(server: FileServer, reach: Reach):
    cache = open_shards(f"{server.url}/cache", reach)
    (server.folder / "cache" / cache.manifest.shards[0].path).unlink()
    with pytest.raises(IncompleteError, match=f"{cache.manifest.shards[0].path} is missing"):
        cache.read(cache.manifest.shards[0].array)


@pytest.mark.parametrize("rows", [slice(None), slice(2, 4)])
def test_a_copy_that_went_bad_is_fetched_again(server: FileServer, fine_cache: Path, reach: Reach, rows: slice):
    open_shards(f"{server.url}/cache", reach).read(DELTA)
    for path in copies(reach):
        path.write_bytes(bytes(path.stat().st_size))
    found = open_shards(f"{server.url}/cache", reach).read(DELTA, rows)
    np.testing.assert_array_equal(found, open_cache(fine_cache).read(DELTA, rows))


def test_what_a_killed_process_left_is_overwritten(server: FileServer, reach: Reach):
    open_shards(f"{server.url}/cache", reach).read(DELTA)
    whole = {path: path.read_bytes() for path in copies(reach)}
    for path in whole:
        path.rename(path.with_suffix(".part"))
        path.with_suffix(".part").write_bytes(b"half")
    open_shards(f"{server.url}/cache", reach).read(DELTA)
    assert {path: path.read_bytes() for path in copies(reach)} == whole


def test_room_is_made_by_what_was_used_longest_ago(server: FileServer, tmp_path: Path):
    names = [f"{letter * 64}" for letter in "ab"]
    for age, name in enumerate(names):
        path = tmp_path / "copies" / name[:2] / name
        path.parent.mkdir(parents=True)
        path.write_bytes(bytes(50_000))
        os.utime(path, (1000 + age, 1000 + age))
    cache = open_shards(f"{server.url}/cache")
    needed = sum(shard.size for shard in cache.manifest.shards if shard.array == DELTA)
    reach = Reach(CopySettings(tmp_path / "copies", 50_000 + needed))
    open_shards(f"{server.url}/cache", reach).read(DELTA)
    there = [path.name for path in copies(reach)]
    assert names[0] not in there and names[1] in there and len(there) == 8


def test_a_cache_that_does_not_fit_is_copied_in_part_and_streamed(server: FileServer, fine_cache: Path, tmp_path: Path):
    local = open_cache(fine_cache)
    reach = Reach(CopySettings(tmp_path / "copies", 3 * local.manifest.shards[0].size))
    found = open_shards(f"{server.url}/cache", reach).read(DELTA)
    np.testing.assert_array_equal(found, local.read(DELTA))
    assert sum(path.stat().st_size for path in copies(reach)) <= reach.copy.size  # type: ignore[union-attr]


def test_a_full_disk_costs_the_copy_alone(
    server: FileServer,
    fine_cache: Path,
    reach: Reach,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
):
    def full(*arguments: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(local_copy.os, "pwrite", full)
    found = open_shards(f"{server.url}/cache", reach).read(DELTA)
    np.testing.assert_array_equal(found, open_cache(fine_cache).read(DELTA))
    assert copies(reach) == [] and [record.message.partition("(")[0] for record in caplog.records] == [
        "no further local copies "
    ]


def test_readers_share_what_one_of_them_fetches(server: FileServer, reach: Reach):
    server.latency = 0.05
    caches = [open_shards(f"{server.url}/cache", reach) for _ in range(3)]
    with ThreadPoolExecutor(3) as pool:
        assert len({int(values.astype(int).sum()) for values in pool.map(lambda cache: cache.read(DELTA), caches)}) == 1
    shards = [path for path in server.asked if "data.zarr" in path]
    assert len(shards) == len(set(shards)) == 7


def test_the_default_is_half_of_what_is_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    found = default_copy()
    assert found.folder == tmp_path / "darht" / "shards" and 0 < found.size < shutil.disk_usage(tmp_path).total
    assert str(CopySettings(Path("x"), 5 * 10**10)) == "local copy in x, up to 50 GB"


def test_a_shard_that_is_replaced_under_a_reader(server: FileServer, fine_cache: Path, tmp_path: Path):
    """By the same bytes: they are hashed again. By others: refused."""
    for where in (f"{server.url}/cache", str(server.folder / "cache")):
        cache = open_shards(where)
        path = server.folder / "cache" / next(shard.path for shard in cache.manifest.shards if shard.array == DELTA)
        data, before = path.read_bytes(), cache.read(DELTA, slice(0, 2))
        path.unlink()
        path.write_bytes(data)
        os.utime(path, (1000, 1000))
        np.testing.assert_array_equal(cache.read(DELTA, slice(0, 2)), before)
        path.write_bytes(data[:40] + bytes([data[40] ^ 1]) + data[41:])
        with pytest.raises(CorruptError, match="does not have the sha256 that was sealed"):
            cache.read(DELTA, slice(4, 6))
        path.write_bytes(data)


def test_a_server_that_goes_away_in_mid_epoch_is_exit_75_and_the_command(
    server: FileServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    sets = (
        "optim.epochs=1",
        "optim.batch_size=64",
        "student.arch=resnet18",
        "student.kwargs.width=4",
        "inner.kind=cached",
        "inner.eps=32",
    )
    words = ["--shards", f"{server.url}/cache", "--out", str(tmp_path / "run"), "--retry-for", "0.1s"]
    words += ["--cache-dir", str(tmp_path / "copies"), "--device", "cpu"]
    words += [word for each in sets for word in ("--set", each)]
    whole = Cache.read_into

    def gone(self: Cache, *arguments: object) -> None:
        server.stop()
        whole(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(Cache, "read_into", gone)
    monkeypatch.setattr(Cache, "prefetch", lambda *arguments: None)
    found = CliRunner().invoke(train, ["run", *words])
    assert found.exit_code == 75, found.output
    assert "(connection refused); see that 127.0.0.1" in found.output
    assert "and run again, or wait longer with --retry-for\n" in found.output
    command = found.output.splitlines()[-1].partition("go on with: ")[2]
    assert command.endswith(" --resume") and f"--shards {server.url}/cache" in command and "--retry-for 0.1s" in command
    monkeypatch.undo()
    server.start()
    resumed = CliRunner().invoke(train, [*command.split()[1:]])
    assert resumed.exit_code == 0, resumed.output
    assert json.loads((tmp_path / "run" / "run.json").read_text())["cache"] == f"{server.url}/cache"
