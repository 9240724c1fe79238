"""A cache behind HTTP and S3 with latency: rows a second of the first epoch and of later ones, and what is fetched.

    python bench/remote.py --peers PYTHON --out docs/benchmarks-remote.md

One server process per latency answers both protocols and sends at most so many bytes a second over all connections.
From it read darht, and LitData and MosaicML Streaming where PYTHON has them, each in a process of its own and with a
copy of its own on the disk. The same cache from the disk is the limit: darht's later epochs alternate with epochs from
the disk in the same process, so that a busy machine disturbs both alike. Every epoch draws all batches and trains
nothing. Beside that 32 readers at once from one `darht-cache serve`.
"""

import argparse
import importlib.util
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cache_readers import BATCH, CLASSES, CPU, PACKAGES, litdata_write, mosaicml_write, stand_in
from remote_page import CHUNK, EPOCHS, FEW, LATENCIES, TRAINERS, Epoch, Line, page
from remote_server import counts, served

KEYS = {
    "AWS_ACCESS_KEY_ID": "key",
    "AWS_SECRET_ACCESS_KEY": "secret",
    "AWS_DEFAULT_REGION": "us-east-1",
}
SETTLED = 0.03  # seconds in which the first window of a next epoch is read ahead, and disturbs the other reader no more


# ------------------------------------------------------------------------------- what reads, in a process of its own


def darht(arguments: argparse.Namespace) -> Callable[[int], Iterator[int]]:
    """Streamed in windows that hold 0.6 of the cache, from a copy on the disk if there is a folder for one."""
    from darht.cache.read.feed_plan import plan_feed
    from darht.cache.read.loader import GIB
    from darht.cache.read.local_copy import CopySettings
    from darht.cache.read.reach import Reach
    from darht.cache.read.sizes import needed_bytes
    from darht.cache.read.stream import Feed
    from darht.cache.read.webdataset import open_shards

    copy = CopySettings(Path(arguments.copies), 10**11) if arguments.copies else None
    cache = open_shards(arguments.location, Reach(copy))
    budget = 0.6 * needed_bytes(cache, adversarial=True) / GIB
    plan = plan_feed(cache, device=CPU, adversarial=True, batch=BATCH, budget_gib=budget)
    assert plan.kind == "streamed", plan
    feed = Feed(cache, plan, seed=0, epochs=arguments.epochs)
    return lambda number: (len(positions) for _, positions in feed.batches(number))


def litdata(arguments: argparse.Namespace) -> Callable[[int], Iterator[int]]:
    from litdata import StreamingDataLoader, StreamingDataset
    from litdata.streaming import downloader

    downloader._OBSTORE_CLIENT_OPTIONS["allow_http"] = True  # or its faster client refuses a server without TLS
    data = StreamingDataset(arguments.location, cache_dir=arguments.copies, shuffle=True, batch_decode=False)
    loader = StreamingDataLoader(data, batch_size=BATCH, num_workers=0)
    return lambda number: (len(batch["label"]) for batch in loader)


def mosaicml(arguments: argparse.Namespace) -> Callable[[int], Iterator[int]]:
    from streaming import StreamingDataset

    data = StreamingDataset(remote=arguments.location, local=arguments.copies, shuffle=True, batch_size=BATCH)
    loader = torch.utils.data.DataLoader(data, batch_size=BATCH, num_workers=0)
    return lambda number: (len(batch["label"]) for batch in loader)


READERS = {"darht": darht, "LitData": litdata, "MosaicML Streaming": mosaicml}


