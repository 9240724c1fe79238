"""Near-duplicates between a cache's rows and the test split: rows that would make a test score too good.

Candidates are close in small thumbnails or in the teachers' logits (which see through mirroring and shifts). A pair
counts when its full pixels agree, as they are or mirrored, both in the large and in the detail, and when it is more
alike than rows of this data are to the rows nearest to them: two pictures of one digit correlate by 0.95, two
photographs by 0.6. CIFAR-10 has about 3 % of test images with a near-duplicate in the training split (Barz and Denzler
2020, arXiv 1902.00423).
"""

from dataclasses import dataclass

import faiss
import numpy as np
import torch
from numpy.typing import NDArray

from darht.cache.read.reader import Cache
from darht.core.errors import DataError
from darht.tools.predictions import Bools, Ints
from darht.tools.vectors import Floats, blocks, image_vectors, logit_vectors, read_rows, sample_rows, unit

# Looked at on CIFAR-10: of all 10,000 test images these bounds pair 2.6 % with a training image. Below them pairs of
# different ships on the same sea begin, whose detail does not agree.
PIXELS, DETAIL = 0.85, 0.65
_THUMB, _CLOSE, _NEAR = 8, 0.8, 5  # side of a thumbnail, correlation of a candidate, candidates for a test image
_NULL_ROWS, _FEWEST = 500, 30  # rows whose nearest rows are looked at, and the fewest that say how alike rows are
# Above the median; of rows without a duplicate one in 30,000 is so alike to another, were they normal.
_DEVIATIONS = 4.0
_TELLABLE = 0.999  # noise of one level in 255 leaves a correlation of that
_PAIRS = 2000  # compared at once: 50 MB of float32 for 32x32 pixels, several times over


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A row of the cache and the test image that it repeats.

    Attributes:
        row: in the cache.
        test: number of the test image.
        pixels: correlation of their pixels.
        detail: correlation of what remains without the means of 4x4 blocks.
        mirrored: whether one of them is mirrored.
        logits: cosine of what all teachers say about both; NaN when no teacher could be asked about the test image.
    """

    row: int
    test: int
    pixels: float
    detail: float
    mirrored: bool
    logits: float


@dataclass(frozen=True, kw_only=True)
class Null:
    """How alike different rows are.

    Attributes:
        pixels: the correlation that hardly any row has with the row nearest to it, by chance.
        detail: likewise of the detail.
        rows: looked at.
    """

    pixels: float
    detail: float
    rows: int

    @property
    def refusal(self) -> str:
        """Why duplicates cannot be told from other rows, or nothing."""
        if self.rows < _FEWEST:
            return f"how alike different rows are takes {_FEWEST} rows to say; there are {self.rows}"
        if min(self.pixels, self.detail) > _TELLABLE:
            return f"rows that are no duplicates correlate by up to {min(self.pixels, self.detail):.4f} here"
        return ""


def measure_null(cache: Cache) -> Null:
    """Look at up to 500 rows and the rows nearest to them.

    A few of them may be duplicates themselves, so the bounds are four deviations above the median, the deviation taken
    from the median distance to it; correlations are spread by Fisher's transformation, which makes them about normal.
    """
    rows = sample_rows(cache, _NULL_ROWS)
    if len(rows) < _FEWEST:
        return Null(pixels=1.0, detail=1.0, rows=len(rows))
    own, images = _own_thumbnails(cache), read_rows(cache, "image", rows)
    mirrored = np.ascontiguousarray(images[..., ::-1])
    pairs = np.concatenate([_closest(own, _thumbnails(turned), _NEAR + 1) for turned in (images, mirrored)])
    pairs = np.unique(pairs[pairs[:, 0] != rows[pairs[:, 1]]], axis=0)
    best = np.zeros((2, len(rows)), dtype=np.float32)
    for part in np.array_split(pairs, max(1, len(pairs) // _PAIRS)):
        pixels, detail, _ = _likeness(read_rows(cache, "image", part[:, 0]), images[part[:, 1]])
        np.maximum.at(best[0], part[:, 1], pixels)
        np.maximum.at(best[1], part[:, 1], detail)
    z = np.arctanh(np.clip(best, -1 + 1e-6, 1 - 1e-6))
    median = np.median(z, axis=1, keepdims=True)
    spread = 1.4826 * np.median(np.abs(z - median), axis=1, keepdims=True)
    bounds = np.tanh(median + _DEVIATIONS * spread).ravel()
    return Null(pixels=float(bounds[0]), detail=float(bounds[1]), rows=len(rows))


def find_duplicates(
    cache: Cache, test: NDArray[np.uint8], logits: dict[str, Floats], null: Null | None = None
) -> list[Pair]:
    """Pairs of a row and a test image, the most alike first.

    Args:
        cache: its rows.
        test: images uint8 `[M, 3, H, W]`.
        logits: of the test images by teacher, `[M, C]`; may be empty.
        null: from `measure_null`, where it was measured already.

    Raises:
        DataError: duplicates cannot be told from other rows of this data.
    """
    null = null or measure_null(cache)
    if null.refusal:
        raise DataError(f"{cache.folder}: near-duplicates cannot be told: {null.refusal}")
    own, theirs = _own_thumbnails(cache), _thumbnails(test)
    mirrored = _thumbnails(np.ascontiguousarray(test[..., ::-1]))
    pairs = np.concatenate([_closest(own, theirs), _closest(own, mirrored)])
    answers = _answers(cache, logits)
    if answers is not None:
        pairs = np.concatenate([pairs, _closest(*answers)])
    pairs = np.unique(pairs, axis=0)
    rows, others = pairs.T
    close = np.maximum((own[rows] * theirs[others]).sum(1), (own[rows] * mirrored[others]).sum(1)) >= _CLOSE
    found: list[Pair] = []
    if not close.any():
        return found
    for part in np.array_split(pairs[close], max(1, close.sum() // _PAIRS)):
        found += _compare(read_rows(cache, "image", part[:, 0]), test[part[:, 1]], part, answers, null)
    return sorted(found, key=lambda pair: -pair.pixels)


def _own_thumbnails(cache: Cache) -> Floats:
    return np.concatenate([_thumbnails(cache.clean(rows)) for rows in blocks(cache, "image")])


def _thumbnails(images: NDArray[np.uint8]) -> Floats:
    side = min(_THUMB, *images.shape[2:])
    parts = torch.from_numpy(images).split(1024)
    small = [torch.nn.functional.adaptive_avg_pool2d(part.float(), side) for part in parts]
    values = torch.cat(small).flatten(1).numpy()
    return unit(values - values.mean(1, keepdims=True))


def _closest(own: Floats, theirs: Floats, near: int = _NEAR) -> Ints:
    """Pairs `[P, 2]` of each test vector and its nearest rows."""
    index = faiss.IndexFlatIP(own.shape[1])
    index.add(own)
    _, rows = index.search(theirs, min(near, len(own)))
    return np.stack([rows.ravel(), np.repeat(np.arange(len(theirs)), rows.shape[1])], axis=1)


def _answers(cache: Cache, logits: dict[str, Floats]) -> tuple[Floats, Floats] | None:
    """What the teachers say about rows and about test images, one after another, unit length; None without teachers."""
    if not logits:
        return None
    own = []
    for name in logits:
        parts = blocks(cache, f"logits/{name}/clean")
        own.append(np.concatenate([logit_vectors(cache.logits(name, rows=rows)) for rows in parts]))
    return unit(np.hstack(own)), unit(np.hstack([logit_vectors(values) for values in logits.values()]))


def _compare(
    images: NDArray[np.uint8],
    others: NDArray[np.uint8],
    pairs: Ints,
    answers: tuple[Floats, Floats] | None,
    null: Null,
) -> list[Pair]:
    """Which of the pairs `[P, 2]` agree, given their images `[P, 3, H, W]`."""
    pixels, detail, mirrored = _likeness(images, others)
    unlike_others = (pixels > null.pixels) | (detail > null.detail)
    found = []
    for i in np.flatnonzero((pixels >= PIXELS) & (detail >= DETAIL) & unlike_others):
        row, test = (int(number) for number in pairs[i])
        found.append(
            Pair(
                row=row,
                test=test,
                pixels=float(pixels[i]),
                detail=float(detail[i]),
                mirrored=bool(mirrored[i]),
                logits=float("nan") if answers is None else float(answers[0][row] @ answers[1][test]),
            )
        )
    return found


def _likeness(images: NDArray[np.uint8], others: NDArray[np.uint8]) -> tuple[Floats, Floats, Bools]:
    """Correlations `[P]` of pixels and of detail, the larger of as they are and mirrored, and which it was."""
    turned = np.ascontiguousarray(others[..., ::-1])
    own, detail = image_vectors(images), _detail(images)
    pixels = np.stack([(own * image_vectors(other)).sum(1) for other in (others, turned)])
    fine = np.stack([(detail * _detail(other)).sum(1) for other in (others, turned)])
    best, number = pixels.argmax(0), np.arange(len(images))
    return pixels[best, number], fine[best, number], best == 1


def _detail(images: NDArray[np.uint8]) -> Floats:
    x = torch.from_numpy(images).float()
    blurred = torch.nn.functional.avg_pool2d(x, 4, ceil_mode=True)
    blurred = torch.nn.functional.interpolate(blurred, scale_factor=4.0)[..., : x.shape[2], : x.shape[3]]
    return unit((x - blurred).numpy())
