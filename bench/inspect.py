"""FAISS beside a brute-force torch search and scikit-learn, and the whole inspection of 50,000 rows, in one table each.

    python bench/inspect.py --out docs/benchmarks-inspect.md

Writes a synthetic sealed cache of 50,000 rows and three attacks, builds index and report, and searches its 150,000
perturbations in several ways. Every measurement is a process of its own, so that peak memory is its own.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "inspect":  # another script of this folder wants the standard library's module of this name
    import importlib.util
    import sysconfig

    _real = importlib.util.spec_from_file_location("inspect", Path(sysconfig.get_path("stdlib")) / "inspect.py")
    sys.modules["inspect"] = importlib.util.module_from_spec(_real)
    _real.loader.exec_module(sys.modules["inspect"])
elif __name__ == "__main__":
    # This folder comes first on the path and would hide that module here too; what the tests share is wanted instead.
    sys.path[0] = str(Path(__file__).resolve().parents[1] / "tests")
    import argparse
    import datetime
    import json
    import os
    import platform
    import shutil
    import subprocess
    import tempfile
    import time

    import numpy as np

    NAMES, CLASSES, SHAPE, RANK = ("cnn", "bit", "vit"), 10, (3, 32, 32), 64
    DIM, K, QUERIES = 128, 10, 1000
    METHODS = {
        "FAISS flat": "exact",
        "FAISS HNSW": "approximate",
        "FAISS IVF-PQ": "approximate, 2 dimensions a byte",
        "torch, brute force": "exact",
        "scikit-learn NearestNeighbors": "exact, brute force",
    }


def make_cache(folder: Path, rows: int) -> None:
    """Perturbations with most energy in 64 directions of each attack, half of them shared; answers right in 80 %."""
    from planted import one_hot, write_cache

    generator = np.random.default_rng(0)
    labels = generator.integers(0, CLASSES, rows)
    pixels = int(np.prod(SHAPE))
    shared = generator.standard_normal((RANK // 2, pixels)).astype(np.float32)
    deltas, logits = {}, {}
    for name in NAMES:
        axes = np.concatenate([shared, generator.standard_normal((RANK // 2, pixels)).astype(np.float32)])
        delta = np.empty((rows, pixels), dtype=np.int8)
        for first in range(0, rows, 5000):
            size = min(5000, rows - first)
            values = generator.standard_normal((size, RANK)).astype(np.float32) @ axes
            values += 4 * generator.standard_normal(values.shape, dtype=np.float32)
            delta[first : first + size] = 8 * np.sign(values)
        deltas[name] = delta.reshape(rows, *SHAPE)
        kinds = ["clean", *(f"pgd-{other}" for other in NAMES)]
        logits[name] = {}
        for kind in kinds:
            wrong = generator.random(rows) < (0.2 if kind == "clean" else 0.6 if kind == f"pgd-{name}" else 0.35)
            noise = generator.standard_normal((rows, CLASSES)).astype(np.float16)
            logits[name][kind] = one_hot(np.where(wrong, (labels + 1) % CLASSES, labels), CLASSES) + noise
    images = generator.integers(0, 256, (rows, *SHAPE), dtype=np.uint8)
    write_cache(folder, images=images, labels=labels, deltas=deltas, logits=logits, rows_per_shard=1024)


def vectors_of(cache: Path, index: Path) -> np.ndarray:
    """All perturbations, projected by the index's own axes, `[3N, 128]`."""
    from darht.cache.read.reader import open_cache
    from darht.tools.index import open_indexes
    from darht.tools.project import project
    from darht.tools.vectors import cache_spaces, space_blocks

    opened = open_cache(cache)
    indexes, parts = open_indexes(opened, index), []
    for name, space in cache_spaces(opened).items():
        if space.kind == "delta":
            axes = indexes.axes(name)
            parts += [project(space.read(rows), axes) for rows in space_blocks(opened, space)]
    return np.concatenate(parts)


def search(method: str, vectors: np.ndarray, queries: np.ndarray) -> tuple[np.ndarray, float, float]:
    """The rows of the ten nearest, seconds to build and seconds to search."""
    start = time.perf_counter()
    if method.startswith("FAISS"):
        from darht.tools.kinds import make_index

        index = make_index({"FAISS flat": "exact", "FAISS HNSW": "hnsw", "FAISS IVF-PQ": "ivfpq"}[method], vectors, "x")
        middle = time.perf_counter()
        found = index.search(queries, K)[1]
    elif method.startswith("torch"):
        import torch

        held = torch.from_numpy(vectors)
        middle = time.perf_counter()
        found = torch.cat([(part @ held.T).topk(K).indices for part in torch.from_numpy(queries).split(100)]).numpy()
    else:
        from sklearn.neighbors import NearestNeighbors

        fitted = NearestNeighbors(n_neighbors=K, algorithm="brute", metric="cosine", n_jobs=-1).fit(vectors)
        middle = time.perf_counter()
        found = fitted.kneighbors(queries, return_distance=False)
    return found, middle - start, time.perf_counter() - middle


