"""Images that stay encoded beside images stored as pixels: bytes a row, and images a second that one core reads.

    python bench/images.py --root DIR --out PAGE

DIR holds Tiny ImageNet (64 pixels). Larger images are pieces of scikit-learn's two photographs. Each kind is a cache of
its own, without teachers. Whole shards are read in order by one thread, and the box of a resized crop is cut out.
Seconds are those that the thread computed, not those that it waited; rounds are interleaved, and the fastest counts.
"""

import argparse
import platform
import tempfile
import time
from pathlib import Path

import numpy as np
import yaml
from PIL import Image
from sklearn.datasets import load_sample_images

from darht.cache.builder.build import build, plan_build
from darht.cache.builder.seal import seal
from darht.cache.format import images as encoded
from darht.cache.format.resample import resample
from darht.cache.read.reader import Cache, open_cache

ROUNDS = 3
KINDS = ("raw", "png", "jpeg")
SIZES = {"Tiny ImageNet, 64 x 64, crops of 56": 56, "photographs, 500 x 375, crops of 224": 224}


def write_photographs(folder: Path, count: int) -> None:
    """Pieces of photographs as JPEG files of 500 x 375 pixels, quality 90, in two classes."""
    photographs = load_sample_images().images
    random = np.random.default_rng(0)
    for number in range(count):
        photograph = Image.fromarray(photographs[number % 2])
        left, top = (int(random.integers(0, extent + 1)) for extent in (640 - 500, 427 - 375))
        path = folder / "train" / f"photograph{number % 2}" / f"{number:04d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        photograph.crop((left, top, left + 500, top + 375)).save(path, "JPEG", quality=90)


def write_small(root: Path, folder: Path, count: int) -> None:
    """The first JPEG files of Tiny ImageNet, in one class."""
    for number, path in enumerate(sorted(root.rglob("*.JPEG"))[:count]):
        to = folder / "train" / f"class{number % 2}" / path.name.replace(".JPEG", ".jpg")
        to.parent.mkdir(parents=True, exist_ok=True)
        to.write_bytes(path.read_bytes())


def cache_of(root: Path, kind: str, size: int, out: Path) -> Cache:
    """A cache of the images alone."""
    config = {
        "data": {"source": "imagefolder", "root": str(root), "holdout": 0},
        "teachers": {},
        "views": {"kind": "resized-crop", "count": 2, "size": size},
        "store": {"images": kind, "rows_per_shard": 256, "rows_per_chunk": 32},
    }
    out.mkdir(parents=True)
    (out / "cache.yaml").write_text(yaml.safe_dump(config))
    import torch

    device = torch.device("cpu")
    build(plan_build(out / "cache.yaml", device=device), out / "cache", device=device, on_unit=lambda *_: None)
    seal(out / "cache")
    return open_cache(out / "cache")


def read(cache: Cache, size: int) -> tuple[float, float]:
    """Seconds an image to its pixels, and to the pixels of a resized crop."""
    start = time.thread_time()
    values = cache.read("image")
    images = [encoded.decode_image(value) for value in values] if cache.spec.store.encoded else list(values)
    pixels = time.thread_time()
    boxes = cache.read("views/box")[:, 1]
    for image, box in zip(images, boxes, strict=True):
        resample(image, box, size)
    return (pixels - start) / cache.rows, (time.thread_time() - start) / cache.rows


def measure(root: Path, rows: int) -> list[str]:
    """The lines of the table."""
    lines = ["| images | stored as | bytes a row | images/s a core | with the crop |", "|---|---|---|---|---|"]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_small(root, folder / "small", rows)
        write_photographs(folder / "large", rows // 4)
        for name, (about, size) in zip(("small", "large"), SIZES.items(), strict=True):
            caches = {kind: cache_of(folder / name, kind, size, folder / f"{name}-{kind}") for kind in KINDS}
            rounds = [{kind: read(cache, size) for kind, cache in caches.items()} for _ in range(ROUNDS)]
            for kind, cache in caches.items():
                plain, cut = (min(one[kind][which] for one in rounds) for which in (0, 1))
                size_of_row = cache.size("image") / cache.rows
                lines.append(f"| {about} | `{kind}` | {size_of_row:,.0f} | {1 / plain:,.0f} | {1 / cut:,.0f} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    page = "\n".join(
        [f"{platform.machine()}, {time.strftime('%Y-%m-%d')}", "", *measure(arguments.root, arguments.rows)]
    )
    if arguments.out:
        arguments.out.write_text(page + "\n")
    print(page)


if __name__ == "__main__":
    main()
