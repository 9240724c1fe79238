"""The cache measured: what a build adds to its arithmetic, how fast rows are read beside other libraries, what a
coding costs, and how large it all is.

    python bench/cache.py --data DIR --zoo DIR --out docs/benchmarks-cache.md

Every measurement of reading is a process of its own, so that peak memory is its own; rounds are interleaved and the
fastest counts, so that a busy machine disturbs all alike. A library that is not installed is left out.
"""

import argparse
import datetime
import importlib.util
import json
import os
import pickle
import platform
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from cache_build import building
from cache_readers import BATCH, CLASSES, PACKAGES, READERS, TEACHERS, WORKERS, WRITERS

from darht.attacks import PGD
from darht.cache.builder.seal import seal
from darht.cache.format.commit import Commit, write_commit
from darht.cache.format.layout import layouts
from darht.cache.format.spec import AttackSpec, CacheSpec, DataSpec, PrecisionSpec, StoreSpec, TeacherSpec, ViewSpec
from darht.cache.format.store import Store
from darht.cache.read.reader import open_cache
from darht.core.config import canonical_json, to_plain
from darht.core.preprocessing import Preprocessing
from darht.core.rng import RowRng
from darht.core.storage import open_storage

NETS = {"resnet4b_adv": "a robust ResNet", "resnet20": "an undefended ResNet"}
CPU = torch.device("cpu")


# Real images and real perturbations --------------------------------------------------------------------------------


def load_images(data: Path, count: int) -> tuple[np.ndarray, np.ndarray]:
    images, labels = [], []
    for number in range(1, 6):
        with (data / "cifar-10-batches-py" / f"data_batch_{number}").open("rb") as file:
            held = pickle.load(file, encoding="bytes")
        images.append(held[b"data"].reshape(-1, 3, 32, 32))
        labels += held[b"labels"]
    return np.concatenate(images)[:count], np.array(labels)[:count]


def make_deltas(arguments: argparse.Namespace, work: Path) -> dict[str, np.ndarray]:
    """PGD-10 at epsilon 8 on trained networks, int8 `[n, 1, 3, 32, 32]`; kept beside the other files."""
    path = work / "deltas.npz"
    if not path.is_file():
        spec = importlib.util.spec_from_file_location("zoo", arguments.zoo / "zoo.py")
        zoo = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(zoo)
        images, labels = load_images(arguments.data, arguments.deltas)
        x, y = torch.from_numpy(images).float() / 255, torch.from_numpy(labels)
        found = {}
        for name in NETS:
            model, parts = zoo.load(name).requires_grad_(False), []
            for rows in torch.arange(len(y)).split(128):
                generator = RowRng.create(0, "attack", name, rows=rows)
                x_adv = PGD(eps=8, step=2, steps=10)(model, x[rows], y[rows], generator=generator)
                parts.append(((x_adv - x[rows]) * 255).round().to(torch.int8))
            found[name] = torch.cat(parts)[:, None].numpy()
        np.savez(path, **found)
    with np.load(path) as held:
        return {name: held[name] for name in NETS}


# Coding ------------------------------------------------------------------------------------------------------------


def coders() -> dict[str, tuple[Callable, Callable]]:
    from numcodecs import Zstd, blosc

    blosc.use_threads = False
    chosen = {f"Zstandard {level}": Zstd(level) for level in (1, 3, 9)}
    for name, level in (("zstd", 1), ("zstd", 3), ("lz4", 1), ("lz4", 9), ("lz4hc", 9), ("blosclz", 9)):
        for shuffle, what in ((blosc.NOSHUFFLE, "no shuffle"), (blosc.BITSHUFFLE, "bit shuffle")):
            coder = blosc.Blosc(name, level, shuffle, typesize=1)
            chosen[f"Blosc {name} {level}, {what}"] = coder
    decoders = {name: (blosc.decompress if "Blosc" in name else coder.decode) for name, coder in chosen.items()}
    return {name: (coder.encode, decoders[name]) for name, coder in chosen.items()}


