"""One look at every encoded image of a split: its hash and size, and that it can be decoded.

Images are read and decoded by threads, some hundred at a time; their pixels are kept only where that is asked for.
So a broken file is named before any work, together with all others.
"""

import hashlib
from array import array
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from darht.cache.sources.decode import Decoding, decode, quiet
from darht.cache.sources.located import Located
from darht.cache.sources.rows import one_line, rows_to_take, shown
from darht.core.errors import DataError
from darht.core.memory import share_one_heap

THREADS = 4  # Pillow decodes without the interpreter lock; more threads wait for the disk
_BLOCK = 32  # images that a thread decodes in one go: far fewer futures than files
_AHEAD = 2 * THREADS  # blocks on their way, so that no thread waits for the one who collects
_NAMED = 40  # broken files in a message: a screen of them


@dataclass(frozen=True, eq=False)
class Scanned:
    """What is known of the images that can be read, in source order; N of them.

    Attributes:
        sha256: of their bytes, uint8 `[N, 32]`.
        size: height and width of each as it stands upright, int32 `[N, 2]`.
        changes: bits of `decode.CHANGES`, uint8 `[N]`.
    """

    sha256: NDArray[np.uint8]
    size: NDArray[np.int32]
    changes: NDArray[np.uint8]


class Scan(NamedTuple):
    """A finished scan.

    Attributes:
        scanned: of the images that are kept.
        kept: their numbers, int64 `[N]`.
        broken: the numbers of those that were left out.
        images: uint8 `[N, 3, H, W]`; None unless pixels were asked for.
    """

    scanned: Scanned
    kept: NDArray[np.int64]
    broken: tuple[int, ...]
    images: NDArray[np.uint8] | None


class _Seen(NamedTuple):
    sha256: bytes
    size: tuple[int, int]
    changes: int
    pixels: NDArray[np.uint8] | None


@dataclass
class _Found:
    """What is collected, in source order."""

    kept: "array[int]" = field(default_factory=lambda: array("q"))
    sha256: bytearray = field(default_factory=bytearray)
    size: "array[int]" = field(default_factory=lambda: array("i"))
    changes: bytearray = field(default_factory=bytearray)
    broken: dict[int, str] = field(default_factory=dict)
    odd: dict[int, tuple[int, int]] = field(default_factory=dict)
    first: tuple[int, tuple[int, int]] | None = None
    images: NDArray[np.uint8] | None = None


def scan(
    located: Located,
    limit: int | None,
    where: str,
    how: Decoding,
    *,
    keep: bool,
    known: tuple[Scanned, NDArray[np.int64]] | None = None,
) -> Scan:
    """Look at every image, in the order given.

    Args:
        located: the images.
        limit: the first so many readable images only; None for all.
        where: they lie, for messages.
        how: they become pixels.
        keep: whether the pixels are wanted.
        known: what an earlier scan found, and for each image its number there, or -1; these are not read again.

    Raises:
        DataError: naming every image that cannot be decoded, or the first whose size differs from that of the first
            and how many others do; there are fewer images than the limit.
    """
    wanted = rows_to_take(limit, len(located), where)
    share_one_heap()
    found, numbers = _Found(), range(len(located) if how.skip_broken else wanted)
    with quiet():
        for number, seen in _look(located, numbers, how, keep, known):
            if isinstance(seen, str):
                found.broken[number] = seen
            else:
                _add(found, number, seen, how, 0 if how.mixed and not keep else wanted)
            if len(found.kept) == wanted:
                break
    _refuse(located, found, how)
    rows_to_take(limit, len(found.kept), where)
    count = len(found.kept)
    scanned = Scanned(
        np.frombuffer(found.sha256, np.uint8).reshape(count, 32),
        np.array(found.size, dtype=np.int32).reshape(count, 2),
        np.frombuffer(found.changes, np.uint8),
    )
    images = None if found.images is None else found.images[:count]
    return Scan(scanned, np.array(found.kept, dtype=np.int64), tuple(sorted(found.broken)), images)


def _look(
    located: Located, numbers: range, how: Decoding, keep: bool, known: tuple[Scanned, NDArray[np.int64]] | None
) -> Iterator[tuple[int, _Seen | str]]:
    """Every image, or why there is none, in order."""

    def look(block: range) -> list[_Seen | str]:
        return [_recall(known, number) or _look_at(located, number, how, keep) for number in block]

    blocks = [numbers[start : start + _BLOCK] for start in range(0, len(numbers), _BLOCK)]
    waiting = deque[tuple[range, Future[list[_Seen | str]]]]()
    with ThreadPoolExecutor(THREADS) as threads:
        try:
            for block in blocks[:_AHEAD]:
                waiting.append((block, threads.submit(look, block)))
            for after in [*blocks[_AHEAD:], *[None] * min(_AHEAD, len(blocks))]:
                block, future = waiting.popleft()
                if after is not None:
                    waiting.append((after, threads.submit(look, after)))
                yield from zip(block, future.result(), strict=True)
        finally:
            threads.shutdown(cancel_futures=True)


def _recall(known: tuple[Scanned, NDArray[np.int64]] | None, number: int) -> _Seen | None:
    if known is None or (there := int(known[1][number])) < 0:
        return None
    scanned = known[0]
    height, width = scanned.size[there].tolist()
    return _Seen(scanned.sha256[there].tobytes(), (height, width), int(scanned.changes[there]), None)


def _look_at(located: Located, number: int, how: Decoding, keep: bool) -> _Seen | str:
    try:
        data = located.read(number)
        decoded = decode(data, how)
    except (DataError, OSError) as error:
        return one_line(error)
    pixels = decoded.pixels if keep else None
    return _Seen(hashlib.sha256(data).digest(), decoded.size, decoded.changes, pixels)


def _add(found: _Found, number: int, seen: _Seen, how: Decoding, rows: int) -> None:
    """One image more; where all must have one size, `rows` images are expected."""
    size = seen.size if how.image_size is None else (how.image_size, how.image_size)
    if found.first is None:
        found.first = number, size
        if seen.pixels is not None:
            found.images = np.empty((rows, 3, *size), dtype=np.uint8)
    if rows and size != found.first[1]:
        found.odd[number] = size
    elif found.images is not None and seen.pixels is not None:
        found.images[len(found.kept)] = seen.pixels.transpose(2, 0, 1)
    found.kept.append(number)
    found.sha256 += seen.sha256
    found.size.extend(seen.size)
    found.changes.append(seen.changes)


def _refuse(located: Located, found: _Found, how: Decoding) -> None:
    """Raise DataError for what cannot become rows, all of it at once."""
    problems = []
    if found.broken and not how.skip_broken:
        names = (f"{located.root / located.place(n)} ({found.broken[n]})" for n in sorted(found.broken))
        count = "" if len(found.broken) == 1 else f"{len(found.broken)} files: "
        problems.append(f"cannot decode {count}{shown(names, _NAMED)}; replace or remove what is broken, or leave it "
                        "out with --skip-broken (skip_broken: true under data)")  # fmt: skip
    if found.odd and found.first is not None:
        number = min(found.odd)
        (first, (height, width)), (other_height, other_width) = found.first, found.odd[number]
        problems.append(
            f"all images must have one size; {located.root / located.place(number)} is {other_width}x{other_height} "
            f"pixels, {located.root / located.place(first)} is {width}x{height}; files of another size: "
            f"{len(found.odd)}; an imagefolder is brought to one size with image_size, for example "
            f"`image_size: {min(width, height)}`"
        )
    if problems:
        raise DataError("; ".join(problems))
