"""Places: the same promises for a folder and for a URL."""

from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from darht.core import retry, storage_fsspec
from darht.core.errors import ConfigError, DarhtError, UnreachableError
from darht.core.storage import LocalStorage, Storage, open_file, open_storage
from darht.core.storage_fsspec import FsspecStorage


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "_FIRST_WAIT", 0.001)


@pytest.fixture(params=["local", "memory"])
def somewhere(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Storage]:
    """An empty storage of each kind."""
    if request.param == "local":
        yield open_storage(tmp_path / "folder")
        return
    yield open_storage(f"memory://places-{request.node.name}/folder/")
    MemoryFileSystem.store.clear()


def test_what_is_written_is_there(somewhere: Storage):
    assert somewhere.is_free()
    assert (somewhere.read("a/b.bin"), somewhere.size("a/b.bin")) == (None, None)
    somewhere.write("a/b.bin", b"0123456789")
    somewhere.write("c", b"")
    assert (somewhere.read("a/b.bin"), somewhere.size("a/b.bin")) == (b"0123456789", 10)
    assert (somewhere.read("c"), somewhere.size("c")) == (b"", 0)
    assert somewhere.keys() == ["a/b.bin", "c"] and somewhere.keys("a") == ["a/b.bin"] and somewhere.keys("z") == []
    assert not somewhere.is_free()
    somewhere.write("a/b.bin", b"new")
    assert somewhere.read("a/b.bin") == b"new" and somewhere.keys() == ["a/b.bin", "c"]


@pytest.mark.parametrize(
    ("start", "stop", "expected"), [(0, 3, b"012"), (4, 6, b"45"), (7, None, b"789"), (8, 99, b"89")]
)
def test_a_range_of_bytes(somewhere: Storage, start, stop, expected):
    somewhere.write("x", b"0123456789")
    assert somewhere.read("x", start, stop) == expected


def test_removing(somewhere: Storage):
    somewhere.write("x", b"1")
    somewhere.remove("x")
    somewhere.remove("x")
    assert somewhere.read("x") is None and somewhere.is_free()


def test_what_cannot_be_removed_is_one_line(tmp_path: Path):
    (tmp_path / "folder").mkdir()
    folder = LocalStorage(tmp_path)
    with pytest.raises(DarhtError, match=r"cannot remove .*folder: "):
        folder.remove("folder")
    assert folder.modified("folder") is None and folder.modified("folder/none") is None


def test_a_home_that_nobody_has_is_one_line():
    with pytest.raises(ConfigError, match="~nobody-here/cache names a home that this machine does not know"):
        open_storage("~nobody-here/cache")


def test_names_for_messages(tmp_path: Path):
    assert str(open_storage(tmp_path)) == str(tmp_path) and open_storage(tmp_path).name("a/b") == str(
        tmp_path / "a" / "b"
    )
    assert (
        str(open_storage("memory://x/y/")) == "memory://x/y"
        and open_storage("memory://x/y/").name("a/b") == "memory://x/y/a/b"
    )


def test_which_place_a_location_is(tmp_path: Path):
    assert (
        open_storage(str(tmp_path))
        == open_storage(tmp_path)
        == open_storage(f"file://{tmp_path}")
        == LocalStorage(tmp_path)
    )
    remote = open_storage("memory://x")
    assert remote == FsspecStorage("memory://x") and open_storage(remote) is remote
    assert open_storage("~/x") == LocalStorage(Path.home() / "x")


def test_a_protocol_that_nobody_knows():
    with pytest.raises(ConfigError, match=r"nonsense://x is no location that can be used: a location is a folder or"):
        open_storage("nonsense://x")


def test_a_protocol_without_its_package(monkeypatch: pytest.MonkeyPatch):
    def missing(*arguments, **options):
        raise ImportError("Install memoryfs")

    storage_fsspec._file_system.cache_clear()
    monkeypatch.setattr(fsspec, "url_to_fs", missing)
    with pytest.raises(ConfigError, match=r"memory://x needs a package that is not installed: Install memoryfs"):
        open_storage("memory://x").read("a")


class Flaky:
    """Fails so many times, then does what it is asked."""

    def __init__(self, failures: int, error: Exception) -> None:
        self.failures, self.error, self.calls = failures, error, 0

    def cat_file(self, path: str, **bounds: int) -> bytes:
        self.calls += 1
        if self.calls <= self.failures:
            raise self.error
        return b"data"


@pytest.mark.parametrize("error", [OSError("reset"), TimeoutError(), ValueError("half an answer")])
def test_what_fails_is_tried_again(monkeypatch: pytest.MonkeyPatch, error: Exception):
    flaky = Flaky(4, error)
    monkeypatch.setattr(FsspecStorage, "_system", flaky)
    assert FsspecStorage("memory://b/c").read("x") == b"data" and flaky.calls == 5


def test_what_goes_on_failing_is_an_error(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(FsspecStorage, "_system", Flaky(10**6, OSError("reset")))
    with pytest.raises(
        UnreachableError, match=r"cannot read memory://b/c/x: \d+ tries .* \(OSError: reset\); see that"
    ):
        FsspecStorage("memory://b/c", retry_for=0.02).read("x")


def test_what_is_forbidden_is_not_tried_again(monkeypatch: pytest.MonkeyPatch):
    flaky = Flaky(5, PermissionError("Access Denied"))
    monkeypatch.setattr(FsspecStorage, "_system", flaky)
    with pytest.raises(DarhtError, match=r"cannot read memory://b/c/x: permission denied \(Access Denied\)"):
        FsspecStorage("memory://b/c").read("x")
    assert flaky.calls == 1


def test_a_file_is_a_stream(somewhere: Storage):
    somewhere.write("x", bytes(range(100)))
    with open_file(somewhere, "x", 100) as file:
        file.seek(90)
        assert file.read() == bytes(range(90, 100))


def test_a_tag_tells_a_replaced_file_from_the_one_before(tmp_path: Path):
    place = LocalStorage(tmp_path)
    place.write("x", b"0123")
    before = place.read_tagged("x")
    place.write("x", b"4567")
    assert before is not None and place.read_tagged("x") not in (None, (b"4567", before[1]))
    assert place.read_tagged("y") is None


def test_googles_other_name_is_known():
    assert open_storage("gcs://bucket/c/") == open_storage("gs://bucket/c")


@pytest.mark.parametrize(
    "url",
    [
        "ftp://host/cache",
        "reference://",
        "zip://cache.zip",
        "tar://cache.tar",
        "github://owner:name@/cache",
        "simplecache::s3://bucket/cache",
        "memory://cache::zip://x.zip",
        "filecache::reference::https://host/x",
        "x" * 10_000 + "://a",
    ],
    ids=lambda url: url[:20],
)
def test_urls_that_chain_unpack_or_run_are_refused(url):
    with pytest.raises(
        ConfigError, match=r"one URL of s3, s3a, .*, file; got .*: copy it to one of these first"
    ) as caught:
        open_storage(url)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500
