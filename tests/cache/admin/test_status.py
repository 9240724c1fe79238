"""How far a build is, and how long the rest takes."""

import json
import shutil
import time
from pathlib import Path

import pytest
import torch

from darht.cache.admin.status import parallel_workers, read_status
from darht.cache.admin.tables import status_line
from darht.cache.builder.build import build, plan_build
from darht.cache.format.commit import Commit, State, read_commit, write_commit
from darht.cache.format.layout import layouts
from darht.cache.format.manifest import read_spec
from darht.core.storage import open_storage

CPU = torch.device("cpu")


def record(end: float, seconds: float, pid: int, host: str = "a") -> Commit:
    stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(1_700_000_000 + end))
    return Commit("label", 0, (0, 1), "", 1, "", seconds, {"time": stamp, "pid": pid, "host": host})


def test_one_worker_is_one_however_short_its_units():
    assert parallel_workers([record(10 * k, 10, 1) for k in range(5)]) == 1
    assert parallel_workers([record(0, 0.1, 1) for _ in range(20)]) == 1  # all within a second, as records tell time
    assert parallel_workers([]) == 1


def test_units_side_by_side_are_many_workers():
    four = [record(10 * k, 10, pid) for k in range(5) for pid in range(4)]
    assert parallel_workers(four) == 4
    assert parallel_workers([record(10 * k, 10, 1, host) for k in range(5) for host in "ab"]) == 2
    half = [record(10 * k, 10, 1) for k in range(4)] + [record(10 * k, 10, 2) for k in range(2)]
    assert parallel_workers(half) == pytest.approx(1.5)


def test_a_pause_between_two_runs_is_no_work():
    runs = [record(10 * k, 10, 1) for k in range(3)] + [record(5000 + 10 * k, 10, 2) for k in range(3)]
    assert parallel_workers(runs) == 1


def test_records_that_do_not_tell_the_time_are_left_out():
    plain = Commit("label", 0, (0, 1), "", 1, "", 1.0, {})
    odd = Commit("label", 0, (0, 1), "", 1, "", 1.0, {"time": "yesterday"})
    assert parallel_workers([plain, odd]) == 1


def rewrite(folder: Path, seconds: float, workers: int) -> None:
    """Let every record say that its unit took so long, on workers that began together."""
    for array in layouts(read_spec(folder)).values():
        for shard in range(array.shards):
            commit = read_commit(open_storage(folder), array, shard)
            if commit is not None:
                facts = record(seconds * (1 + shard // workers), seconds, shard % workers).environment
                write_commit(open_storage(folder), array, type(commit)(**{**vars(commit), "seconds": seconds,
                                                                   "environment": facts}))  # fmt: skip


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_the_seconds_left_are_those_of_the_clock(copied, workers, invoke):
    rewrite(copied, seconds=100.0, workers=workers)
    (copied / "commits/image/00000.json").unlink()
    (copied / "commits/image/00003.json").unlink()
    (copied / "commits/label/00003.json").unlink()
    status = read_status(copied)
    assert {array.name: array.seconds_left for array in status.arrays if array.missing} == {"image": 200, "label": 100}
    # Ten more arrays were computed at the same time; processes bound what is taken for parallel.
    assert status.workers == workers
    assert status.seconds_left == pytest.approx(300 / workers)
    said = status_line(status)
    assert said.startswith("shards of rows that need work: 0,3; ") and f"{300 / workers:.0f} s left" in said
    as_json = json.loads(invoke("status", copied, "--json").output)
    assert as_json["shards"] == [0, 3] and as_json["seconds_left"] == pytest.approx(300 / workers)


def test_nothing_is_promised_before_every_array_has_a_unit(copied):
    for shard in range(4):
        (copied / f"commits/image/{shard:05d}.json").unlink()
    status = read_status(copied)
    assert status.seconds_left is None and "unknown" in status_line(status)


def test_a_manifest_of_another_spec_is_no_seal(copied):
    assert read_status(copied).sealed
    (copied / "manifest.json").write_text("{}")
    status = read_status(copied)
    assert not status.sealed and status.state is State.MISSING and status_line(status) == "all units done; not sealed"


def test_a_sealed_copy_has_no_records_and_is_whole_by_its_manifest(copied, invoke):
    sizes = {array.name: array.size for array in read_status(copied).arrays}
    shutil.rmtree(copied / "commits")
    status = read_status(copied)
    assert status.sealed and not status.recorded and status.state is State.DONE and status.shards == ()
    assert {array.name: array.size for array in status.arrays} == sizes and status.seconds_left == 0
    said = invoke("status", copied)
    assert said.exit_code == 0 and "a sealed copy, which has no commit records: every shard is there" in said.output
    (copied / "data.zarr/image/c/3/0/0/0").unlink()
    said = invoke("status", copied)
    assert said.exit_code == 3 and "not all there in their sizes: 3: pull" in said.output
    (copied / "data.zarr/label/c/1").write_bytes(b"short")
    status = read_status(copied)
    assert status.state is State.CORRUPT and status.shards == (1, 3) and status.seconds_left is None


def test_a_sealed_cache_is_called_sealed_though_a_record_is_gone(copied, invoke):
    (copied / "commits/image/00001.json").unlink()
    said = invoke("status", copied)
    assert said.exit_code == 3 and "need work: 1; " in said.output and said.output.rstrip().endswith("; sealed")


def test_behind_a_url(tiny_cache_config, tmp_path, invoke):
    url = f"memory://{tmp_path.name}/status"
    build(plan_build(tiny_cache_config, device=CPU), url, device=CPU, on_unit=lambda array, shard, seconds: None)
    open_storage(url).remove("commits/logits/vit/clean/00002.json")
    status = read_status(url)
    assert status.shards == (2,) and status.state is State.MISSING
    assert invoke("status", url).exit_code == 3 and "need work: 2;" in invoke("status", url).output