def coding(arrays: dict[str, np.ndarray], chunk: int = 128, repeats: int = 9) -> list[str]:
    lines = ["| values | coding | bits a value | decode GB/s per core | encode MB/s |", "|---|---|---|---|---|"]
    for what, values in arrays.items():
        pieces = [np.ascontiguousarray(values[at : at + chunk]) for at in range(0, min(len(values), 4 * chunk), chunk)]
        raw = sum(piece.nbytes for piece in pieces)
        for name, (encode, decode) in coders().items():
            packed = [encode(piece) for piece in pieces]
            encoding = sum(min(timed(encode, piece) for _ in range(2)) for piece in pieces)
            out = np.empty_like(pieces[0])
            decoding = sum(min(timed(decode, data, out) for _ in range(repeats)) for data in packed)
            bits = 8 * sum(map(len, packed)) / raw
            lines.append(f"| {what} | {name} | {bits:.2f} | {raw / decoding / 1e9:.2f} | {raw / encoding / 1e6:.0f} |")
    return lines


def timed(action: Callable, *words: object) -> float:
    start = time.perf_counter()
    action(*words)
    return time.perf_counter() - start


# A cache of given values -------------------------------------------------------------------------------------------


def write_cache(out: Path, images: np.ndarray, labels: np.ndarray, delta: np.ndarray, *, views: int) -> None:
    """A sealed cache of these images, with a perturbation of each and logits of three teachers."""
    N, random = len(images), np.random.default_rng(0)
    parameters = to_plain(PGD(eps=8, step=2, steps=10))
    teacher = TeacherSpec("resnet18", {}, Preprocessing(), CLASSES, "0" * 64, "robust")
    kind = {"kind": "identity", "padding": 0, "flip": False} if views == 1 else {"kind": "crop-flip", "padding": 4}
    spec = CacheSpec(
        data=DataSpec("npz", "train", N, images.shape[1:], tuple(map(str, range(CLASSES))), "0" * 64, 0.0),
        views=ViewSpec(**{"flip": True, **kind}, count=views),
        teachers=dict.fromkeys(TEACHERS, teacher),
        attacks={"pgd": AttackSpec("pgd", "a", 1, parameters)},
        store=StoreSpec(),
        precision=PrecisionSpec(),
        seed=0,
    )
    where, store, arrays = open_storage(out), Store(out), layouts(spec)
    where.write("spec.json", canonical_json(spec).encode())
    store.create(arrays)
    for name, array in arrays.items():
        for shard in range(array.shards):
            rows = array.rows(shard)
            values = {
                "source_index": lambda rows=rows: np.arange(rows.start, rows.stop),
                "label": lambda rows=rows: labels[rows],
                "image": lambda rows=rows: images[rows],
                "views/offset": lambda array=array: np.zeros(array.shape),
                "delta/pgd": lambda rows=rows: delta[np.arange(rows.start, rows.stop) % len(delta)],
            }.get(name, lambda rows=rows, array=array: random.normal(0, 3, (rows.stop - rows.start, *array.shape[1:])))
            size, sha256, _ = store.write(array, shard, values().astype(array.dtype))
            commit = Commit(name, shard, (rows.start, rows.stop), array.fingerprint, size, sha256, 0.0)
            write_commit(where, array, commit)
    seal(where)


