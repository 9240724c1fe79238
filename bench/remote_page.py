"""The page of bench/remote.py."""

import argparse
import os
import platform
from dataclasses import dataclass
from datetime import date

import torch

EPOCHS, LATENCIES, TRAINERS = 4, (0, 10, 50), 32
CHUNK = 4 << 20  # bytes of a chunk of the peers' formats; a shard of images has 3 MiB here


@dataclass(frozen=True)
class Epoch:
    """One epoch: rows a second, requests and bytes."""

    rows_s: float
    requests: int
    bytes: int


@dataclass(frozen=True)
class Line:
    """A reader at a latency: its epochs, bytes of its data, and rows a second of the disk beside it."""

    name: str
    latency: int
    epochs: list[Epoch]
    size: int
    disk: float

    @property
    def later(self) -> Epoch:
        """The fastest epoch after the first."""
        return max(self.epochs[1:], key=lambda epoch: epoch.rows_s)

    def text(self, stream: float) -> str:
        """A row of the table."""
        first, last, later = self.epochs[0], self.epochs[-1], self.later.rows_s
        cells = [f"{first.rows_s:,.0f}", f"{first.rows_s / stream:.2f}", f"{later:,.0f}", f"{later / self.disk:.2f}"]
        for epoch in (first, last):
            cells += [str(epoch.requests), f"{epoch.bytes / self.size:.3f}"] if first.requests else ["-", "-"]
        return f"| {self.name} | {self.latency} | {' | '.join(cells)} |"


def goals(lines: list[Line], stream: float, together: dict[str, float]) -> list[str]:
    """What was to be reached beside what was."""
    copied = [line for line in lines if "copy" in line.name and "no copy" not in line.name]
    own = [line for line in copied if line.name.startswith("darht")]
    worst = [line for line in own if line.latency == LATENCIES[-1]]
    later = ", ".join(f"{line.later.rows_s / line.disk:.2f}" for line in own)
    first = ", ".join(f"{line.epochs[0].rows_s / stream:.2f}" for line in worst)
    peers = [line.epochs[0].rows_s for line in copied if line.latency == LATENCIES[-1] and line not in own]
    ratio = f"{min(line.epochs[0].rows_s for line in worst) / max(peers):.1f}" if peers else "no peer was there"
    bytes_ = max(sum(epoch.bytes for epoch in line.epochs) / line.size for line in own)
    return [
        "| to reach | here |",
        "|---|---|",
        f"| later epochs at least 0.95 of the disk | {later} |",
        f"| the first at least 0.8 of one stream of the bandwidth, at {LATENCIES[-1]} ms (HTTP, S3) | {first} |",
        f"| the first at least 2 times the better peer's, at {LATENCIES[-1]} ms | {ratio} |",
        f"| at most 1.05 bytes fetched for each needed, over {EPOCHS} epochs | {bytes_:.3f} |",
        f"| {TRAINERS} trainers at once without an error, the server below 300 MB | {together['peak']:.0f} MB, "
        f"{together['rows']:,.0f} rows in {together['seconds']:.0f} s |",
    ]


def page(lines: list[Line], sizes: dict[str, int], together: dict[str, float], arguments: argparse.Namespace) -> str:
    """The page of the docs."""
    megabytes = sizes["darht"] / 1e6
    stream = arguments.rows / megabytes * arguments.rate
    table = "\n".join(line.text(stream) for line in lines)
    options, version = f"--rows {arguments.rows} --rate {arguments.rate:g} --peers PYTHON", torch.__version__
    return f"""# A cache behind HTTP and S3

    python bench/remote.py {options} --out docs/benchmarks-remote.md

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

Opening counts as a part of the first epoch; `later` is the fastest of {EPOCHS - 1}. Bytes are those of an epoch over
those of the reader's data. Shards are fetched in pieces of 1 MiB, 32 at a time. `no copy` is `--cache-size 0`: each
shard that is read in parts is then fetched once more, for its sha256.

Perturbations repeat after 1,024 rows, so of their shards one has the content of all, and a copy, which is found by its
sha256, fetches it once: bytes of darht's first epochs are below 1 for that reason alone, and its rows a second are the
higher for it. The peers fetch all of theirs.
"""
