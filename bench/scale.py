"""How a cache grows: the cost of a row, the peak memory and the time to open at 1,000 to 1,000,000 rows.

    python bench/scale.py --rows 1000 10000 100000 --out PAGE

Images of 8x8 pixels that are made when they are wanted, two linear teachers, one FGSM attack, three views: so that the
time goes into darht. Seconds are those of the processor, all threads together; the peak of each step is counted from
where the memory stood before it. With `--inspect` the perturbations are indexed too.
"""

import argparse
import contextlib
import dataclasses
import datetime
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from darht.cache.admin.status import read_status
from darht.cache.admin.verify import verify
from darht.cache.builder.build import build
from darht.cache.builder.plan import Plan
from darht.cache.builder.seal import holdout_rows, seal
from darht.cache.format.layout import layouts, shard_key
from darht.cache.format.manifest import MANIFEST, SPEC, Manifest, ShardRecord, root_hash
from darht.cache.format.spec import AttackSpec, CacheSpec, DataSpec, PrecisionSpec, StoreSpec, TeacherSpec, ViewSpec
from darht.cache.format.views import view_table
from darht.cache.read.feed_plan import _SCRATCH, plan_feed
from darht.cache.read.loader import GIB
from darht.cache.read.reader import open_cache
from darht.cache.read.sizes import row_bytes
from darht.cache.read.stream import Feed
from darht.core.config import canonical_json, fingerprint, to_plain
from darht.core.preprocessing import Preprocessing

CPU = torch.device("cpu")
SHAPE, CLASSES, VIEWS, TEACHERS = (3, 8, 8), 10, 3, ("one", "two")
STEPS = ("build", "status", "seal", "verify", "open", "stream", "inspect")
PASSES = {"stream": 3}  # of which the quickest counts; it is the shortest step, and threads disturb one another
WINDOW_ROWS = 2048  # that streaming may hold twice, so that its memory does not depend on the rows; 1,000 are resident


class Images:
    """Images `[N, 3, 8, 8]` that are made from the numbers of their rows."""

    def __init__(self, rows: int) -> None:
        self.shape = (rows, *SHAPE)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice) -> np.ndarray:
        generator = np.random.Generator(np.random.Philox(rows.start))
        return generator.integers(0, 256, (rows.stop - rows.start, *SHAPE), dtype=np.uint8)


class Synthetic:
    """What a build asks of a source."""

    def __init__(self, rows: int) -> None:
        self.images, self.labels = Images(rows), np.arange(rows) % CLASSES


def plan(rows: int) -> Plan:
    """A build of so many rows, without files."""
    teacher = TeacherSpec("resnet18", {}, Preprocessing(), CLASSES, "0" * 64, "robust")
    fgsm = {"eps": 8.0, "norm": "linf", "objective": "ce"}
    spec = CacheSpec(
        data=DataSpec("npz", "train", rows, SHAPE, tuple("0123456789"), "0" * 64, 0.02, 2),
        views=ViewSpec("crop-flip", 1, True, VIEWS),
        teachers=dict.fromkeys(TEACHERS, teacher),
        attacks={"fgsm": AttackSpec("fgsm", "one", 1, fgsm)},
        store=StoreSpec(),
        precision=PrecisionSpec(),
        seed=0,
    )
    torch.manual_seed(0)
    nets: Any = {
        name: torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(int(np.prod(SHAPE)), CLASSES)).eval()
        for name in TEACHERS
    }
    source: Any = Synthetic(rows)
    offsets = torch.from_numpy(view_table(**to_plain(spec.views), seed=0))
    return Plan(spec, source, offsets, nets, layouts(spec), {})


def resident(what: str) -> int:
    """KiB of this process as Linux counts them: `VmRSS` now, `VmHWM` at most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(what))


@contextlib.contextmanager
def measured(found: dict[str, float], name: str) -> Iterator[None]:
    """Seconds of the processor and of the clock, and the growth of the memory's peak in MiB."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before, start, clock = resident("VmRSS"), time.process_time(), time.perf_counter()
    yield
    found[f"{name} s"], found[f"{name} clock"] = time.process_time() - start, time.perf_counter() - clock
    found[f"{name} MiB"] = (resident("VmHWM") - before) / 1024


def stream(folder: Path) -> None:
    """One epoch in windows of one size, whatever the held-out rows, which are in memory too, take beside them."""
    cache = open_cache(folder)
    held = len(cache.manifest.holdout) * (int(np.prod(SHAPE)) + 8)
    budget = (2 * WINDOW_ROWS * row_bytes(cache, adversarial=True) + held) * _SCRATCH / (_SCRATCH - 1) / GIB
    feed = plan_feed(cache, device=CPU, adversarial=True, batch=256, budget_gib=budget)
    with Feed(cache, feed, seed=0, epochs=1) as batches:
        for _ in batches.batches(0):
            pass


