"""A cache behind HTTP with latency: rows a second of the first epoch and of later ones, and what crosses the network.

    python bench/remote.py --out docs/benchmarks-remote.md

One server process per setting answers after 0, 10 or 50 ms and sends at most so many bytes a second over all its
connections. Beside it the same cache from the disk, in the same run. Every epoch draws all batches and trains nothing.
"""

import argparse
import http.server
import multiprocessing
import platform
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import Any

import torch
from trainer import make_cache

from darht.cache.read.feed_plan import plan_feed
from darht.cache.read.loader import GIB, needed_bytes
from darht.cache.read.local_copy import CopySettings
from darht.cache.read.reach import Reach
from darht.cache.read.stream import Feed
from darht.cache.read.webdataset import open_shards

CPU = torch.device("cpu")
BATCH, EPOCHS = 128, 3


def serve(folder: Path, latency: float, rate: float, ready: Any) -> None:
    """Files with ranges; `/counts` gives requests and bytes so far. Runs in a process of its own."""
    lock, free_at, counts = threading.Lock(), [0.0], [0, 0]

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version, wbufsize = "HTTP/1.1", 1 << 16

        def log_message(self, *arguments: object) -> None:
            pass

        def reply(self, status: int, data: bytes, *headers: tuple[str, str]) -> None:
            self.send_response(status)
            for name, value in (*headers, ("Content-Length", str(len(data)))):
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data)

        def do_GET(self) -> None:
            if self.path == "/counts":
                self.reply(200, f"{counts[0]} {counts[1]}".encode())
                return
            time.sleep(latency)
            path = folder / self.path.lstrip("/")
            if not path.is_file():
                self.reply(404, b"")
                return
            size, asked = path.stat().st_size, self.headers.get("Range", "bytes=0-").removeprefix("bytes=")
            first, _, last = asked.partition("-")
            start, stop = int(first), min(size, int(last) + 1 if last else size)
            with path.open("rb") as file:
                file.seek(start)
                data = file.read(stop - start)
            with lock:  # one pipe for all
                counts[0], counts[1] = counts[0] + 1, counts[1] + len(data)
                free_at[0] = max(free_at[0], time.monotonic()) + len(data) / rate
                wait = free_at[0] - time.monotonic()
            time.sleep(max(0.0, wait))
            self.reply(
                206, data, ("Content-Range", f"bytes {start}-{stop - 1}/{size}"), ("ETag", f'"{path.name}-{size}"')
            )

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    ready.put(server.server_address[1])
    server.serve_forever()


@contextmanager
def served(folder: Path, latency: float, rate: float) -> Iterator[str]:
    """The URL of a server process."""
    context = multiprocessing.get_context("spawn")
    ready = context.Queue()
    process = context.Process(target=serve, args=(folder, latency, rate, ready), daemon=True)
    process.start()
    try:
        yield f"http://127.0.0.1:{ready.get(timeout=60)}"
    finally:
        process.terminate()
        process.join()


def counts(url: str) -> tuple[int, int]:
    requests, sent = urllib.request.urlopen(f"{url}/counts").read().split()
    return int(requests), int(sent)


def epochs(location: str | Path, reach: Reach, url: str | None) -> list[tuple[float, int, int]]:
    """Rows a second, requests and bytes of each epoch; opening counts as a part of the first."""
    at, start, found = counts(url) if url else (0, 0), time.perf_counter(), []
    cache = open_shards(location, reach)
    budget = 0.6 * needed_bytes(cache, adversarial=True) / GIB
    plan = plan_feed(cache, device=CPU, adversarial=True, batch=BATCH, budget_gib=budget)
    assert plan.kind == "streamed", plan
    with Feed(cache, plan, seed=0, epochs=EPOCHS) as feed:
        for epoch in range(EPOCHS):
            rows = sum(len(positions) for _, positions in feed.batches(epoch))
            seconds, now = time.perf_counter() - start, counts(url) if url else (0, 0)
            found.append((rows / seconds, now[0] - at[0], now[1] - at[1]))
            at, start = now, time.perf_counter()
    return found


def row(name: str, latency: str, found: list[tuple[float, int, int]], size: int, local: float) -> str:
    """A line of the table."""
    first, later = found[0], max(found[1:])
    network = (
        f"{first[1]} | {first[2] / size:.3f} | {later[1]} | {later[2] / size:.3f}" if first[1] else "- | - | - | -"
    )
    return f"| {name} | {latency} | {first[0]:,.0f} | {later[0]:,.0f} | {later[0] / local:.2f} | {network} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--rate", type=float, default=100.0, help="MB a second")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        make_cache(Path(work) / "made", arguments.rows)
        folder = Path(work) / "made" / "cache"
        size = sum(shard.size for shard in open_shards(folder).manifest.shards)
        local = epochs(folder, Reach(), None)
        limit = max(local[1:])[0]
        lines = [row("disk", "-", local, size, limit)]
        for latency in (0, 10, 50):
            with served(folder.parent, latency / 1000, arguments.rate * 1e6) as url:
                for name in ("local copy", "no copy"):
                    copy = CopySettings(Path(work) / f"copies-{latency}", 10**11) if name == "local copy" else None
                    found = epochs(f"{url}/{folder.name}", Reach(copy), url)
                    lines.append(row(f"HTTP, {name}", f"{latency} ms", found, size, limit))
        text = page(lines, arguments, size)
    print(text)
    if arguments.out:
        arguments.out.write_text(text)


def page(lines: list[str], arguments: argparse.Namespace, size: int) -> str:
    """The page of the docs."""
    stream = arguments.rows / (size / (arguments.rate * 1e6))
    return f"""# A cache behind HTTP

    python bench/remote.py --rows {arguments.rows} --rate {arguments.rate:g} --out docs/benchmarks-remote.md

Two cores, AMD EPYC, Python {platform.python_version()}, {date.today()}. A cache of {arguments.rows:,} rows and
{size / 1e6:.1f} MB, streamed in windows with a memory budget of 0.6 of its size, from a server process on the same
machine that waits before each answer and sends {arguments.rate:g} MB a second at most: one stream of that rate would
give {stream:,.0f} rows a second. Bytes are those of the epoch over those of all shards; opening counts as a part of
the first epoch; of the two later ones the faster is shown. Other work ran on the machine, so rows a second are rough;
requests and bytes are exact.

| from | latency | rows/s, first | later | of the disk's | requests, first | bytes | requests, later | bytes |
|---|---|---|---|---|---|---|---|---|
{chr(10).join(lines)}

Shards are read in pieces of 1 MiB, 32 of them at a time. `no copy` is `--cache-size 0`: each shard that is read in
parts is then fetched once more for its sha256.
"""


if __name__ == "__main__":
    main()