def memory(what: str) -> int:
    """VmRSS or VmHWM of this process in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(what))


def measure(arguments: argparse.Namespace) -> dict[str, float]:
    """Rows a second of the fastest epoch after the first, or of what of the first there was time for."""
    torch.set_num_threads(1)
    torch.zeros(1000).index_select(0, torch.arange(10))
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
    before = memory("VmRSS")
    whole = time.perf_counter()
    epoch = READERS[arguments.one](arguments.folder, arguments)
    speeds, costs, limit, first = [], [], 0.0, 0.0
    for number in range(arguments.epochs):
        start, cpu, rows, total = 0.0, 0.0, 0, 0
        for batch in epoch(number):
            values = list(batch.values()) if isinstance(batch, dict) else batch
            total += int(values[0].view(-1)[0])
            if not start:  # what starts an epoch is not what reads rows; the first epoch's is told on its own
                start, cpu = time.perf_counter(), time.process_time()
                first, limit = first or start - whole, limit or start + arguments.seconds
                continue
            rows += len(values[0])
            if time.perf_counter() > limit:
                break
        if rows:
            speeds.append(rows / (time.perf_counter() - start))
            costs.append(1e6 * (time.process_time() - cpu) / rows)
        if time.perf_counter() > limit:
            break
    peak = memory("VmHWM") - before
    return {"rows_s": max(speeds[1:] or speeds), "first": first, "peak": peak, "cpu": min(costs[1:] or costs)}


def measured_apart(name: str, folder: Path, workers: int, arguments: argparse.Namespace) -> dict[str, float] | None:
    words = ["--one", name, "--folder", str(folder), "--workers", str(workers), "--budget", str(arguments.budget)]
    command = [sys.executable, "-W", "ignore", __file__, *words, "--seconds", str(arguments.seconds)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        print(name, workers, "failed:", (done.stderr.strip().splitlines() or ["?"])[-1][:300], flush=True)
        return None
    found: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    print(name, workers, {key: round(value, 1) for key, value in found.items()}, flush=True)
    return found


def reading(work: Path, deltas: np.ndarray, arguments: argparse.Namespace) -> list[str]:
    images, labels = load_images(arguments.data, arguments.rows)
    folder = work / f"cache-{arguments.rows}"
    if not (folder / "manifest.json").is_file():
        shutil.rmtree(folder, ignore_errors=True)
        write_cache(folder, images, labels, deltas, views=1)
    best: dict[str, tuple[dict[str, float], int]] = {}
    for number in range(arguments.rounds):
        for name in READERS:
            if name in PACKAGES and (number or not importlib.util.find_spec(PACKAGES[name])):
                continue  # the others are far behind: once is enough
            place_of = folder if name not in WRITERS else work / f"{name.split(',')[0].split()[0]}-{arguments.rows}"
            if not place_of.is_dir():
                unfinished = place_of.with_suffix(".tmp")
                shutil.rmtree(unfinished, ignore_errors=True)
                WRITERS[name](open_cache(folder), unfinished)
                unfinished.rename(place_of)
            for workers in WORKERS.get(name, (0, 2)):
                found = measured_apart(name, place_of, workers, arguments)
                if found and (name not in best or found["rows_s"] > best[name][0]["rows_s"]):
                    best[name] = (found, workers)
    return reading_table(best, arguments)


def reading_table(best: dict[str, tuple[dict[str, float], int]], arguments: argparse.Namespace) -> list[str]:
    streamed, gathered = best["darht, streamed"][0]["rows_s"], best["tensor gather"][0]["rows_s"]
    lines = [
        "| reader | workers | rows/s | s to start | peak MiB | CPU us a row | streamed darht / it | it / gather |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, (found, workers) in best.items():
        factor = f"{streamed / found['rows_s']:.1f}" if name in PACKAGES else ""
        used = "2 threads" if "streamed" in name else str(workers) if name in PACKAGES else ""
        lines.append(
            f"| {name} | {used} | {found['rows_s']:,.0f} | {found['first']:.1f} | {found['peak'] / 2**20:.0f} | "
            f"{found['cpu']:.1f} | {factor} | {found['rows_s'] / gathered:.2f} |"
        )
    return lines


# Size --------------------------------------------------------------------------------------------------------------


def sizes(work: Path, deltas: np.ndarray, arguments: argparse.Namespace) -> list[str]:
    folder, views = work / "views", 162
    shutil.rmtree(folder, ignore_errors=True)
    images, labels = load_images(arguments.data, 1024)
    write_cache(folder, images, labels, deltas, views=views)
    cache = open_cache(folder)
    lines = ["| arrays | bytes a row | bytes a row, view and 3 teachers |", "|---|---|---|"]
    groups = {
        "clean logits of 3 teachers on 162 views": [f"logits/{t}/clean" for t in TEACHERS],
        "image": ["image"],
        "one attack: delta and 3 teachers' logits": ["delta/pgd", *(f"logits/{t}/pgd" for t in TEACHERS)],
        "the whole store": list(cache.arrays),
    }
    for what, names in groups.items():
        held = sum(cache.size(name) for name in names) / cache.rows
        lines.append(f"| {what} | {held:,.0f} | {held / views:.1f} |")
    return lines


# The page ----------------------------------------------------------------------------------------------------------


def page(parts: dict[str, list[str]], arguments: argparse.Namespace, seconds: float) -> str:
    command = f"python bench/cache.py --rows {arguments.rows} --budget {arguments.budget} --rounds {arguments.rounds}"
    model = next((line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
                  if line.startswith("model name")), platform.machine())  # fmt: skip
    said = {
        "build": f"""## What a build adds