def measure(arguments: argparse.Namespace) -> list[dict[str, float]]:
    """Each epoch, and beside it one from the disk; opening counts as a part of the first, imports do not."""
    torch.set_num_threads(1)
    stand_in()
    importlib.import_module(PACKAGES.get(arguments.one, "darht.cache.read.webdataset"))
    at, start, found = counts(arguments.server), time.perf_counter(), []
    epoch, disk = READERS[arguments.one](arguments), None
    for number in range(arguments.epochs):
        rows, now = sum(epoch(number)), time.perf_counter()
        told = counts(arguments.server)
        found.append({"rows_s": rows / (now - start), "requests": told[0] - at[0], "bytes": told[1] - at[1]})
        assert rows == arguments.rows, (rows, arguments.rows)
        if arguments.beside:
            disk = disk or darht(argparse.Namespace(**{**vars(arguments), "location": arguments.beside, "copies": ""}))
            time.sleep(SETTLED)
            start = time.perf_counter()
            found[-1]["disk"] = sum(disk(number)) / (time.perf_counter() - start)
            time.sleep(SETTLED)
        at, start = told, time.perf_counter()
    return found


def apart(python: Path, one: str, location: str | Path, copies: Path | None, server: str, rows: int, disk: Path
          ) -> list[Epoch]:  # fmt: skip
    """`measure` in a process of its own; nothing where the library is not there or fails."""
    words = [str(python), "-W", "ignore", __file__, "--one", one, "--location", str(location), "--server", server]
    words += ["--copies", str(copies or ""), "--rows", str(rows)]
    if one == "darht" and (copies or not server):
        words += ["--epochs", str(EPOCHS), "--beside", str(disk)]
    environment = {**os.environ, **KEYS, "AWS_ENDPOINT_URL": server, "S3_ENDPOINT_URL": server, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, capture_output=True, text=True, check=False, env=environment, timeout=900)
    if done.returncode:
        print(one, location, "failed:", (done.stderr.strip().splitlines() or ["?"])[-1][:300], flush=True)
        return []
    found = [Epoch(**epoch) for epoch in json.loads(done.stdout.strip().splitlines()[-1])]
    print(one, location, [round(epoch.rows_s) for epoch in found], flush=True)
    return found


# ------------------------------------------------------------------------------------------------ trainers at once


def read_all(url: str) -> int:
    """Every row of a cache once, without a copy, as a trainer does in an epoch."""
    arguments = argparse.Namespace(location=url, copies="", epochs=1)
    torch.set_num_threads(1)
    return sum(darht(arguments)(0))


