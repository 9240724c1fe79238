"""Leftovers: what is removed, and above all what is not."""

import os
import shutil
import time
from pathlib import Path

import pytest
import torch

from darht.cache.admin.gc import YOUNG, find_leftovers, remove_leftovers
from darht.cache.admin.status import read_status
from darht.cache.builder.build import build, plan_build
from darht.cache.builder.extend import grow
from darht.cache.builder.seal import seal
from darht.cache.format.commit import State
from darht.cache.read.reader import open_cache
from darht.core.errors import CacheError
from darht.core.storage import open_storage

CPU = torch.device("cpu")
LATER = time.time() + 2 * YOUNG


def put(folder: Path, key: str, data: bytes = b"x" * 10) -> str:
    (folder / key).parent.mkdir(parents=True, exist_ok=True)
    (folder / key).write_bytes(data)
    return key


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def littered(copied: Path) -> tuple[Path, set[str]]:
    """A cache that is not sealed, with one leftover of each kind, and their keys."""
    (copied / "manifest.json").unlink()
    (copied / "commits/image/00001.json").unlink()
    left = {
        "data.zarr/image/c/1/0/0/0",  # its record is gone
        put(copied, ".spec.json.abc.tmp"),
        put(copied, "data.zarr/label/c/.0.abc.tmp"),
        put(copied, "commits/label/.00000.json.abc.tmp"),
        put(copied, "data.zarr/logits/gone/clean/c/0/0/0"),
        put(copied, "data.zarr/logits/gone/clean/zarr.json"),
        put(copied, "data.zarr/logits/gone/zarr.json"),
        put(copied, "data.zarr/label/c/9"),  # beyond the last row
        put(copied, "commits/logits/gone/clean/00000.json"),
        put(copied, "commits/label/00009.json"),
    }
    return copied, left


def test_a_whole_cache_has_no_leftovers(tiny_cache):
    assert find_leftovers(tiny_cache, now=LATER) == []
    assert find_leftovers(tiny_cache, young=True) == []


def test_the_shards_of_a_copy_are_no_leftovers(copied, invoke):
    """A cache that was pulled or pushed has no records, and a damaged manifest can be fetched again."""
    shutil.rmtree(copied / "commits")
    before = files(copied)
    assert find_leftovers(copied, now=LATER) == []
    (copied / "manifest.json").write_text("{}")
    assert invoke("gc", copied, "--all", "--yes").exit_code == 0 and files(copied) == before


def test_each_kind_is_found_and_removed_and_nothing_else(littered):
    folder, left = littered
    mine = {put(folder, "notes.txt"), put(folder, "croissant.json"), put(folder, "history/readme")}
    before = files(folder)
    found = find_leftovers(folder, now=LATER)
    assert {leftover.key for leftover in found} == left
    assert all(leftover.size == (folder / leftover.key).stat().st_size for leftover in found)
    assert files(folder) == before  # looking removes nothing
    remove_leftovers(folder, found)
    assert files(folder) == before - left and mine < files(folder)
    assert not (folder / "data.zarr/logits/gone").exists() and not (folder / "commits/logits/gone").exists()
    assert find_leftovers(folder, now=LATER) == []


def test_what_is_young_may_belong_to_a_build_and_stays(littered):
    folder, left = littered
    os.utime(folder / ".spec.json.abc.tmp", (LATER - 2 * YOUNG - 1, LATER - 2 * YOUNG - 1))
    newest = max((folder / key).stat().st_mtime for key in left)
    assert find_leftovers(folder, now=newest) == []
    assert find_leftovers(folder, now=newest - 10 * YOUNG) == []  # a clock that went backwards
    young = {leftover.key for leftover in find_leftovers(folder, young=True)}
    assert young == left


def test_what_a_build_still_needs_is_no_leftover(small, build_into, tmp_path):
    """A damaged unit, units of a former spec and the former spec itself stay until the cache is sealed."""
    plan = small()
    folder = build_into(plan, tmp_path / "cache")
    (folder / "data.zarr/image/c/0/0/0/0").unlink()
    larger = small(lambda config: config["views"].update(count=5))
    grow(folder, larger.spec)
    assert find_leftovers(folder, now=LATER) == []
    build_into(larger, folder)
    assert find_leftovers(folder, now=LATER) == []
    root = seal(folder).root_hash
    (left,) = find_leftovers(folder, now=LATER)
    assert left.key.startswith("history/") and left.why.startswith("a former spec")
    remove_leftovers(folder, [left])
    assert open_cache(folder).root_hash == root and read_status(folder).state is State.DONE
    assert not (folder / "history").exists()


def test_a_kill_leaves_nothing_that_stays(small, build_into, tmp_path):
    """After a kill, gc and a new build the folder holds the same files as one that was never killed."""
    plan = small()
    whole, folder = build_into(plan, tmp_path / "whole"), build_into(plan, tmp_path / "cache")
    (folder / "commits/label/00001.json").unlink()
    put(folder, "data.zarr/label/c/.1.killed.tmp")
    remove_leftovers(folder, find_leftovers(folder, young=True))
    assert not (folder / "data.zarr/label/c/1").exists()
    build_into(plan, folder)
    assert files(folder) == files(whole) and seal(folder).root_hash == seal(whole).root_hash


def test_behind_a_url(tiny_cache_config, tmp_path):
    url = f"memory://{tmp_path.name}/gc"
    build(plan_build(tiny_cache_config, device=CPU), url, device=CPU, on_unit=lambda array, shard, seconds: None)
    open_storage(url).write("commits/label/00009.json", b"{}")
    assert find_leftovers(url) == []
    (left,) = find_leftovers(url, now=LATER)
    assert (left.key, left.size) == ("commits/label/00009.json", 2)
    remove_leftovers(url, [left])
    assert find_leftovers(url, young=True) == []


def test_the_command(littered, invoke, tmp_path):
    folder, left = littered
    assert "nothing left over" in invoke("gc", folder).output
    before = files(folder)
    listed = invoke("gc", folder, "--all")
    assert listed.exit_code == 0 and f"{len(left)} files" in listed.output and "--yes" in listed.output
    assert all(key in listed.output for key in left) and files(folder) == before
    assert invoke("gc", folder, "--all", "--yes").exit_code == 0
    assert files(folder) == before - left
    (tmp_path / "mine").mkdir()
    put(tmp_path / "mine", ".x.tmp")
    refused = invoke("gc", tmp_path / "mine", "--all", "--yes")
    assert refused.exit_code == 2 and "is not a cache" in refused.output and files(tmp_path / "mine") == {".x.tmp"}
    (folder / "spec.json").write_text("{")
    assert invoke("gc", folder, "--all", "--yes").exit_code == 4  # nobody can say what belongs to it
    shutil.rmtree(folder)
    with pytest.raises(CacheError):
        remove_leftovers(folder, [])