def inspect(folder: Path) -> None:
    """Index the perturbations, in the way that is meant for millions."""
    from darht.tools.index import IndexSettings, build_indexes
    from darht.tools.vectors import cache_spaces

    cache = open_cache(folder)
    spaces = {name: space for name, space in cache_spaces(cache).items() if space.kind == "delta"}
    settings = IndexSettings(dim=64, kind="ivfpq")
    indexes, _ = build_indexes(cache, spaces, folder / "index", settings)
    for name, record in indexes.card.indexes.items():
        print(
            f"{name}: {record.vectors:,} vectors, recall@10 {record.recall:.3f}, {record.size / 1e6:.1f} MB", flush=True
        )


def measure(rows: int, folder: Path, steps: list[str]) -> dict[str, float]:
    """Every step at one size."""
    found: dict[str, float] = {"rows": rows}
    actions: dict[str, Callable[[], object]] = {
        "build": lambda: build(plan(rows), folder, device=CPU, on_unit=lambda array, shard, seconds: None),
        "status": lambda: read_status(folder),
        "seal": lambda: seal(folder),
        "verify": lambda: verify(folder),
        "open": lambda: open_cache(folder),
        "stream": lambda: stream(folder),
        "inspect": lambda: inspect(folder),
    }
    for name in steps:
        for _ in range(PASSES.get(name, 1)):
            once: dict[str, float] = {}
            with measured(once, name):
                actions[name]()
            if once[f"{name} s"] < found.get(f"{name} s", float("inf")):
                found |= once
    files = [path for path in folder.rglob("*") if path.is_file()]
    found["bytes"], found["files"] = sum(path.stat().st_size for path in files) / rows, len(files)
    found["manifest"] = (folder / "manifest.json").stat().st_size / 1e3
    return found


def hollow(rows: int, folder: Path) -> None:
    """A manifest of so many rows, and files of the right sizes without contents: opening looks at no more."""
    spec, arrays = plan(rows).spec, plan(rows).arrays
    (folder / "data.zarr").mkdir(parents=True)
    records = []
    for array in arrays.values():
        for shard in range(array.shards):
            path = folder / shard_key(array, shard)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
            os.truncate(path, 100_000)
            records.append(ShardRecord(array.name, shard, shard_key(array, shard), 100_000, "0" * 64))
    held = holdout_rows(rows, spec.data.holdout, spec.seed)
    body = Manifest(fingerprint(spec), rows, held, tuple(records), "")
    (folder / SPEC).write_text(canonical_json(spec))
    (folder / MANIFEST).write_text(canonical_json(dataclasses.replace(body, root_hash=root_hash(body))))


def measure_opening(rows: int, folder: Path) -> None:
    """Seconds until the first row of a cache could be read."""
    hollow(rows, folder)
    for _ in range(3):
        found: dict[str, float] = {}
        with measured(found, "open"):
            cache = open_cache(folder)
        size = (folder / MANIFEST).stat().st_size / 1e6
        print(f"{rows:,} rows, {len(cache.manifest.shards):,} shards, {size:.1f} MB of manifest: {found}", flush=True)


def page(results: list[dict[str, float]], steps: list[str]) -> str:
    """A line for each size."""
    cores = f"{os.cpu_count()}-core {platform.machine()} CPU, torch {torch.__version__.split('+')[0]}"
    heads = ["rows", *(f"{name} us/row" for name in steps if name != "open"), "open s", "open s by the clock"]
    heads += [*(f"{name} MiB" for name in steps), "bytes/row", "files", "manifest kB"]
    lines = [
        f"{datetime.date.today().isoformat()}, {cores}.",
        "",
        f"| {' | '.join(heads)} |",
        "|---" * len(heads) + "|",
    ]
    for one in results:
        cells = [f"{one['rows']:,.0f}"]
        cells += [f"{1e6 * one[f'{name} s'] / one['rows']:.1f}" for name in steps if name != "open"]
        cells += [f"{one['open s']:.3f}", f"{one['open clock']:.3f}"]
        cells += [f"{one[f'{name} MiB']:.0f}" for name in steps]
        cells += [f"{one['bytes']:.1f}", f"{one['files']:,.0f}", f"{one['manifest']:.0f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[1000, 10_000, 100_000])
    parser.add_argument("--inspect", action="store_true")
    parser.add_argument("--open", type=int, help="only open a hollow cache of so many rows")
    parser.add_argument("--out", type=Path, help="write the page here")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    steps = [name for name in STEPS if name != "inspect" or arguments.inspect]
    results = []
    with tempfile.TemporaryDirectory() as work:
        if arguments.open:
            measure_opening(arguments.open, Path(work) / "hollow")
            return
        measure(
            256, Path(work) / "warm", steps[:-1] if arguments.inspect else steps
        )  # imports are not what is measured
        for rows in arguments.rows:
            results.append(measure(rows, Path(work) / str(rows), steps))
            print(results[-1], flush=True)
    text = page(results, steps)
    print(text)
    if arguments.out:
        arguments.out.write_text(text)


if __name__ == "__main__":
    main()