def trainers(folder: Path) -> dict[str, float]:
    """Many readers at once from one `darht-cache serve`; its peak memory in MiB."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["remote", "darht.cache.read.stream", "darht.cache.read.webdataset"])
    code, log = "from darht.cache.cli import cache; cache()", folder.parent / "serve.log"
    words = [sys.executable, "-W", "ignore", "-c", code, "serve", str(folder), "--port", "8791"]
    with log.open("w") as file:
        server = subprocess.Popen(words, stdout=file, stderr=file)
    try:
        url = f"http://127.0.0.1:8791/{folder.name}"
        while "startup complete" not in log.read_text():
            assert server.poll() is None, log.read_text()
            time.sleep(0.2)
        with ProcessPoolExecutor(TRAINERS, mp_context=context) as pool:
            start = time.perf_counter()
            rows = list(pool.map(read_all, [url] * TRAINERS, timeout=900))
            seconds = time.perf_counter() - start
        status = Path(f"/proc/{server.pid}/status").read_text().splitlines()
        peak = next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))
    finally:
        server.terminate()
        server.wait()
    return {"rows": sum(rows), "seconds": seconds, "peak": peak / 1024}


# ------------------------------------------------------------------------------------------------- the whole


def write_data(folder: Path, rows: int, peers: Path | None) -> dict[str, int]:
    """The cache, and the same rows in the formats of the peers; bytes of each."""
    from cache import write_cache

    from darht.cache.read.reader import open_cache

    random = np.random.default_rng(0)
    images, labels = random.integers(0, 256, (rows, 3, 32, 32), dtype=np.uint8), np.arange(rows) % CLASSES
    delta = random.integers(-8, 9, (rows, 1, 3, 32, 32), dtype=np.int8)
    write_cache(folder / "darht", images, labels, delta, views=1)
    sizes = {"darht": sum(shard.size for shard in open_cache(folder / "darht").manifest.shards)}
    for name in ("LitData", "MosaicML Streaming") if peers else ():
        words = [str(peers), "-W", "ignore", __file__, "--write", name, "--location", str(folder)]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        if done.returncode:
            print(name, "is left out:", (done.stderr.strip().splitlines() or ["?"])[-1][:300], flush=True)
            continue
        sizes[name] = sum(path.stat().st_size for path in (folder / PACKAGES[name]).rglob("*") if path.is_file())
    return sizes


def write_peer(name: str, folder: Path) -> None:
    from darht.cache.read.reader import open_cache

    write = {"LitData": litdata_write, "MosaicML Streaming": mosaicml_write}[name]
    write(open_cache(folder / "darht"), folder / PACKAGES[name], CHUNK)


def lines_at(latency: int, work: Path, sizes: dict[str, int], arguments: argparse.Namespace) -> list[Line]:
    """All readers at one latency, in rounds of which the fastest first epoch and the fastest later one count."""
    data, own = work / "data", Path(sys.executable)
    with served(work, latency / 1000, arguments.rate * 1e6) as url:
        readers = {"darht, disk": (own, data / "darht")}
        readers |= {f"darht, {kind} copy": (own, f"{url}/data/darht") for kind in ("HTTP, local", "HTTP, no")}
        readers |= {f"darht, {kind} copy": (own, "s3://data/darht") for kind in ("S3, local", "S3, no")}
        peers = [name for name in sizes if name != "darht"]
        readers |= {f"{name}, S3, local copy": (arguments.peers, f"s3://data/{PACKAGES[name]}") for name in peers}
        rounds: dict[str, list[list[Epoch]]] = {name: [] for name in readers}
        for number in range(arguments.rounds if latency == LATENCIES[-1] else 1):
            for name, (python, location) in readers.items():
                if number and "local copy" not in name:
                    continue
                copies = work / f"copies-{latency}-{number}-{len(rounds)}-{name}" if "local copy" in name else None
                one, server = name.partition(",")[0], url if name != "darht, disk" else ""
                found = apart(python, one, location, copies, server, arguments.rows, data / "darht")
                rounds[name] += [found] if found else []
    disk = max((epoch.rows_s for one in rounds["darht, disk"] for epoch in one[1:]), default=0.0)
    return [Line(name, latency, found, sizes[name.partition(",")[0]], disk) for name, found in rounds.items() if found]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=8192)
    parser.add_argument("--rate", type=float, default=25.0, help="MB a second")
    parser.add_argument("--peers", type=Path, help="a Python that has litdata and mosaicml-streaming")
    parser.add_argument("--rounds", type=int, default=2, help="of what has a local copy, at the longest latency")
    parser.add_argument("--out", type=Path)
    hidden: dict[str, Any] = {"one": str, "write": str, "location": str, "copies": str, "server": str, "beside": str}
    for name, kind in hidden.items():
        parser.add_argument(f"--{name}", type=kind, default=kind(), help=argparse.SUPPRESS)
    parser.add_argument("--epochs", type=int, default=FEW, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    if arguments.write:
        write_peer(arguments.write, Path(arguments.location))
        return
    if arguments.one:
        print(json.dumps(measure(arguments)), flush=True)
        os._exit(0)  # some libraries leave threads that never end
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        (work / "data").mkdir()
        sizes = write_data(work / "data", arguments.rows, arguments.peers)
        together = trainers(work / "data" / "darht")
        print(together, flush=True)
        lines = [line for latency in LATENCIES for line in lines_at(latency, work, sizes, arguments)]
    text = page(lines, sizes, together, arguments)
    print(text)
    if arguments.out:
        arguments.out.write_text(text)


if __name__ == "__main__":
    main()
