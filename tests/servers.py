"""Servers on loopback: files over HTTP, and a proxy that fails as networks do, on a seeded schedule."""

import contextlib
import hashlib
import http.client
import http.server
import random
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import TracebackType

_FAULTS = ("busy", "reset", "cut")


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *arguments: object) -> None:
        pass


@contextlib.contextmanager
def served(folder: Path) -> Iterator[str]:
    """The URL under which the files of a folder can be read; this server knows no ranges."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


class FaultProxy:
    """Forwards to `target` on loopback, and spoils the share `rate` of the requests.

    Attributes:
        rate: share of requests that get a 503, a connection reset, or half an answer.
        flip: change one byte of every answer that is long enough to be a shard.
        faults: how many were injected, by kind.
    """

    def __init__(self, target: tuple[str, int], seed: int = 0) -> None:
        self.rate, self.flip, self.faults = 0.0, False, dict.fromkeys(_FAULTS, 0)
        self._row = Counter[str]()
        self._target, self._random, self._lock = target, random.Random(seed), threading.Lock()
        proxy = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *arguments: object) -> None:
                pass

            def forward(self) -> None:
                proxy.handle(self)

            do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = forward

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True

    @property
    def url(self) -> str:
        """Where clients connect to."""
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> "FaultProxy":
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._server.shutdown()
        self._server.server_close()

    def handle(self, request: http.server.BaseHTTPRequestHandler) -> None:
        """One request: forwarded whole, or spoiled."""
        body = self._body(request)
        with self._lock:
            fault = self._draw(f"{request.command} {request.path}")
        if fault:
            self.faults[fault] += 1
        if fault == "busy":
            request.send_response(503)
            request.send_header("Content-Length", "0")
            request.end_headers()
            return
        if fault == "reset":
            self._hang_up(request)
            return
        connection = http.client.HTTPConnection(*self._target, timeout=30)
        connection.request(request.command, request.path, body=body, headers=dict(request.headers))
        answer = connection.getresponse()
        data = bytearray(answer.read())
        if self.flip and request.command == "GET" and len(data) > 500:
            data[len(data) // 2] ^= 1
        request.send_response(answer.status)
        length = answer.getheader("Content-Length") if request.command == "HEAD" else str(len(data))
        for name, value in answer.getheaders():
            if name.lower() not in ("content-length", "transfer-encoding", "connection"):
                request.send_header(name, value)
        request.send_header("Content-Length", length or "0")
        request.end_headers()
        if fault == "cut":
            request.wfile.write(data[: len(data) // 2])
            self._hang_up(request)
        else:
            request.wfile.write(data)
        connection.close()

    def _draw(self, what: str) -> str:
        """The fault of a request; below a rate of 1 no three in a row, so that five tries are always enough."""
        fault = self._random.choice(_FAULTS) if self._random.random() < self.rate else ""
        self._row[what] += 1
        if not fault or (self.rate < 1 and self._row[what] == 3):
            self._row[what], fault = 0, ""
        return fault

    @staticmethod
    def _body(request: http.server.BaseHTTPRequestHandler) -> bytes:
        return request.rfile.read(int(request.headers.get("Content-Length") or 0))

    @staticmethod
    def _hang_up(request: http.server.BaseHTTPRequestHandler) -> None:
        request.close_connection = True
        request.wfile.flush()
        request.connection.shutdown(socket.SHUT_RDWR)


class FileServer:
    """Files of a folder over HTTP with ranges and ETags, that counts what it is asked and fails as it is told.

    Attributes:
        asked: method and path of every request, in order.
        sent: bytes of files sent.
        status: answer every request with this, unless it is 0.
        failures: so many of the next requests get a 503.
        latency: seconds before each answer.
        hang: seconds before each answer to a request for a path that contains `hang_at`.
        ranges: whether parts are sent where they are asked for.
        flip: change a byte of every file that is large enough to be a shard.
        named: whether ETags are the sha256 of the file, as those of `darht-cache serve` are, or say nothing of it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.asked, self.sent = folder, list[str](), 0
        self.status, self.failures, self.latency, self.hang, self.hang_at = 0, 0, 0.0, 0.0, ""
        self.ranges, self.flip, self.named = True, False, True
        self.authorization: list[str | None] = []
        self._lock, self._connections = threading.Lock(), list[socket.socket]()
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *arguments: object) -> None:
                pass

            def setup(self) -> None:
                super().setup()
                outer._connections.append(self.connection)

            def answer(self) -> None:
                with contextlib.suppress(ConnectionError):
                    outer.handle(self)

            do_GET = do_HEAD = answer

        self._handler = Handler
        self._server: http.server.ThreadingHTTPServer | None = None
        self._port = 0

    @property
    def url(self) -> str:
        """Where the folder's files are."""
        return f"http://127.0.0.1:{self._port}"

    def start(self) -> None:
        """Listen, at the same port as before."""
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", self._port), self._handler)
        self._server.daemon_threads, self._port = True, self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def stop(self) -> None:
        """Refuse connections, and hang up those that are open."""
        if self._server is not None:
            while self._connections:
                with contextlib.suppress(OSError):
                    self._connections.pop().shutdown(socket.SHUT_RDWR)
            self._server.shutdown()
            self._server.server_close()
            self._server = None

    def __enter__(self) -> "FileServer":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def clear(self) -> None:
        """Begin to count anew."""
        self.asked, self.sent, self.authorization = [], 0, []

    def handle(self, request: http.server.BaseHTTPRequestHandler) -> None:
        """One request."""
        with self._lock:
            self.asked.append(f"{request.command} {request.path}")
            self.authorization.append(request.headers.get("Authorization"))
            status = self.status or (503 if self.failures > 0 else 0)
            self.failures -= 1
        time.sleep(self.hang if self.hang_at and self.hang_at in request.path else self.latency)
        path = self.folder / request.path.lstrip("/")
        if status or not path.is_file():
            request.send_response(status or 404)
            request.send_header("Content-Length", "0")
            request.end_headers()
            return
        data = path.read_bytes()
        if self.flip and len(data) > 500:
            data = data[:250] + bytes([data[250] ^ 1]) + data[251:]
        tag, start, stop = hashlib.sha256(data).hexdigest()[: None if self.named else 16], 0, len(data)
        asked = request.headers.get("Range", "").removeprefix("bytes=")
        if asked and self.ranges:
            first, _, last = asked.partition("-")
            start, stop = int(first), min(len(data), int(last) + 1 if last else len(data))
        if start >= len(data) > 0:
            request.send_response(416)
            start = stop = 0
        elif asked and self.ranges and data:
            request.send_response(206)
            request.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(data)}")
        else:
            request.send_response(200)
        request.send_header("ETag", f'"{tag}"')
        request.send_header("Last-Modified", request.date_time_string(path.stat().st_mtime))
        request.send_header("Content-Length", str(stop - start))
        request.end_headers()
        if request.command == "GET":
            with self._lock:
                self.sent += stop - start
            request.wfile.write(data[start:stop])
