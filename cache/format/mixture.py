"""Several sources in one cache: whose rows are whose, which have labels, and how many views each has.

The rows of a source follow those of the one before it. Rows with labels come first, and no source has more views than
the one before, so the rows that have a label, or a certain view, are the first so many of the cache.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from darht.core.errors import ConfigError

UNLABELLED = -1  # the label of a row that has none


@dataclass(frozen=True)
class SourceSpec:
    """One of several sources, by content.

    Attributes:
        source: what kind of files.
        split: `train` or `test`.
        rows: how many.
        sha256: of the content, as of a cache of this source alone; without labels and class names where it has none.
        labelled: whether its rows have labels; the others are stored with -1.
        share: of each batch; None for sources that share what the others leave, and whose rows are the epoch.
        holdout: share of its rows that are kept from training.
        views: how many of the cache's views teachers answer for its rows: the first.
        skipped: image files that could not be read and were left out.
    """

    source: str
    split: str
    rows: int
    sha256: str
    labelled: bool
    share: float | None
    holdout: float
    views: int
    skipped: int = 0

    def __post_init__(self) -> None:
        if self.rows < 1 or self.views < 1 or not 0 <= self.holdout < 1:
            raise ConfigError(
                f"a source has at least 1 row and 1 view, and holdout in [0, 1); got {self.rows}, {self.views} and "
                f"{self.holdout:g}"
            )
        if not self.labelled and self.holdout:
            raise ConfigError(f"rows without labels cannot be held out to score by; got holdout {self.holdout:g}")


def check_sources(sources: Sequence[SourceSpec], rows: int) -> None:
    """The rules for several sources.

    Raises:
        ConfigError: their rows are not `rows`, or one of the rules at the top of this module or of `check_shares` is
            broken.
    """
    if sum(source.rows for source in sources) != rows:
        raise ConfigError(f"the sources must have {rows} rows together; they have {sum(s.rows for s in sources)}")
    check_shares([source.share for source in sources], [source.labelled for source in sources])
    for before, after in itertools.pairwise(sources):
        if after.views > before.views:
            raise ConfigError(
                f"list sources with more views first; {after.source} has {after.views}, {before.source} before it "
                f"{before.views}"
            )


def check_shares(shares: Sequence[float | None], labelled: Sequence[bool]) -> None:
    """The rules for the shares of sources.

    Raises:
        ConfigError: rows without labels come first or have no share, no source is left without one, or shares leave
            nothing for those.
    """
    if list(labelled) != sorted(labelled, reverse=True):
        raise ConfigError("list sources with labels first, and those with labels: none after them")
    if any(share is None and not known for share, known in zip(shares, labelled, strict=True)):
        raise ConfigError(
            "rows without labels do not say how long an epoch is; give each source with labels: none its share of a "
            "batch, such as share: 0.7"
        )
    given = [share for share in shares if share is not None]
    if len(given) == len(shares):
        raise ConfigError("an epoch is as long as the rows of sources without a share; leave share out of one")
    if any(not 0 < share < 1 for share in given) or sum(given) >= 1:
        raise ConfigError(
            f"shares lie in (0, 1) and leave something of a batch to the other sources; got "
            f"{', '.join(f'{share:g}' for share in given)}"
        )


class Band(NamedTuple):
    """Views that the first rows of a cache have, and the rows after them do not: an array of clean logits each.

    Attributes:
        first: the first view.
        stop: one past the last.
        rows: rows 0..rows-1 have them.
    """

    first: int
    stop: int
    rows: int


def view_bands(sources: Sequence[SourceSpec], rows: int, views: int) -> tuple[Band, ...]:
    """The bands of a cache, from the views that all rows have on; one where all rows have all views."""
    counts = sorted({source.views for source in sources} or {views})
    starts = [0, *counts[:-1]]
    having = [sum(source.rows for source in sources if source.views >= stop) or rows for stop in counts]
    return tuple(map(Band, starts, counts, having))


def spans(sources: Sequence[SourceSpec], rows: int) -> tuple[slice, ...]:
    """The rows of each source; of a cache without several, all of them."""
    ends = list(itertools.accumulate(source.rows for source in sources)) or [rows]
    return tuple(map(slice, [0, *ends[:-1]], ends))


def describe_sources(sources: Sequence[SourceSpec]) -> tuple[str, ...]:
    """What each of several sources brings, in words: rows, labels, its part of a batch, views, and what is left out."""
    left = 1 - sum(source.share or 0 for source in sources)
    sharing = sum(source.rows for source in sources if source.share is None)
    return tuple(
        _describe(source, left * source.rows / sharing if source.share is None else source.share) for source in sources
    )


def _describe(source: SourceSpec, part: float) -> str:
    held = f", {100 * source.holdout:.3g} % of them held out" if source.holdout else ""
    left_out = f"; {source.skipped} files that cannot be decoded were left out" if source.skipped else ""
    labels = f"{'with' if source.labelled else 'without'} labels{held}"
    return (
        f"{source.source} {source.split}, {source.rows:,} rows {labels}, "
        f"{100 * part:.3g} % of a batch, {source.views} view{'' if source.views == 1 else 's'}{left_out}"
    )
