"""What is inside a cache, as text for people."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from darht.cache.format.commit import read_commit
from darht.cache.format.layout import ArrayLayout
from darht.cache.read.reader import Cache

_LOOKUPS = 16  # questions to an object store at a time


@dataclass(frozen=True)
class Summary:
    """A cache in words.

    Attributes:
        facts: pairs of name and value.
        arrays: per array: name, type, shape, megabytes, bytes per row, share of the raw size, seconds of work.
    """

    facts: tuple[tuple[str, str], ...]
    arrays: tuple[tuple[str, ...], ...]


def summarise(cache: Cache) -> Summary:
    """Describe a sealed cache."""
    spec = cache.spec
    total = sum(shard.size for shard in cache.manifest.shards)
    held = len(cache.manifest.holdout)
    facts = [
        ("data", f"{spec.data.source} {spec.data.split}, {spec.data.rows} rows, {held} of them held out"),
        ("classes", f"{len(spec.data.classes)}: {', '.join(spec.data.classes[:10])}"),
        ("views", f"{spec.views.count} ({spec.views.kind}, padding {spec.views.padding}, mirrored: {spec.views.flip})"),
    ]
    for name, teacher in spec.teachers.items():
        facts.append((f"teacher {name}", f"{teacher.arch}, {teacher.role}, weights {teacher.weights_sha256[:12]}"))
    for name, attack in spec.attacks.items():
        settings = ", ".join(f"{key} {value}" for key, value in attack.parameters.items())
        facts.append((f"attack {name}", f"{attack.kind} on {attack.teacher}, {attack.views} views, {settings}"))
    facts.append(("size", f"{total / 1e6:.2f} MB, {total / spec.data.rows:.0f} bytes a row"))
    facts.append(("root hash", cache.root_hash))
    return Summary(tuple(facts), tuple(_array_row(cache, array) for array in cache.arrays.values()))


def _array_row(cache: Cache, array: ArrayLayout) -> tuple[str, ...]:
    size = cache.size(array.name)
    raw = int(np.prod(array.shape)) * np.dtype(array.dtype).itemsize
    with ThreadPoolExecutor(_LOOKUPS) as pool:  # behind a URL the times of so many small questions would add up
        commits = list(pool.map(lambda shard: read_commit(cache.folder, array, shard), range(array.shards)))
    seconds = sum(commit.seconds for commit in commits if commit is not None)
    shape = " x ".join(map(str, array.shape))
    return (
        array.name,
        array.dtype,
        shape,
        f"{size / 1e6:.2f}",
        f"{size / array.shape[0]:.1f}",
        f"{100 * size / raw:.0f} %",
        f"{seconds:.1f}",
    )