def memory(what: str) -> int:
    """KiB of this process as Linux counts them: `VmRSS` now, `VmHWM` at most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(what))


def measure_search(method: str, work: Path) -> dict[str, float]:
    """One method on all vectors, in this process."""
    from darht.tools.nearest import recall

    vectors = np.load(work / "vectors.npy")
    queries = vectors[np.random.default_rng(1).choice(len(vectors), QUERIES, replace=False)]
    search(method, vectors[:10_000].copy(), queries[:2])  # imports and thread pools are not what is measured
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is that of the imports
    before = memory("VmRSS")
    found, build, seconds = search(method, vectors, queries)
    peak = memory("VmHWM")
    exact = work / "exact.npy"
    if method == "FAISS flat":
        np.save(exact, found)
    return {
        "build": build,
        "search": seconds,
        "memory": (peak - before) / 1024,
        "recall": recall(found, np.load(exact)),
    }


def measure_command(*words: str) -> dict[str, float]:
    """Seconds and peak memory of `darht-inspect ...`."""
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", f"darht.tools.{words[0]}", *words[1:]], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"darht-inspect {' '.join(words)} failed")
    return {"seconds": time.perf_counter() - start, "memory": usage.ru_maxrss / 1024}


def page(rows: int, made: float, commands: dict, searches: dict) -> str:
    """Both tables as Markdown."""
    cores = f"{os.cpu_count()}-core {platform.machine()} CPU, load {os.getloadavg()[2]:.1f} over 15 minutes"
    lines = [
        "# Benchmarks of inspection",
        "",
        f"`python bench/inspect.py --rows {rows}`, {datetime.date.today().isoformat()}, {cores}.",
        "",
        f"## A cache of {rows:,} rows and three attacks",
        "",
        f"Synthetic, written in {made:.0f} s; 32x32 pixels. Peak memory is that of the whole process. The target is",
        "300 s and 4,096 MiB for both together.",
        "",
        "| command | seconds | peak MiB |",
        "|---|---|---|",
        *(f"| `darht-inspect {name}` | {one['seconds']:.1f} | {one['memory']:.0f} |" for name, one in commands.items()),
        f"| both | {sum(one['seconds'] for one in commands.values()):.1f} | "
        f"{max(one['memory'] for one in commands.values()):.0f} |",
        "",
        f"## The {K} nearest of {QUERIES:,} queries among {3 * rows:,} perturbations in {DIM} dimensions",
        "",
        "Recall@10 against FAISS flat. Memory is the growth of the process's peak over the vectors, which all hold.",
        "",
        "| method | | build s | search s | MiB | recall@10 |",
        "|---|---|---|---|---|---|",
        *(
            f"| {name} | {METHODS[name]} | {one['build']:.2f} | {one['search']:.2f} | {one['memory']:.0f} | "
            f"{one['recall']:.3f} |"
            for name, one in searches.items()
        ),
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--rows", type=int, default=50_000)
    parser.add_argument("--out", type=Path, help="write the page here")
    parser.add_argument("--work", type=Path, help="where the cache goes; a temporary folder by default")
    parser.add_argument("--one", choices=METHODS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure_search(arguments.one, arguments.work)))
        return
    work = arguments.work or Path(tempfile.mkdtemp(prefix="inspect-"))
    try:
        text = run(arguments.rows, work)
    finally:
        if not arguments.work:
            shutil.rmtree(work)
    print(text)
    if arguments.out:
        arguments.out.write_text(text)


def run(rows: int, work: Path) -> str:
    """Everything, in order."""
    cache, start = work / "cache", time.perf_counter()
    make_cache(cache, rows)
    made = time.perf_counter() - start
    print(f"cache of {rows} rows in {made:.1f} s", flush=True)
    commands = {}
    for name in ("index", "report"):
        commands[name] = measure_command(name, str(cache))
        print(name, commands[name], flush=True)
    np.save(work / "vectors.npy", vectors_of(cache, cache / "index"))
    searches = {}
    for name in METHODS:
        command = [sys.executable, __file__, "--one", name, "--work", str(work)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        searches[name] = json.loads(done.stdout.splitlines()[-1])
        print(name, searches[name], flush=True)
    return page(rows, made, commands, searches)


if __name__ == "__main__":
    main()