`recipes/cifar10-small.yaml` (three teachers, three PGD-10 attacks, 16 views) on {arguments.build_rows} rows, on all
cores. The rest is everything but the attacks and the teachers' forward passes: cutting views, compressing, writing,
fsync, reading back, hashing, sealing. To reach: at most 5 % and 1 ms a row.""",
        "read": f"""## Reading shuffled batches of {BATCH}

{arguments.rows:,} rows of image, perturbation, label and six rows of logits (three teachers, clean and adversarial).
Rows a second in the fastest of {arguments.rounds} rounds, others in one, at the better of 0 and 2 worker processes;
seconds to the first batch, with opening, hashing and starting workers, on their own. Streaming holds at most
{arguments.budget} MiB. Peak is the growth of the process, without workers; CPU is that of the process, all threads. To
reach: resident 0.8 of a tensor gather; streamed 60,000 rows/s, 3 times LitData, 20 times MosaicML Streaming, 30 times
WebDataset, a peak within 1.2 of the budget.""",
        "coding": """## Coding

Chunks of 128 rows. Perturbations are those of PGD-10 at epsilon 8, step 2, on trained networks. Zstandard 1 is what the
store writes: of what decodes above 1 GB/s per core the smallest on perturbations; images hardly compress in any.""",
        "size": """## Size

1,024 rows, 162 views, float16 logits of three teachers over ten classes, with every checksum and index.""",
    }
    versions = f"torch {torch.__version__.split('+')[0]}, numpy {np.__version__}"
    head = f"""# Benchmarks of the cache

`{command}`, {datetime.date.today().isoformat()}, {os.cpu_count()} cores of {model}, {versions},
{seconds:.0f} s. CIFAR-10 training images, warm page cache.
"""
    return "\n".join([head, *(f"{said[part]}\n\n" + "\n".join(lines) + "\n" for part, lines in parts.items())])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--data", type=Path, default=Path("build/data"), help="holds cifar-10-batches-py")
    parser.add_argument("--zoo", type=Path, help="holds zoo.py and weights: docs/benchmarks.md")
    parser.add_argument("--work", type=Path, help="where files are made and kept; a temporary folder by default")
    parser.add_argument("--out", type=Path, help="write the page here")
    parser.add_argument("--parts", nargs="+", default=["build", "read", "coding", "size"])
    parser.add_argument("--rows", type=int, default=50_000)
    parser.add_argument("--deltas", type=int, default=1024, help="images that are really attacked; rows repeat them")
    parser.add_argument("--build-rows", type=int, default=1000)
    parser.add_argument("--budget", type=int, default=256, help="MiB, of the streaming reader")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=15, help="after which a reader is stopped")
    for name, kind in (("--one", str), ("--folder", Path), ("--workers", int)):
        parser.add_argument(name, type=kind, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    if arguments.one:
        print(json.dumps(measure(arguments)))
        os._exit(0)  # some libraries leave threads that never end
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as temporary:
        work = arguments.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        torch.set_num_threads(os.cpu_count() or 1)
        deltas = make_deltas(arguments, work)
        robust = deltas["resnet4b_adv"]
        images, _ = load_images(arguments.data, 1024)
        shown = {f"perturbations on {NETS[name]}": values for name, values in deltas.items()} | {"images": images}
        actions = {
            "build": lambda: building(work, arguments),
            "read": lambda: reading(work, robust, arguments),
            "coding": lambda: coding(shown),
            "size": lambda: sizes(work, robust, arguments),
        }
        text = page({part: actions[part]() for part in arguments.parts}, arguments, time.perf_counter() - start)
    print(text)
    if arguments.out:
        arguments.out.write_text(text)


if __name__ == "__main__":
    main()
