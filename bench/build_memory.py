"""Peak memory of `darht-cache build` from many JPEG files, in one process and in several.

    python bench/build_memory.py --files 5000 20000 --workers 1 4 --out PAGE

Files are pieces of scikit-learn's two photographs of about 400 x 300 pixels, 500 different ones under many names (hard
links), in ten classes; views are resized crops, the teacher is a ResNet of some thousand weights, images are kept as
JPEG. Of the builder and its workers the memory is summed every fifth of a second: RSS counts pages that processes share
in each of them, PSS once. Everything is removed at the end.
"""

import argparse
import datetime
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import yaml
from PIL import Image
from sklearn.datasets import load_sample_images

from darht.cache.builder.teachers import Card, save_teacher
from darht.core.nets import build

DIFFERENT, CLASSES, EVERY = 500, 10, 0.2
NET = {"width": 4, "blocks": [1, 1, 1, 1]}
COMMAND = [sys.executable, "-c", "from darht.cache.cli import cache; cache()", "build"]


class Peak(NamedTuple):
    """Of one build: MB at most of all its processes together, and seconds of the clock."""

    rss: float
    pss: float
    seconds: float


def write_files(root: Path, count: int) -> None:
    """JPEG files of 360 to 440 by 270 to 330 pixels, quality 90."""
    photographs, random = load_sample_images().images, np.random.default_rng(0)
    (root / "different").mkdir(parents=True)
    for number in range(min(count, DIFFERENT)):
        width, height = int(random.integers(360, 441)), int(random.integers(270, 331))
        left, top = (int(random.integers(0, most + 1)) for most in (640 - width, 427 - height))
        picture = Image.fromarray(photographs[number % 2]).crop((left, top, left + width, top + height))
        picture.save(root / "different" / f"{number}.jpg", "JPEG", quality=90)
    for number in range(count):
        path = root / "train" / f"class{number % CLASSES}" / f"{number:06d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        os.link(root / "different" / f"{number % DIFFERENT}.jpg", path)


def write_spec(folder: Path, size: int) -> None:
    """A teacher, and the YAML of a cache of its answers."""
    torch.manual_seed(0)
    card = Card(arch="resnet18", kwargs=NET, num_classes=CLASSES, weights_sha256="")
    save_teacher(folder / "teacher", build("resnet18", CLASSES, NET), card)
    spec = {
        "data": {"source": "imagefolder", "root": str(folder / "data"), "holdout": 0.02},
        "views": {"kind": "resized-crop", "count": 2, "size": size},
        "teachers": {"teacher": {"path": str(folder / "teacher")}},
        "attacks": {"fgsm": {"kind": "fgsm", "teacher": "teacher", "eps": 8}},
        "store": {"images": "jpeg"},
    }
    (folder / "cache.yaml").write_text(yaml.safe_dump(spec))


def tree(pid: int) -> list[int]:
    """A process and all below it."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return []
    return [pid, *(one for child in children for one in tree(int(child)))]


def memory(pids: list[int]) -> tuple[float, float]:
    """RSS and PSS of processes in MB; of one that has ended nothing."""
    found = {"Rss:": 0, "Pss:": 0}
    for pid in pids:
        try:
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
        except OSError:
            continue
        for name, value, *_ in (line.split() for line in lines):
            if name in found:
                found[name] += int(value)
    return found["Rss:"] / 1024, found["Pss:"] / 1024


def watch(folder: Path, workers: int) -> Peak:
    """Build a cache by the command line; its peak."""
    words = [*COMMAND, str(folder / "cache.yaml"), "--out", str(folder / f"cache-{workers}")]
    words += ["--workers", str(workers), "--device", "cpu", "--allow", "teacher"]
    start, rss, pss = time.perf_counter(), 0.0, 0.0
    with subprocess.Popen(words, stdout=subprocess.DEVNULL) as builder:
        while builder.poll() is None:
            now = memory(tree(builder.pid))
            rss, pss = max(rss, now[0]), max(pss, now[1])
            time.sleep(EVERY)
    if builder.returncode:
        raise SystemExit(f"the build ended with {builder.returncode}")
    return Peak(rss, pss, time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--files", type=int, nargs="+", default=[5000, 20_000])
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--size", type=int, default=32, help="of the crops, in pixels")
    parser.add_argument("--out", type=Path, help="write the table here")
    arguments = parser.parse_args()
    lines = [f"{datetime.date.today()}, {os.cpu_count()}-core {platform.machine()} CPU, crops of {arguments.size}", ""]
    lines += ["| files | workers | peak PSS, MB | peak RSS, MB | s |", "|---|---|---|---|---|"]
    for count in arguments.files:
        with tempfile.TemporaryDirectory() as temporary:
            write_files(Path(temporary) / "data", count)
            write_spec(Path(temporary), arguments.size)
            for workers in arguments.workers:
                peak = watch(Path(temporary), workers)
                lines.append(f"| {count:,} | {workers} | {peak.pss:,.0f} | {peak.rss:,.0f} | {peak.seconds:.0f} |")
                print(lines[-1], flush=True)
    if arguments.out:
        arguments.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
