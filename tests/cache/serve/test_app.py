"""What the server answers, asked as an ASGI application; and a trainer that reads from a real one."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from starlette.testclient import TestClient

from darht.cache.export.webdataset import export_webdataset
from darht.cache.read.reader import open_cache
from darht.cache.read.webdataset import open_shards
from darht.cache.serve.app import make_app, read_token
from darht.cache.serve.catalogue import Catalogue
from darht.core.errors import CacheError, ConfigError, DarhtError

TOKEN = "a-token-of-some-length"
READ = """
import sys
import numpy as np
from darht.cache.read.webdataset import open_shards
cache = open_shards(sys.argv[1])
np.savez(sys.argv[2], **{name.replace("/", "|"): cache.read(name) for name in cache.arrays})
"""


@pytest.fixture
def client(copied: Path) -> TestClient:
    return TestClient(make_app(Catalogue([copied])))


def shard_of(folder: Path) -> tuple[str, bytes, str]:
    record = next(one for one in open_cache(folder).manifest.shards if one.array == "logits/cnn/clean")
    return record.path, (folder / record.path).read_bytes(), record.sha256


def test_a_shard_has_its_sha256_as_etag_and_never_changes(client: TestClient, copied: Path):
    key, data, sha256 = shard_of(copied)
    found = client.get(f"/{copied.name}/{key}")
    assert found.status_code == 200 and found.content == data
    assert found.headers["etag"] == f'"{sha256}"'
    assert found.headers["cache-control"].endswith("immutable")
    assert client.get(f"/{copied.name}/{key}", headers={"if-none-match": f'"{sha256}"'}).status_code == 304
    head = client.head(f"/{copied.name}/{key}")
    assert head.status_code == 200 and head.content == b"" and int(head.headers["content-length"]) == len(data)


def test_ranges(client: TestClient, copied: Path):
    key, data, _ = shard_of(copied)
    for given, want in (("bytes=3-9", data[3:10]), ("bytes=5-", data[5:]), ("bytes=-7", data[-7:])):
        found = client.get(f"/{copied.name}/{key}", headers={"range": given})
        assert found.status_code == 206 and found.content == want
    assert client.get(f"/{copied.name}/{key}", headers={"range": f"bytes={len(data)}-"}).status_code == 416
    many = client.get(f"/{copied.name}/{key}", headers={"range": "bytes=0-1,3-4"})
    assert many.status_code == 200 and many.content == data


@pytest.mark.parametrize(
    "key",
    [
        "origin.json",
        "commits/label/00000.json",
        "../secret.txt",
        "%2e%2e/secret.txt",
        "data.zarr/../../secret.txt",
        "data.zarr",
        "",
    ],
)
def test_only_what_the_manifest_names_is_served(client: TestClient, copied: Path, key: str):
    (copied.parent / "secret.txt").write_text("mine")
    found = client.get(f"/{copied.name}/{key}")
    assert found.status_code == 404 and "mine" not in found.text
    assert client.get("/another/spec.json").status_code == 404
    assert client.post(f"/{copied.name}/spec.json", content=b"x").status_code == 405


def test_without_the_token_nothing_but_the_health_is_told(copied: Path):
    client = TestClient(make_app(Catalogue([copied]), TOKEN))
    assert client.get("/healthz").text == "ok\n"
    for given in ({}, {"authorization": "Bearer wrong"}, {"authorization": TOKEN}, {"authorization": b"Bearer \xff"}):
        for path in ("/", f"/{copied.name}/manifest.json", "/another/x"):
            assert client.get(path, headers=given).status_code == 401
    found = client.get(f"/{copied.name}/manifest.json", headers={"authorization": f"Bearer {TOKEN}"})
    assert found.status_code == 200 and found.headers["cache-control"] == "private, no-cache"


def test_the_page_names_every_cache_and_the_command_that_trains_from_it(client: TestClient, copied: Path):
    page = client.get("/").text
    assert open_cache(copied).root_hash in page and "cnn (resnet18)" in page
    assert f"darht-train --shards http://testserver/{copied.name} --out run" in page


def test_the_page_says_which_cache_is_being_written_and_shows_the_others(
    copied: Path, fine_cache: Path, tmp_path: Path
):
    other = Path(shutil.copytree(fine_cache, tmp_path / "other"))
    client = TestClient(make_app(Catalogue([copied, other])))
    (copied / "manifest.json").unlink()  # as build does while it extends
    page = client.get("/")
    assert page.status_code == 200 and f"<h2>{copied.name}</h2><p>being written, or damaged" in page.text
    assert open_cache(other).root_hash in page.text and f"/{copied.name} --out run" not in page.text


def test_what_the_disk_no_longer_holds_is_an_error(client: TestClient, copied: Path):
    key, data, _ = shard_of(copied)
    (copied / key).write_bytes(data[:-1])
    found = client.get(f"/{copied.name}/{key}")
    assert found.status_code == 503 and f"has {len(data) - 1} bytes, its manifest says {len(data)}" in found.text
    (copied / key).unlink()
    assert client.get(f"/{copied.name}/{key}").status_code == 503


def test_a_shard_with_other_bytes_is_not_sent_as_the_sealed_one(client: TestClient, copied: Path):
    key, data, _ = shard_of(copied)
    assert client.get(f"/{copied.name}/{key}").status_code == 200
    (copied / key).write_bytes(bytes(len(data)))
    found = client.get(f"/{copied.name}/{key}", headers={"range": "bytes=0-3"})
    assert found.status_code == 503 and "does not have the sha256 that its manifest names" in found.text
    (copied / key).write_bytes(data)
    assert client.get(f"/{copied.name}/{key}").content == data


def test_a_cache_that_is_replaced_is_read_again(client: TestClient, copied: Path, fine_cache: Path):
    before = client.get(f"/{copied.name}/manifest.json").text
    shutil.rmtree(copied)
    assert client.get(f"/{copied.name}/manifest.json").status_code == 503
    shutil.copytree(fine_cache, copied)
    after = client.get(f"/{copied.name}/manifest.json").text
    assert after != before and open_cache(fine_cache).root_hash in after


def test_an_export_is_served_as_well(tiny_cache: Path, tmp_path: Path):
    export_webdataset(open_cache(tiny_cache), tmp_path / "tars", "blocks")
    client = TestClient(make_app(Catalogue([tmp_path / "tars"])))
    assert client.get("/tars/index.json").status_code == 200
    assert client.get("/tars/shard-00003.tar").content == (tmp_path / "tars/shard-00003.tar").read_bytes()


def test_what_cannot_be_served_is_refused(tiny_cache: Path, tmp_path: Path):
    with pytest.raises(CacheError, match="holds no sealed cache and no export"):
        Catalogue([tmp_path])
    shutil.copytree(tiny_cache, tmp_path / "a b")
    with pytest.raises(ConfigError, match="cannot be a part of a URL"):
        Catalogue([tmp_path / "a b"])
    shutil.copytree(tiny_cache, tmp_path / "more" / tiny_cache.name)
    with pytest.raises(ConfigError, match="have one name"):
        Catalogue([tiny_cache, tmp_path / "more" / tiny_cache.name])


def test_tokens_are_long_enough_and_one_line(tmp_path: Path):
    path = tmp_path / "token"
    path.write_text(f" {TOKEN}\n")
    assert read_token(path) == TOKEN
    for wrong in ("short", "two words are not one", ""):
        path.write_text(wrong)
        with pytest.raises(DarhtError, match="at least 16"):
            read_token(path)
    with pytest.raises(DarhtError, match="cannot be read as a token"):
        read_token(tmp_path / "absent")


def test_a_reader_with_the_token_reads_every_bit_from_a_real_server(tiny_cache: Path, tmp_path: Path):
    """Reading is in a process of its own: a token of another test must not be remembered."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (tmp_path / "token").write_text(TOKEN)
    serving = [sys.executable, "-c", "from darht.cache.cli import cache; cache()", "serve", str(tiny_cache)]
    options = ["--port", str(port), "--token-file", str(tmp_path / "token")]
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen([*serving, *options], stdout=log, stderr=log)
    try:
        wait_for(f"http://127.0.0.1:{port}/healthz")
        url, out = f"http://127.0.0.1:{port}/{tiny_cache.name}", tmp_path / "read.npz"
        read = [sys.executable, "-c", READ, url, str(out)]
        refused = subprocess.run(read, env=os.environ | {"DARHT_TOKEN": "wrong"}, capture_output=True, check=False)
        assert refused.returncode != 0
        subprocess.run(read, env=os.environ | {"DARHT_TOKEN": TOKEN}, check=True)
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(timeout=60)
    with np.load(out) as found:
        cache = open_shards(tiny_cache)
        for name in cache.arrays:
            np.testing.assert_array_equal(found[name.replace("/", "|")], cache.read(name))
    assert TOKEN not in (tmp_path / "log").read_text()


def wait_for(url: str) -> None:
    for _ in range(600):
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except OSError:
            time.sleep(0.1)
    raise AssertionError(f"{url} does not answer")
