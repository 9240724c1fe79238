"""Disks that are full, or must not be written: one line that says so, nothing half done, and on once it is mended."""

import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from crash_server import CrashServer, Ended, Fault, contents, count_done

from darht.cache.admin.status import read_status
from darht.cache.builder.build import build, plan_build
from darht.cache.builder.seal import seal
from darht.cache.format.commit import State
from darht.cache.format.manifest import read_manifest, read_spec

CPU = torch.device("cpu")
AGAIN = "; what was there before is whole: run again once it can be written"
linux = pytest.mark.skipif(sys.platform != "linux", reason="capabilities are Linux's")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 96 KiB; `mount -o remount,size=...` makes it larger."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=96k", "tmpfs", folder]
    if subprocess.run(command, check=False, capture_output=True).returncode:
        pytest.skip("no right to mount a tmpfs; the test with a limited file size says the same")
    yield folder
    subprocess.run(["umount", folder], check=True)


def check_stopped(stopped: Ended, out: Path, reference: Path, reason: str) -> int:
    """One line with the reason, no rubbish, nothing half done; gives how many units are done."""
    assert stopped.exit_code == 2 and "\n" not in stopped.error
    assert stopped.error.startswith(f"cannot write {out}/") and stopped.error.endswith(reason + AGAIN)
    assert not list(out.rglob("*.tmp"))  # what was half written gives its space back
    done, problems = count_done(out, reference)
    assert problems == [] and done < 19
    assert read_status(out).state is State.MISSING
    return done


def test_a_full_disk(crash_server: CrashServer, reference: Path, small_disk: Path):
    out = small_disk / "cache"
    done = check_stopped(crash_server.build(out), out, reference, ": No space left on device")
    assert crash_server.build(out).exit_code == 2  # trying again changes nothing
    subprocess.run(["mount", "-o", "remount,size=8m", small_disk], check=True)
    assert crash_server.build(out).reused == done > 0
    assert contents(out) == contents(reference)


def test_files_that_may_not_grow(crash_server: CrashServer, reference: Path, tmp_path: Path):
    """A quota's error, on every machine: the perturbations' shards are larger than a file may be."""
    out = tmp_path / "cache"
    limit = (reference / "data.zarr/delta/pgd-cnn/c/0/0/0/0/0").stat().st_size - 1
    stopped = crash_server.build(out, file_limit=limit)
    assert "data.zarr/delta/pgd-cnn/c/0" in stopped.error
    assert check_stopped(stopped, out, reference, ": File too large") == 4
    assert crash_server.build(out).reused == 4
    assert contents(out) == contents(reference)


@linux
def test_a_folder_that_must_not_be_written(crash_server: CrashServer, reference: Path, tmp_path: Path):
    out = tmp_path / "cache"
    assert crash_server.build(out, fault=Fault("commit", "after rename", 2)).signal
    folders = [path for path in (out, *out.rglob("*")) if path.is_dir()]
    for folder in folders:
        folder.chmod(0o555)
    assert check_stopped(crash_server.build(out, unprivileged=True), out, reference, ": Permission denied") == 2
    for folder in folders:
        folder.chmod(0o755)
    assert crash_server.build(out, unprivileged=True).reused == 2
    assert contents(out) == contents(reference)


@linux
def test_a_folder_that_must_not_be_looked_into(crash_server: CrashServer, tmp_path: Path):
    tmp_path.chmod(0o000)
    try:
        ended = crash_server.build(tmp_path / "cache", unprivileged=True)
    finally:
        tmp_path.chmod(0o755)
    assert (ended.exit_code, ended.error) == (2, f"cannot read {tmp_path}/cache/spec.json: Permission denied")


@linux
def test_a_folder_that_must_not_be_listed(crash_server: CrashServer, tmp_path: Path):
    (tmp_path / "cache").mkdir(mode=0o333)
    ended = crash_server.build(tmp_path / "cache", unprivileged=True)
    assert (ended.exit_code, ended.error) == (2, f"cannot list {tmp_path}/cache: Permission denied")


@linux
def test_a_place_where_no_folder_can_be_made(crash_server: CrashServer, tmp_path: Path):
    (tmp_path / "closed").mkdir(mode=0o555)
    ended = crash_server.build(tmp_path / "closed" / "cache", unprivileged=True)
    assert (ended.exit_code, ended.error) == (
        2,
        f"cannot write {tmp_path}/closed/cache/spec.json: Permission denied{AGAIN}",
    )


def test_a_build_in_memory(quick_config: Path, reference: Path):
    url = "memory://test_a_build_in_memory/cache"
    build(plan_build(quick_config, device=CPU), url, device=CPU, on_unit=lambda array, shard, seconds: None)
    assert seal(url).root_hash == read_manifest(reference, read_spec(reference)).root_hash
    assert read_status(url).state is State.DONE


def test_status_while_a_build_runs(crash_server: CrashServer, tmp_path: Path):
    """A look never disturbs, never sees half a record, and what is done stays done."""
    out, done = tmp_path / "cache", [0]
    building = threading.Thread(target=lambda: crash_server.build(out))
    building.start()
    while building.is_alive():
        if (out / "spec.json").exists():
            status = read_status(out)
            assert not any(array.corrupt for array in status.arrays)
            done.append(sum(array.done for array in status.arrays))
    building.join()
    assert done == sorted(done)
    status = read_status(out)
    assert status.state is State.DONE and sum(array.done for array in status.arrays) == 19
