"""Caches from a URL into a folder: whole, in part, again, after damage and after the cache grew; and to a URL."""

import platform
import shutil
from collections.abc import Callable, Iterator
from getpass import getuser
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from fsspec.implementations.memory import MemoryFileSystem
from servers import FileServer

from darht.cache.admin.copies import _expected_tag, pull, push
from darht.cache.admin.verify import verify
from darht.cache.builder.extend import grow
from darht.cache.builder.plan import Plan
from darht.cache.builder.seal import seal
from darht.cache.cli import cache
from darht.cache.export.webdataset import export_webdataset
from darht.cache.read.reader import Cache, open_cache
from darht.cache.read.webdataset import open_shards
from darht.core.errors import CacheError, ConfigError, CorruptError, IncompleteError, SpecMismatchError
from darht.core.sealed import seal_json
from darht.core.storage import open_storage
from darht.core.storage_fsspec import FsspecStorage


@pytest.fixture
def server(fine_cache: Path, tmp_path: Path) -> Iterator[FileServer]:
    shutil.copytree(fine_cache, tmp_path / "served" / "cache")
    with FileServer(tmp_path / "served") as server:
        yield server


def test_what_is_pulled_is_the_cache(server: FileServer, fine_cache: Path, tmp_path: Path):
    found = pull(f"{server.url}/cache", tmp_path / "out")
    assert found.root_hash == open_cache(tmp_path / "out").root_hash == open_cache(fine_cache).root_hash
    assert verify(tmp_path / "out") == [] and not (tmp_path / "out" / "commits").exists()
    assert found.there == 0 and found.bytes == sum(
        path.stat().st_size for path in (tmp_path / "out" / "data.zarr").rglob("*") if path.is_file()
    )


def test_only_what_lacks_is_fetched(server: FileServer, tmp_path: Path):
    out = tmp_path / "out"
    pull(f"{server.url}/cache", out)
    shards = open_cache(out).manifest.shards
    (out / shards[0].path).unlink()
    (out / shards[1].path).write_bytes(bytes(shards[1].size))
    (out / "manifest.json").unlink()
    server.clear()
    assert pull(f"{server.url}/cache", out).files == 2 and verify(out) == []
    assert sum("data.zarr" in path for path in server.asked) == 2


def test_a_pull_that_fails_leaves_nothing_that_looks_whole(server: FileServer, tmp_path: Path):
    out = tmp_path / "out"
    path = server.folder / "cache" / open_cache(server.folder / "cache").manifest.shards[3].path
    data = path.read_bytes()
    path.write_bytes(bytes(len(data)))
    with pytest.raises(CorruptError, match="was fetched twice"):
        pull(f"{server.url}/cache", out)
    with pytest.raises(CacheError):
        open_cache(out)
    path.write_bytes(data)
    pull(f"{server.url}/cache", out)
    assert verify(out) == []


def test_a_part_says_that_it_is_one(server: FileServer, tmp_path: Path):
    out = tmp_path / "out"
    words = ["pull", f"{server.url}/cache", "--out", str(out), "--arrays", "image,label"]
    said = CliRunner().invoke(cache, words)
    assert said.exit_code == 0 and "; a part: image, label" in said.output
    opened = open_cache(out)
    assert opened.read("image").shape[0] == 100
    with pytest.raises(IncompleteError, match=r"is a part of a cache, without delta/pgd-vit; it has image, label"):
        opened.read("delta/pgd-vit")
    with pytest.raises(CacheError, match="is a part of a cache"):
        push(out, "memory://part/cache")
    pull(f"{server.url}/cache", out)
    assert open_cache(out).part is None and verify(out) == []


def test_arrays_that_are_pulled_one_after_the_other_are_there_together(server: FileServer, tmp_path: Path):
    url, out = f"{server.url}/cache", tmp_path / "out"
    pull(url, out, arrays=["image", "label"])
    assert pull(url, out, arrays=["delta/pgd-vit", "label"]).part == ("image", "label", "delta/pgd-vit")
    opened = open_cache(out)
    assert opened.part == ("image", "label", "delta/pgd-vit") and len(opened.read("delta/pgd-vit")) == 100
    whole = pull(url, out, arrays=[name for name in opened.arrays if name != "image"])
    assert whole.part == () and open_cache(out).part is None and verify(out) == []
    assert pull(url, out, arrays=["image"]).part == () and open_cache(out).part is None  # it is whole, and stays so


def test_of_a_part_of_another_state_nothing_is_taken_for_there(server: FileServer, tmp_path: Path):
    url, out = f"{server.url}/cache", tmp_path / "out"
    for written in (seal_json({"arrays": ["image"], "of": "0" * 64}), b"damaged"):
        pull(url, out, arrays=["image"])
        (out / "part.json").write_bytes(written)
        assert pull(url, out, arrays=["label"]).part == open_cache(out).part == ("label",)


def test_of_a_cache_that_grew_only_what_is_new_is_fetched(
    small: Callable[..., Plan], build_into: Callable[..., Path], tmp_path: Path
):
    def without_vit(config: dict[str, Any]) -> None:
        config["teachers"] = {"cnn": config["teachers"]["cnn"]}

    old, served, out = small(without_vit), tmp_path / "served" / "cache", tmp_path / "out"
    build_into(old, served)
    seal(served)
    with FileServer(tmp_path / "served") as server:
        pull(f"{server.url}/cache", out)
        before = {shard.path for shard in open_cache(out).manifest.shards}
        push(served, "memory://grows/cache")
        new = small()
        grow(served, new.spec)
        build_into(new, served)
        root_hash = seal(served).root_hash
        server.clear()
        found = pull(f"{server.url}/cache", out)
        added = {shard.path for shard in open_cache(out).manifest.shards} - before
        fetched = [path for path in server.asked if "data.zarr" in path and not path.endswith("zarr.json")]
    assert found.root_hash == open_cache(out).root_hash == root_hash and verify(out) == []
    assert push(served, "memory://grows/cache").root_hash == root_hash and verify("memory://grows/cache") == []
    MemoryFileSystem.store.clear()
    assert added and sorted(path.split("/cache/")[1] for path in fetched) == sorted(added)


