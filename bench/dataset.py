"""`CacheDataset` beside what the trainer draws from its own feed: rows a second, one epoch of each in turn.

    python bench/dataset.py

Both sides give the same batches of float pixels; no network runs. What counts is the median over rounds of the quotient
of two epochs that follow one another, so that what else the machine does disturbs both alike; which side is first
changes from round to round.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from trainer import CPU, make_cache

from darht.cache.read.dataset import CacheDataset
from darht.cache.read.loader import GIB
from darht.cache.read.reader import Cache
from darht.cache.read.sizes import needed_bytes
from darht.cache.read.stream import Feed
from darht.core.config import parse
from darht.trainer.config import TrainConfig
from darht.trainer.student.inner import Examples
from darht.trainer.student.setup import feed_plan

MODES = {"clean": {"recipe": "kd"}, "adversarial": {"recipe": "rslad", "inner": {"kind": "cached", "eps": 8}}}
SEED = 3


def feed_epochs(cache: Cache, mode: str, batch: int, memory: float) -> Callable[[int], int]:
    """Everything that the trainer does up to the student: gives the rows of an epoch."""
    plain = {"student": {"arch": "resnet18"}, "optim": {"batch_size": batch, "epochs": 10**6}, "seed": SEED}
    config = parse(TrainConfig, {**plain, **MODES[mode]}, "bench")
    feed = Feed(cache, feed_plan(config, cache, CPU, memory), seed=SEED, epochs=10**6)
    examples, student = Examples(config, config.objective()), nn.Identity()

    def epoch(number: int) -> int:
        rows, first = 0, number * feed.steps
        for step, (data, at) in enumerate(feed.batches(number), start=first):
            rows += len(examples.draw(student, data, at, epoch=number, number=step, done=0.0, pgd_share=0.0).x)
        return rows

    return epoch


def dataset_epochs(cache: Cache, mode: str, batch: int, memory: float) -> Callable[[int], int]:
    """The same from one's own loop."""
    adversarial = "all" if mode == "adversarial" else None
    options = {"batch_size": batch, "seed": SEED, "pixels": "float", "memory_gib": memory}
    dataset = CacheDataset(cache, adversarial=adversarial, **options)

    def epoch(number: int) -> int:
        dataset.set_epoch(number)
        return sum(len(each.x) for each in dataset)

    return epoch


def compare(cache: Cache, mode: str, share: float, arguments: argparse.Namespace) -> dict[str, object]:
    """Rows a second of both, and the median quotient, dataset over feed."""
    memory = share * needed_bytes(cache, adversarial=mode == "adversarial") / GIB
    sides = {
        name: make(cache, mode, arguments.batch, memory)
        for name, make in {"feed": feed_epochs, "dataset": dataset_epochs}.items()
    }
    speeds: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(arguments.rounds + 1):  # the first is not counted
        for name in list(sides)[:: 1 if number % 2 else -1]:
            start = time.perf_counter()
            rows = sides[name](number)
            speeds[name].append(rows / (time.perf_counter() - start))
    quotients = [mine / theirs for mine, theirs in zip(speeds["dataset"][1:], speeds["feed"][1:], strict=True)]
    medians = {f"{name} rows/s": round(statistics.median(found[1:])) for name, found in speeds.items()}
    kind = "resident" if share >= 1 else "streamed"
    return {"batches": mode, "cache": kind, **medians, "dataset / feed": round(statistics.median(quotients), 3)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=61)
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # threads of the reading are others
    with tempfile.TemporaryDirectory() as folder:
        cache = make_cache(Path(folder) / "cache", arguments.rows)
        for mode in MODES:
            for share in (1.0, 0.8):
                print(json.dumps(compare(cache, mode, share, arguments)), flush=True)


if __name__ == "__main__":
    main()
