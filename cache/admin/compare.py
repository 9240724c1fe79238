"""How much numbers differ: of two caches, or of a cache and what is computed again."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from darht.cache.format.layout import ANSWERS, Kind


@dataclass(frozen=True)
class ValueDiff:
    """How the numbers of one array differ from others.

    Attributes:
        compared: answers, perturbations or values that were compared: rows times views where there are views.
        largest: the largest absolute difference: of logits, in pixel levels for perturbations, else of the integers; 1
            where encoded images differ.
        rows: share of rows with a difference.
        values: share of values that differ.
        argmax_flips: share of answers whose largest logit is another class's; None for arrays that do not tell.
    """

    compared: int
    largest: float
    rows: float
    values: float
    argmax_flips: float | None


def compare(kind: Kind, pairs: Iterable[tuple[np.ndarray, np.ndarray]], scale: float = 1.0) -> ValueDiff:
    """Compare blocks of rows of one array, `[rows, ...]` in the same shapes.

    Args:
        kind: of the array; logits and perturbations have views on their second axis.
        pairs: the blocks, some rows at a time.
        scale: what to multiply stored integers by: pixel levels for each integer of a perturbation.
    """
    views = kind in ("delta", "boxes") or kind in ANSWERS
    tells = kind in ("logits", "logits-int8", "logits-class")  # whose the largest logit is
    rows = rows_off = values = values_off = answers = flips = 0
    largest = 0.0
    for one, other in pairs:
        off = one != other
        gap = off if one.dtype == object else np.abs(one.astype(np.float64) - other.astype(np.float64)) * scale
        largest = max(largest, float(gap.max(initial=0.0)))
        rows, rows_off = rows + len(one), rows_off + int(off.reshape(len(one), -1).any(1).sum())
        values, values_off = values + off.size, values_off + int(off.sum())
        answers += one.shape[0] * one.shape[1] if views else len(one)
        flips += int((_strongest(kind, one) != _strongest(kind, other)).sum()) if tells else 0
    return ValueDiff(
        compared=answers,
        largest=largest,
        rows=rows_off / max(1, rows),
        values=values_off / max(1, values),
        argmax_flips=flips / max(1, answers) if tells else None,
    )


def _strongest(kind: Kind, values: np.ndarray) -> np.ndarray:
    found: np.ndarray = values[..., 0] if kind == "logits-class" else values.argmax(-1)
    return found
