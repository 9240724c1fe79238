"""The page of bench/remote.py."""

import argparse
import os
import platform
from dataclasses import dataclass
from datetime import date

import torch

EPOCHS = 16  # of a reader whose later epochs are short, and are compared with the disk
FEW = 3  # of the others
LATENCIES, TRAINERS = (0, 10, 50), 32
CHUNK = 4 << 20  # bytes of a chunk of the peers' formats; a shard of images has 3 MiB here


@dataclass(frozen=True)
class Epoch:
    """One epoch: rows a second, requests and bytes; and rows a second of an epoch from the disk right after it."""

    rows_s: float
    requests: int
    bytes: int
    disk: float = 0.0


@dataclass(frozen=True)
class Line:
    """A reader at a latency: the epochs of each round, bytes of its data, and rows a second of darht from the disk."""

    name: str
    latency: int
    rounds: list[list[Epoch]]
    size: int
    disk: float

    @property
    def first(self) -> Epoch:
        """The fastest first epoch."""
        return max((epochs[0] for epochs in self.rounds), key=lambda epoch: epoch.rows_s)

    @property
    def later(self) -> float:
        """Rows a second of the fastest epoch after a first one."""
        return max(epoch.rows_s for epochs in self.rounds for epoch in epochs[1:])

    @property
    def of_disk(self) -> float:
        """The same, over the fastest later epoch from the disk: in the same process where there was one."""
        beside = [epoch.disk for epochs in self.rounds for epoch in epochs[1:]]
        return self.later / (max(beside) or self.disk)

    @property
    def worst_bytes(self) -> float:
        """The most that a first epoch fetched, over the bytes of the data."""
        return max(epochs[0].bytes for epochs in self.rounds) / self.size

    def text(self, stream: float) -> str:
        """A row of the table."""
        first, last = self.first, self.rounds[0][-1]
        cells = [f"{first.rows_s:,.0f}", f"{first.rows_s / stream:.2f}", f"{self.later:,.0f}", f"{self.of_disk:.2f}"]
        for epoch in (first, last):
            cells += [str(epoch.requests), f"{epoch.bytes / self.size:.3f}"] if first.requests else ["-", "-"]
        return f"| {self.name} | {self.latency} | {' | '.join(cells)} |"


def goals(lines: list[Line], stream: float, together: dict[str, float]) -> list[str]:
    """What was to be reached beside what was."""
    copied = [line for line in lines if "local copy" in line.name]
    own = [line for line in copied if line.name.startswith("darht")]
    worst = [line for line in own if line.latency == LATENCIES[-1]]
    later = ", ".join(f"{line.of_disk:.2f}" for line in own)
    first = ", ".join(f"{line.first.rows_s / stream:.2f}" for line in worst)
    peers = [line.first.rows_s for line in copied if line.latency == LATENCIES[-1] and line not in own]
    ratio = f"{min(line.first.rows_s for line in worst) / max(peers):.1f}" if peers else "no peer was there"
    most = f" (one stream of the bandwidth: {stream / max(peers):.1f})" if peers else ""
    without = max(line.worst_bytes for line in lines if "no copy" in line.name)
    asked = sum(epoch.requests for line in own for epochs in line.rounds for epoch in epochs[1:])
    return [
        "| to reach | here |",
        "|---|---|",
        f"| later epochs at least 0.95 of the disk | {later} |",
        f"| their requests | {asked} |",
        f"| the first at least 0.8 of one stream of the bandwidth, at {LATENCIES[-1]} ms (HTTP, S3) | {first} |",
        f"| the first at least 2 times the better peer's, at {LATENCIES[-1]} ms | {ratio}{most} |",
        f"| at most 1.05 bytes fetched for each needed in the first epoch, with a copy and without | "
        f"{max(line.worst_bytes for line in own):.3f}, {without:.3f} |",
        f"| {TRAINERS} trainers at once without an error, the server below 300 MB | {together['peak']:.0f} MB, "
        f"{together['rows']:,.0f} rows in {together['seconds']:.0f} s |",
    ]


def page(lines: list[Line], sizes: dict[str, int], together: dict[str, float], arguments: argparse.Namespace) -> str:
    """The page of the docs."""
    megabytes = sizes["darht"] / 1e6
    stream = arguments.rows / megabytes * arguments.rate
    table = "\n".join(line.text(stream) for line in lines)
    options, version = (
        f"--rows {arguments.rows} --rate {arguments.rate:g} --rounds {arguments.rounds}",
        torch.__version__,
    )
    return f"""# A cache behind HTTP and S3

    python bench/remote.py {options} --peers PYTHON --out docs/benchmarks-remote.md

{os.cpu_count()}-core {platform.machine()} CPU, no GPU, torch {version.split("+")[0]}, {date.today()}.
{arguments.rows:,} rows of image, perturbation, label and six rows of logits: {megabytes:.1f} MB.
One server process on the same machine answers HTTP and S3, waits before each answer, and sends {arguments.rate:g} MB
a second at most: one stream of that rate gives {stream:,.0f} rows a second. darht streams in windows with
a memory budget of 0.6 of the cache. The peers read the same rows in their own formats, in chunks of {CHUNK >> 20} MiB,
without worker processes, of which two made them slower on these cores.

{chr(10).join(goals(lines, stream, together))}

| reader | ms | rows/s, first | of one stream | later | of the disk | requests, first | bytes | requests, last | bytes |
|---|---|---|---|---|---|---|---|---|---|
{table}

Opening counts as a part of the first epoch. `later` is the fastest of {EPOCHS - 1} epochs, of {FEW - 1} without a copy
and of the peers. `of the disk`: darht's later epochs with a copy alternate with epochs from the disk in one process,
each when the first window of its next epoch has been read ahead; the others are held against the line of the disk. At
{LATENCIES[-1]} ms each reader with a copy begins with an empty one {arguments.rounds} times, and the fastest first
epoch counts. Bytes are those of an epoch over those of the reader's data. Shards are fetched in pieces of 1 MiB, 32 at
a time. `no copy` is `--cache-size 0`. The server names a file's sha256 as `darht-cache serve` does (HTTP) and as
objects that darht wrote have it (S3).
"""
