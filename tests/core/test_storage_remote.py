"""Folders behind HTTP: requests for small and large files, what fails for a while and what for good."""

import logging
import multiprocessing
import os
import ssl
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from servers import FileServer, served

from darht.core import retry, storage_remote
from darht.core.errors import DarhtError, UnreachableError
from darht.core.storage import open_file, open_storage
from darht.core.storage_remote import PIECE, RemoteStorage


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FileServer]:
    folder = tmp_path_factory.mktemp("served")
    (folder / "small").write_bytes(b"0123456789")
    (folder / "empty").write_bytes(b"")
    (folder / "large").write_bytes(os.urandom(2 * PIECE + 7))
    with FileServer(folder) as server:
        yield server


@pytest.fixture
def server(started: FileServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[FileServer]:
    monkeypatch.setattr(retry, "_FIRST_WAIT", 0.002)
    monkeypatch.setattr(retry, "_LONGEST_WAIT", 0.05)
    started.clear()
    yield started
    started.status, started.failures, started.ranges, started.hang_at = 0, 0, True, ""
    storage_remote._without_ranges.clear()


def test_a_small_file_is_one_request(server: FileServer):
    there = open_storage(server.url)
    assert there.read("small") == b"0123456789" and there.read("none") is None
    assert server.asked == ["GET /small", "GET /none"]
    assert there.read("small", 2, 5) == b"234" and there.read("small", 8, 99) == b"89"
    assert there.read("small", 50, 60) == b"" and there.read("empty") == b""
    assert there.size("small") == 10 and there.size("none") is None and there.modified("small")


def test_a_large_file_comes_in_pieces(server: FileServer):
    data = (server.folder / "large").read_bytes()
    there = open_storage(server.url)
    assert there.read("large") == data and server.asked == ["GET /large"] * 3 and server.sent == len(data)
    assert there.read("large", 5, PIECE + 9) == data[5 : PIECE + 9]
    server.clear()
    with open_file(there, "large", len(data)) as file:
        assert file.read() == data
    assert len(server.asked) == 3 and server.sent == len(data)


def test_a_tag_changes_with_the_file(server: FileServer):
    path, there = server.folder / "changing", open_storage(server.url)
    path.write_bytes(b"one")
    first = there.read_tagged("changing")
    path.write_bytes(b"two")
    second = there.read_tagged("changing")
    assert first and second and (first[0], second[0]) == (b"one", b"two") and first[1] != second[1]


def test_a_server_without_ranges_sends_a_file_once(server: FileServer, caplog: pytest.LogCaptureFixture):
    server.ranges = False
    data, there = (server.folder / "large").read_bytes(), open_storage(server.url)
    assert there.read("small", 2, 5) == b"234"
    server.clear()
    with open_file(there, "large", len(data)) as file:
        assert file.read() == data
    assert server.asked == ["GET /large"]
    assert [record.message.partition(" ")[2] for record in caplog.records] == [
        "sends whole files where a part is asked for: a local copy fetches each file once"
    ]


def test_pythons_own_server_will_do(tmp_path: Path):
    (tmp_path / "file").write_bytes(b"0123456789")
    with served(tmp_path) as url:
        there = open_storage(url)
        assert there.read("file") == b"0123456789" and there.size("file") == 10
        assert there.read("file", 2, 5) == b"234"
        assert there.read("other") is None and there.size("other") is None
        with pytest.raises(DarhtError, match=r"cannot write http://.*: http:// does not replace files at once; give"):
            there.write("x", b"")
        with pytest.raises(DarhtError, match="HTTP servers list no files"):
            there.keys()


def test_what_fails_for_a_while_is_waited_for_with_one_line(server: FileServer, caplog: pytest.LogCaptureFixture):
    server.failures = 5
    assert open_storage(server.url).read("small") == b"0123456789" and len(server.asked) == 6
    host = server.url.removeprefix("http://")
    assert [record.message for record in caplog.records] == [
        f"waiting for {host} (503 Service Unavailable), up to 10 min",
        f"{host} answers again",
    ]
    assert {record.levelno for record in caplog.records} == {logging.WARNING}


def test_a_restarted_server_is_waited_for(server: FileServer):
    server.stop()
    again = threading.Timer(0.2, server.start)
    again.start()
    assert open_storage(server.url).read("small") == b"0123456789"
    again.join()


def test_a_server_that_is_gone_ends_the_waiting(server: FileServer):
    server.stop()
    try:
        with pytest.raises(
            UnreachableError, match=r"small: \d+ tries within 0.1 s \(connection refused\); see .*, and run again$"
        ) as error:
            open_storage(server.url, retry_for=0.1).read("small")
        assert error.value.exit_code == 75
    finally:
        server.start()


def test_a_process_that_ends_waits_for_no_server(monkeypatch: pytest.MonkeyPatch):
    ending = threading.Event()
    ending.set()
    monkeypatch.setattr(retry, "_ENDING", ending)
    with pytest.raises(UnreachableError, match=r"cannot read .*/key: the process ends"):
        RemoteStorage("http://127.0.0.1:1").read("key")


def test_a_server_that_hangs_is_left(server: FileServer, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(storage_remote, "_TIMEOUT", 0.2)
    server.hang_at, server.hang = "small", 1.0
    with pytest.raises(UnreachableError, match="no answer in time"):
        open_storage(server.url, retry_for=0.0).read("small")


@pytest.mark.parametrize(
    ("status", "says"),
    [
        (401, "401, no valid credentials; set DARHT_TOKEN, or write a line for 127.0.0.1"),
        (403, "403, permission denied; set DARHT_TOKEN"),
        (400, "the server refuses with 400; see that the URL is right"),
    ],
)
def test_what_cannot_get_better_is_told_at_once(server: FileServer, status: int, says: str):
    server.status = status
    with pytest.raises(DarhtError, match=says):
        open_storage(server.url).read("small")
    assert len(server.asked) == 1


def test_a_bad_certificate_is_told_at_once(tmp_path: Path):
    import http.server

    key, certificate = tmp_path / "key.pem", tmp_path / "cert.pem"
    made = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=localhost", "-days", "2"]
    subprocess.run([*made, "-keyout", key, "-out", certificate], check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    server = http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler)
    server.handle_error = lambda request, address: None  # type: ignore[method-assign]
    server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    with pytest.raises(
        DarhtError, match=r"the certificate of localhost:\d+ is not valid; trust its authority by SSL_CERT"
    ):
        open_storage(f"https://localhost:{server.server_address[1]}").read("x")
    server.shutdown()
    server.server_close()


def test_credentials_go_to_the_server(server: FileServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("DARHT_TOKEN", "a-secret")
    open_storage(f"{server.url}/.").read("small")
    monkeypatch.delenv("DARHT_TOKEN")
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login me password secret\n")
    (tmp_path / "netrc").chmod(0o600)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    storage_remote._open.cache_clear()
    open_storage(server.url).read("small")
    assert server.authorization == ["Bearer a-secret", "Basic bWU6c2VjcmV0"]
    storage_remote._open.cache_clear()


def _in_child(url: str, queue: "multiprocessing.Queue[str]") -> None:
    try:
        RemoteStorage(url).read("small")
        queue.put("read")
    except DarhtError as error:
        queue.put(str(error))


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_process_says_so(server: FileServer):
    open_storage(server.url).read("small")
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_in_child, args=(server.url, queue))
    child.start()
    said = queue.get(timeout=60)
    child.join()
    assert "was forked from one that has read" in said and "multiprocessing_context='spawn'" in said


@pytest.mark.parametrize(("seconds", "text"), [(600, "10 min"), (7200, "2 h"), (90, "90 s"), (0.5, "0.5 s")])
def test_durations(seconds: float, text: str):
    assert retry.duration(seconds) == text
