"""A server with latency and a bandwidth that counts what it sends: over HTTP, and as S3 has it (`URL/bucket/key`)."""

import email.utils
import functools
import hashlib
import http.server
import multiprocessing
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def serve(folder: Path, latency: float, rate: float, ready: Any) -> None:
    """Files with ranges; `/counts` gives requests and bytes so far. Runs in a process of its own.

    Args:
        folder: whose files are served.
        latency: seconds before each answer.
        rate: bytes a second, over all connections.
        ready: a queue that gets the port.
    """
    lock, free_at, counted = threading.Lock(), [0.0], [0, 0]

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version, wbufsize = "HTTP/1.1", 1 << 16

        def log_message(self, *arguments: object) -> None:
            pass

        def reply(self, status: int, size: int, data: bytes, **headers: str) -> None:
            self.send_response(status)
            for name, value in {"Content-Length": str(size), **headers}.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            self.wfile.write(data)

        def do_GET(self) -> None:
            if self.path == "/counts":
                text = f"{counted[0]} {counted[1]}".encode()
                self.reply(200, len(text), text)
                return
            time.sleep(latency)
            path = folder / self.path.partition("?")[0].lstrip("/")
            head, asked = self.command == "HEAD", self.headers.get("Range", "")
            status, size, data, about = answer(path, asked, head=head)
            if "Authorization" in self.headers and status < 400:  # S3
                about |= {"ETag": '"md5"', "x_amz_meta_sha256": sha256(path)}
            self.pay(len(data))
            self.reply(status, size, data, **about)

        def do_HEAD(self) -> None:
            self.do_GET()

        def pay(self, size: int) -> None:
            """Count an answer, and wait until the one pipe for all has room for it."""
            with lock:
                counted[0], counted[1] = counted[0] + 1, counted[1] + size
                free_at[0] = max(free_at[0], time.monotonic()) + size / rate
                wait = free_at[0] - time.monotonic()
            time.sleep(max(0.0, wait))

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    ready.put(server.server_address[1])
    server.serve_forever()


@functools.cache
def sha256(path: Path) -> str:
    """Of a file: the ETag that `darht-cache serve` sends."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def answer(path: Path, asked: str, *, head: bool) -> tuple[int, int, bytes, dict[str, str]]:
    """Status, length, bytes and headers for a file, or for the range of it that is `asked`."""
    if not path.is_file():
        return 404, 0, b"", {}
    found = path.stat()
    about = {
        "ETag": f'"{sha256(path)}"',
        "Accept_Ranges": "bytes",
        "Last_Modified": email.utils.formatdate(found.st_mtime, usegmt=True),
    }
    if head:
        return 200, found.st_size, b"", about
    first, _, last = asked.removeprefix("bytes=").partition("-")
    start, stop = int(first or 0), min(found.st_size, int(last) + 1 if last else found.st_size)
    with path.open("rb") as file:
        file.seek(start)
        data = file.read(stop - start)
    if asked:
        about["Content_Range"] = f"bytes {start}-{stop - 1}/{found.st_size}"
    return 206 if asked else 200, len(data), data, about


@contextmanager
def served(folder: Path, latency: float, rate: float) -> Iterator[str]:
    """The URL of a server process; see `serve`."""
    context = multiprocessing.get_context("spawn")
    ready = context.Queue()
    process = context.Process(target=serve, args=(folder, latency, rate, ready), daemon=True)
    process.start()
    try:
        yield f"http://127.0.0.1:{ready.get(timeout=120)}"
    finally:
        process.terminate()
        process.join()


def counts(url: str) -> tuple[int, int]:
    """Requests and bytes so far; of no server none."""
    if not url:
        return 0, 0
    requests, sent = urllib.request.urlopen(f"{url}/counts").read().split()
    return int(requests), int(sent)
