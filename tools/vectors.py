"""The vectors that inspection compares, read block by block so that no array is ever whole in memory.

A space is a named set of N vectors of unit length, one for each row of a cache:

- `image`: the pixels, minus their mean, so that the cosine of two images is their correlation;
- `delta/<attack>`: the perturbation of view 0, the image as it is (other views are moved against each other);
- `logits/<teacher>`: the logits on the clean image, minus their mean, which softmax does not see;
- `features/<student>`: the student's features of the clean image.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from darht.cache.read.reader import Cache
from darht.core.errors import ConfigError

Floats = NDArray[np.float32]
Features = Callable[[NDArray[np.uint8]], Floats]
"""Images uint8 `[n, 3, H, W]` to features `[n, F]`."""

_BLOCK_BYTES = 32 * 2**20  # stored bytes read at once: their float32 copy is 128 MiB
_TINY = 1e-12


@dataclass(frozen=True, kw_only=True)
class Space:
    """One set of vectors.

    Attributes:
        kind: `image`, `delta`, `logits` or `features`.
        subject: the attack, teacher or student whose vectors these are; empty for images.
        array: the cache's array that the vectors are read from.
        dim: D, before any projection.
        teachers: whose answers belong to a hit of this space; several for `image`.
        read: rows to float32 `[n, D]` of unit length (a vector of zeros stays one).
    """

    kind: str
    subject: str = ""
    array: str = "image"
    dim: int
    teachers: tuple[str, ...]
    read: Callable[[slice], Floats]

    @property
    def name(self) -> str:
        """As above."""
        return f"{self.kind}/{self.subject}" if self.subject else self.kind


def cache_spaces(cache: Cache, students: dict[str, tuple[int, Features]] | None = None) -> dict[str, Space]:
    """Every space of a cache by name; `students` gives the number of features and the function of each."""
    shape, teachers = cache.spec.view_shape, tuple(cache.spec.teachers)
    pixels = int(np.prod(shape))
    spaces = [Space(kind="image", dim=pixels, teachers=teachers, read=lambda rows: image_vectors(_images(cache, rows)))]
    for name, attack in cache.spec.attacks.items():
        array, read = f"delta/{name}", _delta_reader(cache, name)
        spaces.append(Space(kind="delta", subject=name, array=array, dim=pixels, teachers=(attack.teacher,), read=read))
    for name, teacher in cache.spec.teachers.items():
        array, read = f"logits/{name}/clean", _logit_reader(cache, name)
        spaces.append(
            Space(kind="logits", subject=name, array=array, dim=teacher.num_classes, teachers=(name,), read=read)
        )
    for name, (dim, features) in (students or {}).items():
        spaces.append(Space(kind="features", subject=name, dim=dim, teachers=(), read=_feature_reader(cache, features)))
    return {space.name: space for space in spaces}


def _images(cache: Cache, rows: slice) -> NDArray[np.uint8]:
    return cache.clean(rows)


def _delta_reader(cache: Cache, attack: str) -> Callable[[slice], Floats]:
    return lambda rows: unit(cache.read(f"delta/{attack}", rows)[:, 0])


def _logit_reader(cache: Cache, teacher: str) -> Callable[[slice], Floats]:
    return lambda rows: logit_vectors(cache.logits(teacher, rows=rows))


def _feature_reader(cache: Cache, features: Features) -> Callable[[slice], Floats]:
    return lambda rows: unit(features(_images(cache, rows)))


def unit(values: np.ndarray) -> Floats:
    """Flatten all axes but the first and scale to unit length, `[n, D]`; zeros stay zeros."""
    flat = np.ascontiguousarray(values.reshape(len(values), -1), dtype=np.float32)
    length = np.sqrt(np.einsum("nd,nd->n", flat, flat))[:, None]
    scaled: Floats = flat / np.maximum(length, np.float32(_TINY))
    return scaled


def logit_vectors(logits: np.ndarray) -> Floats:
    """Logits `[n, C]` without their mean, of unit length: the angle must not see a shift that softmax does not see."""
    values = logits.astype(np.float32)
    return unit(values - values.mean(1, keepdims=True))


def image_vectors(images: NDArray[np.uint8]) -> Floats:
    """Images uint8 `[n, 3, H, W]` without their mean, of unit length."""
    values = images.reshape(len(images), -1).astype(np.float32)
    return unit(values - values.mean(1, keepdims=True))


def blocks(cache: Cache, array: str, *, labelled: bool = False) -> Iterator[slice]:
    """The rows of a cache in order, cut at chunk borders, so that each block of `array` takes at most 32 MiB.

    On request only those that have labels, which come first.
    """
    layout = cache.arrays[array]
    row_bytes = int(np.prod(cache.spec.view_shape)) if array == "image" else layout.row_bytes
    chunks = max(1, _BLOCK_BYTES // max(1, row_bytes * layout.rows_per_chunk))
    step = min(chunks * layout.rows_per_chunk, layout.rows_per_shard)
    count = cache.spec.data.labelled if labelled else cache.rows
    for first in range(0, count, step):
        yield slice(first, min(first + step, count))


def space_blocks(cache: Cache, space: Space) -> Iterator[slice]:
    """The blocks in which a space is read."""
    return blocks(cache, space.array)


def sample_rows(cache: Cache, count: int, seed: int = 0, *, labelled: bool = False) -> NDArray[np.int64]:
    """Up to `count` rows, sorted, drawn without replacement; on request only such as have labels."""
    rows = cache.spec.data.labelled if labelled else cache.rows
    if count >= rows:
        return np.arange(rows)
    return np.sort(np.random.default_rng(seed).choice(rows, count, replace=False))


def take(cache: Cache, space: Space, rows: NDArray[np.int64]) -> Floats:
    """The vectors of some rows, `[n, D]`, in the order given; every block that holds one is read once."""
    out = np.empty((len(rows), space.dim), dtype=np.float32)
    for block, here in _wanted(space_blocks(cache, space), rows):
        out[here] = space.read(block)[rows[here] - block.start]
    return out


def read_rows(cache: Cache, array: str, rows: NDArray[np.int64]) -> np.ndarray:
    """Some rows of an array in the order given: a shard is decoded once, not once for each of its rows.

    Images come as view 0 shows them, as in all that is inspected.
    """
    layout, images = cache.arrays[array], array == "image"
    out = np.empty((len(rows), *(cache.spec.view_shape if images else layout.shape[1:])), dtype=layout.dtype)
    for block, here in _wanted(blocks(cache, array), rows):
        found = cache.clean(block) if images else cache.read(array, block)
        out[here] = found[rows[here] - block.start]
    return out


def _wanted(parts: Iterator[slice], rows: NDArray[np.int64]) -> Iterator[tuple[slice, NDArray[np.int64]]]:
    """The blocks that hold some of the rows, each with the positions of these in `rows`."""
    order = np.argsort(rows, kind="stable")
    for block in parts:
        here = order[slice(*np.searchsorted(rows, (block.start, block.stop), sorter=order))]
        if len(here):
            yield block, here


def need_attacks(cache: Cache) -> None:
    """Raise ConfigError for a cache that holds no perturbations."""
    if not cache.spec.attacks:
        raise ConfigError(f"{cache.folder} holds no attacks, so it has no perturbations; add some to its spec")