def test_what_is_pushed_or_exported_tells_nothing_of_the_machine(fine_cache: Path, tmp_path: Path):
    push(fine_cache, "memory://told/cache")
    export_webdataset(open_cache(fine_cache), tmp_path / "tars", "samples")
    storage, told = open_storage("memory://told/cache"), (str(tmp_path.parent), str(Path.home()), getuser())
    files = {key: storage.read(key) or b"" for key in storage.keys("")}
    files |= {path.name: path.read_bytes() for path in (tmp_path / "tars").iterdir()}
    assert "origin.json" not in files and not any(key.startswith("commits") for key in files)
    texts = (*told[:2], *(name for name in (told[2], platform.node()) if name != "root"))
    assert not [key for key, data in files.items() if any(text.encode() in data for text in texts)]
    MemoryFileSystem.store.clear()


def test_an_export_is_pulled_too(server: FileServer, tmp_path: Path):
    export_webdataset(open_cache(server.folder / "cache"), server.folder / "tars", "blocks")
    pull(f"{server.url}/tars", tmp_path / "out")
    assert open_shards(tmp_path / "out").root_hash == open_cache(server.folder / "cache").root_hash


def test_what_cannot_be_pulled(server: FileServer, fine_cache: Path, tmp_path: Path):
    with pytest.raises(ConfigError, match="pull copies from a URL"):
        pull(str(fine_cache), tmp_path / "out")
    with pytest.raises(ConfigError, match="has no array 'nonsense'"):
        pull(f"{server.url}/cache", tmp_path / "out", arrays=["nonsense"])
    with pytest.raises(CacheError, match="holds a cache that was built there"):
        pull(f"{server.url}/cache", server.folder / "cache")


def test_a_push_goes_to_a_url(fine_cache: Path):
    assert push(fine_cache, "memory://pushed/cache").root_hash == open_cache("memory://pushed/cache").root_hash
    assert verify("memory://pushed/cache") == []
    MemoryFileSystem.store.clear()


def test_what_is_pushed_over_does_not_look_whole_meanwhile(fine_cache: Path, tmp_path: Path, monkeypatch):
    url, whole = "memory://over/cache", []
    push(fine_cache, url)
    there, write = open_storage(url), FsspecStorage.write
    export_webdataset(open_cache(fine_cache), tmp_path / "tars", "blocks")
    there.write("manifest.json", b"of another state")
    there.write("index.json", (tmp_path / "tars" / "index.json").read_bytes())

    def watch(self: FsspecStorage, key: str, data: bytes) -> None:
        whole.extend(name for name in ("manifest.json", "index.json") if self.size(name) is not None)
        write(self, key, data)

    monkeypatch.setattr(FsspecStorage, "write", watch)
    push(fine_cache, url)
    assert whole == [] and verify(url) == [] and type(open_shards(url)) is Cache
    push(fine_cache, url)
    assert whole  # the same state stays whole
    whole.clear()
    push(tmp_path / "tars", url)  # the export of the same data takes its place
    assert whole == [] and type(open_shards(url)) is not Cache and there.size("manifest.json") is None
    MemoryFileSystem.store.clear()


@pytest.mark.parametrize("key", ["spec.json", "index.json"])
def test_over_a_cache_of_other_data_nothing_is_pushed(fine_cache: Path, tmp_path: Path, key: str):
    url, own = f"memory://other/{key}", open_cache(fine_cache).spec.data.sha256
    export_webdataset(open_cache(fine_cache), tmp_path / "tars", "blocks")
    data = ((fine_cache if key == "spec.json" else tmp_path / "tars") / key).read_bytes()
    there = open_storage(url)
    for found, says in (
        (data.replace(own.encode(), b"0" * 64), "data 000000000000"),
        (b"{", "what this version does not"),
    ):
        there.write(key, found)
        with pytest.raises(
            SpecMismatchError, match=f"{key} describes {says}.*, .* holds data {own[:12]}: push to another"
        ):
            push(fine_cache, url)
        assert there.keys() == [key] and there.read(key) == found
    MemoryFileSystem.store.clear()


def test_over_another_state_of_a_cache_that_was_built_there_nothing_is_pushed(fine_cache: Path):
    url = "memory://built/cache"
    push(fine_cache, url)
    there = open_storage(url)
    there.write("commits/label/0.json", b"{}")
    push(fine_cache, url)  # the same state
    there.write("manifest.json", b"of another state")
    with pytest.raises(CacheError, match="built/cache holds a cache that was built there, in another state"):
        push(fine_cache, url)
    assert there.read("manifest.json") == b"of another state"
    MemoryFileSystem.store.clear()


def test_a_served_cache_is_verified_by_its_manifest(server: FileServer):
    shutil.rmtree(server.folder / "cache" / "commits")
    assert verify(f"{server.url}/cache") == []


def test_the_tags_of_s3():
    assert _expected_tag(b"abc") == "900150983cd24fb0d6963f7d28e17f72" and _expected_tag(bytes(6 << 20)).endswith("-2")
